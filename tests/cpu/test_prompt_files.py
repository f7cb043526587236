"""Prompt data of any format and size: parquet, arrow, files that are read lazily, and several files by weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmono.data import jsonl
from rlmono.data.cursor import DataCursor
from rlmono.data.mixture import MixedCursor, Mixture
from rlmono.data.prompts import LazySource, PromptSource, Source, open_source
from rlmono.data.rows import DataError, Prompt, Rules

Row = dict[str, Any]


def rows(n: int, start: int = 0) -> list[Row]:
    return [{"input": f"{i}", "label": str(i), "metadata": {"i": i}} for i in range(start, start + n)]


def write_jsonl(path: Path, data: Sequence[Row | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in data))
    return str(path)


def write_parquet(path: Path, data: Sequence[Row], group: int = 1000) -> str:
    pq.write_table(pa.Table.from_pylist(list(data)), path, row_group_size=group)
    return str(path)


def write_dataset(folder: Path, *shards: Sequence[Row], batch: int = 4) -> str:
    """What `datasets`' save_to_disk writes: arrow streams, and a state that lists them."""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(list(shard))
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def write(kind: str, folder: Path, data: Sequence[Row]) -> str:
    if kind == "jsonl":
        return write_jsonl(folder / "a.jsonl", data)
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", data, group=7)
    return write_dataset(folder / "dataset", data[:len(data) // 3], data[len(data) // 3:])


def prompts(source: Source) -> list[Any]:
    """All prompts, in file order."""
    return [source.row(row).prompt for k in range(source.windows) for row in source.window(k, None).tolist()]


KINDS = ("jsonl", "parquet", "arrow")
LABELLED = Rules(label_key="label")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows of a size at which small files have many."""
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 256)
    monkeypatch.setattr(jsonl.JsonLines, "window_blocks", 4)
    monkeypatch.setattr("rlmono.data.columns.WINDOW_BYTES", 2000)


# ---------------------------------------------------------------- formats

@pytest.mark.parametrize("lazy_above", [0, 10**9], ids=["lazy", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "@[2:5]", "@[:3]", "@[-8:]", "@[33:99]", "@[-9:-2]", "@[30:]"])
def test_every_format_gives_the_same_rows_and_slices(tmp_path: Path, small_blocks: None, kind: str, text: str, lazy_above: int) -> None:
    data = rows(40)
    source = open_source(write(kind, tmp_path, data) + text, LABELLED, lazy_above)
    assert isinstance(source, PromptSource if lazy_above else LazySource)
    expected = eval(f"data[{text[2:-1] or ':'}]")
    assert prompts(source) == [row["input"] for row in expected] and len(source) == len(expected)
    first = source.row(source.window(0, None)[0])
    assert (first.label, first.metadata) == (expected[0]["label"], expected[0]["metadata"])


def test_columns_hold_messages_tools_and_metadata(tmp_path: Path) -> None:
    """Objects of one column have all each other's keys, filled with null; tools and metadata may be text that holds JSON."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = [{"messages": [{"role": "user", "content": "a"}, call], "extra": json.dumps({"k": 1}), "tools": json.dumps(tools)},
            {"messages": [{"role": "user", "content": "b"}], "extra": None, "tools": None}]
    source = open_source(write_parquet(tmp_path / "a.parquet", data), Rules("messages", metadata_key="extra", tool_key="tools"))
    first, second = source.row(0), source.row(1)
    assert first == Prompt([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}], None, {"k": 1}, tools,
                           f"{tmp_path}/a.parquet[0]")
    assert second == Prompt([{"role": "user", "content": "b"}], None, {}, None, f"{tmp_path}/a.parquet[1]")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "b.parquet", rows(3, 3))
    write_parquet(tmp_path / "parquet" / "a.parquet", rows(3))
    assert prompts(open_source(f"{tmp_path}/parquet@[1:5]", LABELLED)) == list("1234")
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    write_dataset(splits / "train", rows(2))
    with pytest.raises(DataError, match="holds several splits; name one: .*/splits/train"):
        open_source(str(splits), LABELLED)
    assert prompts(open_source(str(splits / "train"), LABELLED)) == ["0", "1"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_what_is_wrong_with_columns_is_said(tmp_path: Path, kind: str) -> None:
    path = write(kind, tmp_path, [*rows(5), {"input": "x", "label": None, "metadata": {"i": 0}}])
    with pytest.raises(DataError, match="has no column 'question' .--input-key.; its columns are input, label, metadata"):
        open_source(path, Rules("question"))
    with pytest.raises(DataError, match=r"\[5\]: has no label 'label' .--label-key.*--skip-bad-rows"):
        open_source(path, Rules(label_key="label", label_required=True))
    with pytest.raises(DataError, match="has no label 'answer' .--label-key., and the reward needs one; its keys are input, label, metadata"):
        open_source(path, Rules(label_key="answer", label_required=True))
    file = next(Path(path).glob("data-00000-*.arrow")) if kind == "arrow" else Path(path)
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=f"{file}: cannot be read"):
        open_source(path, LABELLED)


