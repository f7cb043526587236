"""Prompt files, the cursor, and the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rlmono import quickstart
from rlmono.config.schema import Config
from rlmono.data.bytewise import byte_table
from rlmono.data.cursor import DataCursor
from rlmono.data.prompts import PromptSource, open_source, split_slice
from rlmono.data.rows import DataError, Prompt, Rules
from rlmono.data.tokenizer import Tokenizer, TokenizerError
from rlmono.rollout.prompts import Prompts

# ---------------------------------------------------------------- prompt files


def write(path: Path, *lines: str | dict[str, Any], end: str = "\n") -> str:
    path.write_bytes(end.join([line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]).encode())
    return str(path)


def open_whole(path: str, **rules: Any) -> PromptSource:
    source = open_source(path, Rules(**rules))
    assert isinstance(source, PromptSource)
    return source


def test_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "straße?"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path / "a.jsonl", {"input": "one", "label": 1, "metadata": {"k": 2}},
                 {"input": messages, "label": "x", "tools": json.dumps(tools)})
    source = open_whole(path, label_key="label", tool_key="tools")
    assert len(source) == 2
    assert source.row(0) == Prompt("one", 1, {"k": 2}, None, f"{path}:1")
    assert source.row(1) == Prompt(messages, "x", {}, tools, f"{path}:2")
    with pytest.raises(IndexError):
        source.row(2)


def test_lines_are_found_whatever_ends_them(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, blank lines, and no newline at the end; numbers are those of the file."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\r\n\r\n  \n{"input": "b"}\n\n{"input": "c"}')
    source = open_whole(str(path))
    found = [(source.row(i).prompt, source.row(i).where) for i in range(len(source))]
    assert found == [("a", f"{path}:1"), ("b", f"{path}:4"), ("c", f"{path}:6")]


@pytest.mark.parametrize("text, rows", [("", range(10)), ("@[2:5]", range(2, 5)), ("@[:3]", range(3)), ("@[-2:]", range(8, 10)),
                                        ("@[7:99]", range(7, 10))])
def test_slices(tmp_path: Path, text: str, rows: range) -> None:
    path = write(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(10)))
    source = open_whole(path + text)
    assert [source.row(i).prompt for i in range(len(source))] == [str(i) for i in rows]


def test_a_slice_outside_and_one_misspelt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"input": "x"})
    with pytest.raises(DataError, match="selects none of the 1 rows"):
        open_whole(path + "@[3:5]")
    with pytest.raises(DataError, match=r"does not exist; a slice is written path@\[start:end\]"):
        open_whole(path + "@[3-5]")
    assert split_slice("/a@b/c.jsonl@[:-1]") == ("/a@b/c.jsonl", slice(None, -1))


BAD = {
    '{"input": "x"': "not a line of JSON",
    '{"input": NaN}': "not a line of JSON",
    '["input"]': "must be a JSON object, not a list",
    '{"question": "x"}': "has no 'input' (--input-key); its keys are question",
    '{"input": 3, "label": "1"}': "must be a string or a list of messages, not a number",
    '{"input": "", "label": "1"}': "is an empty string",
    '{"input": [], "label": "1"}': "is an empty list of messages",
    '{"input": ["x"], "label": "1"}': "input[0] must be a message with role and content, not a string",
    '{"input": [{"content": "x"}], "label": "1"}': "input[0] has no role",
    '{"input": [{"role": "user", "content": "x"}, {"role": "user"}], "label": "1"}':
        "input[1] (user) has no content (a string); content is null",
    '{"input": "x", "metadata": "y", "label": "1"}': "must be a JSON object, not a string",
    '{"input": "x", "label": "1", "tools": ["f"]}': "must be a list of objects",
    '{"input": "x"}': "has no label 'label' (--label-key)",
    '{"input": "x", "label": null}': "has no label 'label' (--label-key)",
}


@pytest.mark.parametrize("line, problem", BAD.items(), ids=list(BAD.values()))
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: str, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", {"input": "good", "label": "1"}, line, {"input": "also", "label": "2"})
    options: dict[str, Any] = {"label_key": "label", "tool_key": "tools", "label_required": True}
    with pytest.raises(DataError) as error:
        open_whole(path, **options)
    assert f"{path}:2: " in str(error.value) and problem in str(error.value) and "--skip-bad-rows" in str(error.value)
    with caplog.at_level(logging.WARNING):
        source = open_whole(path, skip_bad_rows=True, **options)
    assert [source.row(i).prompt for i in range(len(source))] == ["good", "also"]
    assert len(source.bad_rows) == 1
    assert caplog.text.count("1 of 3 rows are bad") == 1 and f"{path}:2: " in caplog.text


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(DataError, match="a.jsonl:1: not a line of JSON"):
        open_whole(str(path))


def test_at_most_ten_bad_rows_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", {"input": "x"}, *["{" for _ in range(25)])
    with caplog.at_level(logging.WARNING):
        source = open_whole(path, skip_bad_rows=True)
    assert source.bad == 25 and caplog.text.count(": not a line of JSON") == 10 and "and 15 more" in caplog.text


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "no.jsonl", "does not exist"), (tmp_path, "in this one is nothing"), (tmp_path / "a.parquet", "not exist")):
        with pytest.raises(DataError, match=problem):
            open_whole(str(path))
    for content in ("", "\n \n"):
        with pytest.raises(DataError, match="is empty"):
            open_whole(write(tmp_path / "empty.jsonl", content))
    with pytest.raises(DataError, match="none of 1 rows is left: 1 are bad"):
        open_whole(write(tmp_path / "bad.jsonl", "{"), skip_bad_rows=True)
    with pytest.raises(DataError, match="--label-key"):
        open_whole(write(tmp_path / "a.jsonl", {"input": "x"}), label_required=True)


def test_long_prompts_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", *({"input": "x" * n} for n in (3, 9, 4, 5)))

    def length(prompt: Prompt) -> int:
        return len(prompt.prompt)

    with caplog.at_level(logging.WARNING):
        source = open_whole(path, length_limit=4, length_of=length)
    assert [source.row(i).where for i in range(len(source))] == [f"{path}:1", f"{path}:3"]
    assert source.too_long == 2 and "2 of 4 prompts have more than 4 tokens" in caplog.text
    with pytest.raises(DataError, match=r"none of 4 rows is left.*--rollout-max-prompt-len \(2\)"):
        open_whole(path, length_limit=2, length_of=length)


def test_a_prompt_that_cannot_be_measured_is_a_bad_line(tmp_path: Path) -> None:
    def length(prompt: Prompt) -> int:
        raise TokenizerError("the template refuses it")

    with pytest.raises(DataError, match="a.jsonl:1: the template refuses it"):
        open_whole(write(tmp_path / "a.jsonl", {"input": "x"}), length_limit=4, length_of=length)


def test_a_file_that_changes_under_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"input": "one"}, {"input": "two"})
    source = open_whole(path)
    write(Path(path), "x" * 40)
    with pytest.raises(DataError, match="a.jsonl:2: "):
        source.row(1)


# ---------------------------------------------------------------- cursor


@pytest.fixture
def make_cursor(tmp_path: Path) -> Callable[..., DataCursor]:
    def make(rows: int = 7, spec: str = "", *, seed: int = 5, shuffle: bool = True, limit: int | None = None) -> DataCursor:
        path = write(tmp_path / "p.jsonl", *({"input": str(i)} for i in range(rows)))
        source = open_whole(path + spec, length_limit=limit, length_of=lambda prompt: int(str(prompt.prompt)))
        return DataCursor(source, seed=seed, shuffle=shuffle, samples_per_prompt=4)
    return make


def test_epochs_are_permutations_of_their_own_seed(make_cursor: Callable[..., DataCursor]) -> None:
    rows = make_cursor().next(21)
    assert rows == [int(i) for epoch in range(3) for i in np.random.default_rng(5 + epoch).permutation(7)]
    assert make_cursor(shuffle=False).next(10) == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


def test_counters(make_cursor: Callable[..., DataCursor]) -> None:
    cursor = make_cursor()
    cursor.next(7)
    assert (cursor.epoch, cursor.position) == (0, 7)
    cursor.next(3)
    assert (cursor.epoch, cursor.position, cursor.groups, cursor.samples) == (1, 3, 10, 40)


@pytest.mark.parametrize("taken", [0, 3, 7, 11, 14])
def test_a_restored_cursor_goes_on_as_if_nothing_had_happened(make_cursor: Callable[..., DataCursor], taken: int) -> None:
    straight, first, second = make_cursor(), make_cursor(), make_cursor()
    straight.next(taken)
    first.next(taken)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.next(12) == straight.next(12)
    assert second.state() == straight.state()


def test_the_state_of_other_data_is_refused(make_cursor: Callable[..., DataCursor], tmp_path: Path) -> None:
    state = make_cursor().state()
    for other in (make_cursor(6), make_cursor(8, "@[1:]"), make_cursor(7, limit=5)):
        with pytest.raises(DataError, match="other prompt data: it read p.jsonl, 7 rows.*--finetune"):
            other.restore(state)
    same = write(tmp_path / "p.jsonl", *({"input": str(i + (i == 3))} for i in range(7)))
    with pytest.raises(DataError, match="other prompt data"):
        DataCursor(open_whole(same), seed=5, shuffle=True).restore(state)


def test_another_order_is_refused(make_cursor: Callable[..., DataCursor]) -> None:
    state = make_cursor().state()
    with pytest.raises(DataError, match="--rollout-seed 5, this run --rollout-shuffle with --rollout-seed 6"):
        make_cursor(seed=6).restore(state)
    with pytest.raises(DataError, match="this run file order"):
        make_cursor(shuffle=False).restore(state)
    make_cursor(seed=6, shuffle=False).restore(make_cursor(seed=7, shuffle=False).state())


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    quickstart.write_model(path, 0)
    return path


def with_template(folder: Path, tmp_path: Path, template: str | None) -> Tokenizer:
    """The folder's tokenizer under another chat template."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    return Tokenizer(str(path))


