"""Which checkpoints are whole, which are refused and why, and what is used in their place."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlmono.checkpoint import store
from rlmono.checkpoint.store import MANIFEST, STATE, CheckpointError, CheckpointStore, fail, find_checkpoint
from rlmono.config.schema import Config

MODEL = {"num_layers": 2, "hidden_size": 64}
ROOT = Path(__file__).resolve().parents[2]


def make_store(root: Path, attempt: str = "attempt", **values: Any) -> CheckpointStore:
    return CheckpointStore(dataclasses.replace(Config(), save=str(root), model=MODEL, **values), attempt)


def write(root: Path, rollout_id: int, attempt: str = "attempt", content: str = "weights") -> Path:
    """A checkpoint as a run of two ranks writes it."""
    checkpoints = make_store(root, attempt)
    partial = checkpoints.partial(rollout_id)
    for name in ("trainer/__0_0.distcp", "trainer/common.pt", "rng/rank_00000.pt"):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(f"{name} {rollout_id} {content}" * 1000)
    return checkpoints.publish(rollout_id, {"next_rollout": rollout_id + 1, "cursor": {"position": 5}})


def test_a_published_checkpoint_is_found_with_its_state(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "rollout_0000007" and not list(tmp_path.glob("partial-*"))
    for where in (tmp_path, folder):
        found = find_checkpoint(where, MODEL)
        assert found is not None and (found.folder, found.rollout_id, found.refused) == (folder, 7, ())
        assert found.state["data"] == {"next_rollout": 8, "cursor": {"position": 5}}
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {STATE, "trainer/__0_0.distcp", "trainer/common.pt", "rng/rank_00000.pt"}


def test_nothing_there_is_no_checkpoint_and_no_error(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing", MODEL) is None
    (tmp_path / "partial-0000001-x").mkdir()
    (tmp_path / "rollout_x").mkdir()
    assert find_checkpoint(tmp_path, MODEL) is None


def test_the_newest_is_taken_also_beyond_seven_digits(tmp_path: Path) -> None:
    for rollout_id in (9_999_999, 10_000_000, 3):
        write(tmp_path, rollout_id)
    found = find_checkpoint(tmp_path, MODEL)
    assert found is not None and found.rollout_id == 10_000_000


def _tear(folder: Path) -> None:
    os.truncate(folder / "trainer/common.pt", 100)


def _flip(folder: Path) -> None:
    data = bytearray((folder / "trainer/common.pt").read_bytes())
    data[17] ^= 1
    (folder / "trainer/common.pt").write_bytes(data)


def _rewrite_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
    return damage


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (_tear, r"trainer/common\.pt has 100 bytes, not \d+: torn"),
    (_flip, r"trainer/common\.pt has changed since it was written"),
    (lambda f: (f / "trainer/__0_0.distcp").unlink(), r"trainer/__0_0\.distcp is missing"),
    (lambda f: (f / "trainer/extra.pt").touch(), r"trainer/extra\.pt is not in the manifest"),
    (lambda f: (f / MANIFEST).unlink(), r"manifest\.json is missing"),
    (lambda f: (f / MANIFEST).write_text("{"), r"manifest\.json is damaged"),
    (lambda f: (f / MANIFEST).write_text("[]"), r"manifest\.json is damaged"),
    (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest\.json is damaged"),
    (_rewrite_manifest(lambda m: m["files"]["trainer/common.pt"].pop("sha256")), r"manifest\.json is damaged"),
    (_rewrite_manifest(lambda m: m["files"]["trainer/common.pt"].update(sha256="0" * 64)), "has changed since it was written"),
    (_rewrite_manifest(lambda m: m.update(version=2)), "version 2, and this rlmono reads version 1"),
    (_rewrite_manifest(lambda m: m["files"].pop(STATE)) , r"does not list state\.json"),
    (lambda f: (f / STATE).write_text("{}"), r"state\.json has 2 bytes"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_its_path_and_the_one_before_used(tmp_path: Path, damage: Callable[[Path], Any], text: str) -> None:
    before, newest = write(tmp_path, 1), write(tmp_path, 3)
    damage(newest)
    with pytest.raises(CheckpointError, match=f"^{newest}: .*{text}"):
        find_checkpoint(newest, MODEL)
    found = find_checkpoint(tmp_path, MODEL)
    assert found is not None and found.folder == before
    assert len(found.refused) == 1 and found.refused[0].startswith(str(newest))


def test_all_damaged_is_an_error_and_no_silent_restart(tmp_path: Path) -> None:
    folders = [write(tmp_path, 1), write(tmp_path, 3)]
    for folder in folders:
        _flip(folder)
    with pytest.raises(CheckpointError) as e:
        find_checkpoint(tmp_path, MODEL)
    assert all(f"{folder}: trainer/common.pt" in str(e.value) for folder in folders)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"{folder}: a checkpoint of another model: hidden_size is 64 there and 128 here"):
        find_checkpoint(tmp_path, {**MODEL, "hidden_size": 128})


def test_nothing_is_unpickled_before_the_manifest_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not in the room's imports: the controller's side knows no pickle and no torch."""
    text = Path(store.__file__).read_text()
    assert "import torch" not in text and "pickle." not in text