@pytest.mark.parametrize("lazy_above", [10**9, 0])
def test_a_key_that_no_row_has_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, lazy_above: int) -> None:
    for kind in ("jsonl", "parquet"):
        open_source(write(kind, tmp_path, rows(3)), Rules(label_key="labl", metadata_key="metadata", tool_key="tools"), lazy_above)
        told = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
        first = "first " if lazy_above == 0 else ""
        assert told == [f"none of its {first}3 rows has {key!r} ({flag}): there is nothing to read by it"
                        for key, flag in (("labl", "--label-key"), ("tools", "--tool-key"))]
        caplog.clear()


# ---------------------------------------------------------------- lazily

@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.one_of(st.just(""), st.just("  \t"), st.integers(1, 700)), max_size=60), mark=st.booleans(), end=st.booleans())
def test_lines_are_found_wherever_blocks_end(tmp_path_factory: pytest.TempPathFactory, lines: list[str | int], mark: bool, end: bool) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps({"input": "x" * line}) for line in lines) + "\n" * end
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    expected = [(n, line) for n, line in enumerate(lines, 1) if isinstance(line, int)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", 256)
        file = jsonl.JsonLines(str(path))
        ids = [id for k in range(file.blocks) for id in file.block(k).tolist()]
        assert [len(file.row(id)["input"]) for id in ids] == [line for _, line in expected]
        assert [file.locate(id) for id in ids] == [f"{path}:{n}" for n, _ in expected]
        whole, numbers, _ = file.whole()
        assert whole.tolist() == ids and numbers.tolist() == [n for n, _ in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lazy_epoch_has_every_row_once_in_the_seeds_order(tmp_path: Path, small_blocks: None, kind: str) -> None:
    source = open_source(write(kind, tmp_path, rows(200)), LABELLED, 0)
    assert source.windows > 3
    orders = [[source.row(row).prompt for row in DataCursor(source, seed=seed, shuffle=True).next(400)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    first, second = orders[0][:200], orders[0][200:]
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(200)) and first != second
    assert sum(abs(int(a) - int(b)) for a, b in zip(first, first[1:], strict=False)) / 199 > 20     # of 67 in a full permutation; 1 in file order
    assert [source.row(row).prompt for row in DataCursor(source, seed=1, shuffle=False).next(201)] == [*map(str, range(200)), "0"]


@pytest.mark.parametrize("taken", [0, 3, 50, 79, 80, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lazy_cursor_resumes_in_any_window(tmp_path: Path, small_blocks: None, kind: str, taken: int) -> None:
    """Rows that are left out when their turn comes are left out again, and counted as if nothing had happened."""
    data = [{**row, "input": "long " * 9} if i % 7 == 3 else row for i, row in enumerate(rows(80))]
    path = write(kind, tmp_path, data)

    def cursor() -> DataCursor:
        rules = Rules(label_key="label", length_limit=4, length_of=lambda prompt: len(prompt.prompt))
        return DataCursor(open_source(path, rules, 0), seed=3, shuffle=True, samples_per_prompt=2)

    straight, first, second = cursor(), cursor(), cursor()
    straight.next(taken)
    first.next(taken)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.next(100) == straight.next(100)
    assert second.state() == straight.state() and second.left_out["too_long"] >= 11


def test_a_bad_row_of_a_lazy_file_is_named_when_its_turn_comes(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("rlmono.data.prompts.FIRST_ROWS", 10)
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(50), "", '{"input": ', *rows(50)])
    cursor = DataCursor(open_source(path, LABELLED, 0), seed=0, shuffle=False)
    assert len(cursor.next(50)) == 50
    with pytest.raises(DataError, match=r"a.jsonl:52: not a line of JSON.*--skip-bad-rows"):
        cursor.next(1)
    cursor = DataCursor(open_source(path, Rules(label_key="label", skip_bad_rows=True), 0), seed=0, shuffle=False)
    cursor.next(220)
    assert cursor.left_out == {"bad_row": 2} and "left out: " in caplog.text and "a.jsonl:52: " in caplog.text
    early = write_jsonl(tmp_path / "early.jsonl", [*rows(5), "{", *rows(50)])
    with pytest.raises(DataError, match="early.jsonl:6: "):
        open_source(early, LABELLED, 0)
    with pytest.raises(DataError, match="none of the first 10 rows can be used: 0 are bad, 10 have more than --rollout-max-prompt-len .0. tokens"):
        open_source(path, Rules(label_key="label", length_limit=0, length_of=lambda prompt: 1), 0)


def test_an_epoch_in_which_nothing_can_be_used_ends_the_run(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(50))
    source = open_source(path, Rules(length_limit=10, length_of=lambda prompt: 1), 0)
    source.rules = Rules(length_limit=0, length_of=lambda prompt: 1)    # type: ignore[attr-defined]
    with pytest.raises(DataError, match="not one row of a whole epoch can be used .*too_long"):
        DataCursor(source, seed=0, shuffle=True).next(1)


def test_other_lazy_data_is_refused(tmp_path: Path, small_blocks: None) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(100))
    state = DataCursor(open_source(path, LABELLED, 0), seed=1, shuffle=True).state()
    for other in (open_source(path + "@[1:]", LABELLED, 0), open_source(path, LABELLED), open_source(path, Rules(length_limit=3), 0)):
        with pytest.raises(DataError, match=r"other prompt data: it read a.jsonl, \d+ bytes.*--lazy-data-above-mb"):
            DataCursor(other, seed=1, shuffle=True).restore(state)
    write_jsonl(tmp_path / "a.jsonl", [*rows(99), {"input": "y", "label": "9"}])
    with pytest.raises(DataError, match="other prompt data"):
        DataCursor(open_source(path, LABELLED, 0), seed=1, shuffle=True).restore(state)


# ---------------------------------------------------------------- several files

@pytest.fixture
def three(tmp_path: Path) -> list[Source]:
    return [open_source(write_jsonl(tmp_path / f"{name}.jsonl", [{"input": f"{name}{i}"} for i in range(n)]), Rules())
            for name, n in (("a", 10), ("b", 40), ("c", 7))]


def mixed(sources: list[Source], weights: tuple[float, ...] | None, seed: int = 1) -> tuple[Mixture, MixedCursor]:
    mixture = Mixture(sources, weights)
    return mixture, MixedCursor(mixture, seed=seed, shuffle=True, samples_per_prompt=2)


def test_each_source_gives_its_share_of_any_stretch(three: list[Source]) -> None:
    mixture, cursor = mixed(three, (5, 3, 2))
    taken = "".join(mixture.row(row).prompt[0] for row in cursor.next(1000))
    assert Counter(taken) == {"a": 500, "b": 300, "c": 200}
    for start in range(0, 900, 37):
        part = Counter(taken[start:start + 100])
        assert abs(part["a"] - 50) <= 3 and abs(part["b"] - 30) <= 3 and abs(part["c"] - 20) <= 3
    assert (cursor.groups, cursor.samples) == (1000, 2000) and [c.epoch for c in cursor.cursors] == [49, 7, 28]


def test_without_weights_an_epoch_of_each_ends_with_the_others(three: list[Source]) -> None:
    mixture, cursor = mixed(three, None)
    assert len(mixture) == 57
    assert len({mixture.row(row).prompt for row in cursor.next(57)}) == 57


@pytest.mark.parametrize("taken", [0, 1, 13, 64])
def test_a_mixture_resumes(three: list[Source], taken: int) -> None:
    (_, straight), (_, first), (_, second) = mixed(three, (1, 2, 1)), mixed(three, (1, 2, 1)), mixed(three, (1, 2, 1))
    straight.next(taken)
    first.next(taken)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.next(90) == straight.next(90) and second.state() == straight.state()


def test_another_mixture_is_refused(three: list[Source]) -> None:
    state = mixed(three, (1, 2, 1))[1].state()
    for sources, weights in ((three, (2, 1, 1)), (three[:2], (1, 2))):
        with pytest.raises(DataError, match="--prompt-data-weights"):
            mixed(sources, weights)[1].restore(state)
    with pytest.raises(DataError, match="this run reads only"):
        DataCursor(three[0], seed=1, shuffle=True).restore(state)
    with pytest.raises(DataError, match="shares .1.0., and this run has 3"):
        mixed(three, (1, 2, 1))[1].restore(DataCursor(three[0], seed=1, shuffle=True).state())
    with pytest.raises(DataError, match="another order"):
        mixed(three, (1, 2, 1), seed=2)[1].restore(state)