USER = {"role": "user", "content": "27+35"}
ANSWER = {"role": "assistant", "content": "50+12=\\boxed{62}"}


def test_render(folder: Path) -> None:
    tokenizer = Tokenizer(str(folder))
    ids = tokenizer.render([USER], None, True)
    assert tokenizer.decode(ids) == "<|user|>27+35<|end|><|assistant|>" and len(ids) == 8
    assert tokenizer.render("27+35", None, True) == ids
    assert tokenizer.decode(tokenizer.render("27+35")) == "27+35"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "27+35"
    with pytest.raises(TokenizerError, match="--apply-chat-template"):
        tokenizer.render([USER])
    with pytest.raises(TokenizerError, match="roles system: the roles of this template are user and assistant"):
        tokenizer.render([{"role": "system", "content": "x"}], None, True)
    with pytest.raises(TokenizerError, match="cannot encode 'é'"):
        tokenizer.render("é")


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LONG = ["Ġ" * 15, "Ġ" * 16, "x" * 17, "Ã©" * 16, "y" * 33]
BYTE_LEVEL = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate([*BYTES, "Ġa", "ĊĊ", "Ã©", *LONG])}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
BYTE_LEVEL.add_tokens([AddedToken(t, normalized=False) for t in ("<tool call>", "日本", "é")])
BYTE_LEVEL.add_special_tokens([AddedToken(t, special=True) for t in ("<|end|>", "<a b>")])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1)), st.booleans())
def test_bytes_make_the_text_that_the_tokenizer_makes(ids: list[int], skip: bool) -> None:
    """Of any tokens: bytes that are no text, tokens that are none of bytes, special ones, and some longer than a row of the table."""
    table = byte_table(BYTE_LEVEL)
    assert table is not None
    for many in (ids, ids * 100):          # looked up, and gathered
        assert table.decode(many, skip) == BYTE_LEVEL.decode(many, skip_special_tokens=skip)