def test_a_file_that_cannot_be_read_is_a_refusal(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=f"{folder}: can't be read"):
        find_checkpoint(folder, MODEL)


def test_unfinished_folders_are_swept_at_the_next_start_and_checkpoints_kept(tmp_path: Path) -> None:
    kept = write(tmp_path, 1)
    (tmp_path / "partial-0000003-killed" / "trainer").mkdir(parents=True)
    (tmp_path / "partial-0000003-killed" / "trainer" / "x").touch()
    shutil.copytree(kept, tmp_path / "superseded-0000001-old")
    make_store(tmp_path, "next").prepare()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "rollout_0000001"]


def test_a_rollout_that_is_done_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write(tmp_path, 1, "first", "old")
    _flip(tmp_path / "rollout_0000001")
    folder = write(tmp_path, 1, "second", "new")
    assert "new" in (folder / "trainer/common.pt").read_text()
    assert find_checkpoint(tmp_path, MODEL) is not None and [p.name for p in tmp_path.iterdir()] == ["rollout_0000001"]


def test_a_failed_publish_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path, 1)
    checkpoints = make_store(tmp_path, "b")
    (checkpoints.partial(3) / "trainer").mkdir(parents=True)
    (checkpoints.partial(3) / "trainer/common.pt").write_text("x")

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(OSError, match=rf"{checkpoints.partial(3)}: the checkpoint could not be written \(No space left on device\)"):
        checkpoints.publish(3, {})
    found = find_checkpoint(tmp_path, MODEL)
    assert found is not None and found.folder == before


def test_a_fault_that_is_not_the_disks_keeps_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        fail(tmp_path, RuntimeError("connection closed by peer"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"missing: the checkpoint could not be written \(No such file or directory\)"):
        fail(tmp_path / "missing", RuntimeError("iostream error"))


def test_a_save_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file/save: --save can't be written \(Not a directory\)"):
        make_store(tmp_path / "file" / "save").prepare()


def test_two_runs_cannot_save_to_one_folder(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from rlmono.world.locks import hold\n"
            f"hold(Path({str(tmp_path / '.lock')!r})); print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"{tmp_path}: --save is in use by a run that is alive"):
            make_store(tmp_path).prepare()
        other.kill()


def test_a_folder_with_checkpoints_of_rollouts_to_come_is_another_runs(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 3)
    make_store(tmp_path).refuse_other_runs(4)
    with pytest.raises(CheckpointError, match=f"rollout_0000003: --save has a checkpoint of another run.*--load {tmp_path}"):
        make_store(tmp_path).refuse_other_runs(2)


@pytest.mark.parametrize(("every", "expected"), [(None, [5]), (2, [1, 3, 5]), (4, [3, 5])])
def test_saves_are_due_by_interval_and_at_the_end(tmp_path: Path, every: int | None, expected: list[int]) -> None:
    checkpoints = make_store(tmp_path, save_interval=every)
    assert [i for i in range(6) if checkpoints.due(i, 6)] == expected