def test_what_has_no_table_of_bytes() -> None:
    table = byte_table(BYTE_LEVEL)
    assert table is not None
    for unknown in (-1, BYTE_LEVEL.get_vocab_size()):
        for n in (1, 5000):
            with pytest.raises(IndexError):
                table.decode([1, unknown] * n, False)
    other = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    assert byte_table(other) is None


def test_eos_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(folder, tmp_path, None)
    assert tokenizer.eos_ids == (2,)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert Tokenizer(str(tmp_path / "model")).eos_ids == (2, 5, 9)


def test_the_loss_mask_is_what_the_assistant_says(folder: Path) -> None:
    tokenizer = Tokenizer(str(folder))
    ids, mask = tokenizer.chat_with_mask([USER, ANSWER, USER, {"role": "assistant", "content": "\\boxed{50}"}])
    assert len(ids) == len(mask)
    assert tokenizer.decode(ids) == ("<|user|>27+35<|end|><|assistant|>50+12=\\boxed{62}<|end|>"
                                     "<|user|>27+35<|end|><|assistant|>\\boxed{50}<|end|>")
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "50+12=\\boxed{62}<|end|>\\boxed{50}<|end|>"
    assert mask[:8] == [0] * 8 and mask[8] == 1


def test_what_a_template_writes_after_a_turn_is_not_learned(folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(folder, tmp_path, "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
                                                "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    ids, mask = tokenizer.chat_with_mask([USER, ANSWER])
    assert tokenizer.decode(ids).endswith("<|end|>\n")
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "50+12=\\boxed{62}<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(folder: Path, tmp_path: Path) -> None:
    """As templates do that leave out the thinking of all but the last answer."""
    tokenizer = with_template(
        folder, tmp_path, "{% for m in messages %}<|{{ m['role'] }}|>{{ '' if m['role'] == 'user' or loop.last else 'short' }}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    assert sum(tokenizer.chat_with_mask([USER, ANSWER])[1]) == 11
    with pytest.raises(TokenizerError, match=r"up to number 1 \(assistant\) in another way"):
        tokenizer.chat_with_mask([USER, ANSWER, USER, ANSWER])
    with pytest.raises(TokenizerError, match="nothing to learn"):
        tokenizer.chat_with_mask([USER])


def test_folders_without(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer(str(tmp_path / "none"))
    with pytest.raises(TokenizerError, match="no usable tokenizer .its tokenizer files: none"):
        Tokenizer(str(tmp_path))
    tokenizer = with_template(folder, tmp_path, None)
    assert tokenizer.render("1+1")
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.render("1+1", None, True)


def test_the_rooms_are_light() -> None:
    """A host or a reward worker imports these without torch, transformers, sglang or megatron."""
    code = ("import sys, rlmono.data.prompts, rlmono.data.cursor, rlmono.data.tokenizer\n"
            "import rlmono.rewards.pool, rlmono.rewards.worker, rlmono.quickstart\n"
            "print([m for m in ('torch', 'transformers', 'sglang', 'megatron', 'sympy', 'zmq') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_where_a_prompt_is_from_is_noted_unless_its_metadata_says_so(tmp_path: Path) -> None:
    quickstart.write_tokenizer(tmp_path)
    path = write(tmp_path / "a.jsonl", {"input": "1+1"}, {"input": "2+2", "metadata": {"source": "exam"}})
    config = dataclasses.replace(Config(), prompt_data=(path,), input_key="input", n_samples_per_prompt=1, rm_type="random")
    groups = Prompts(config, Tokenizer(str(tmp_path))).next_groups(0, 2)
    assert [g[0].metadata["source"] for g in groups] == [f"{path}:1", "exam"]
