"""Checkpoints written in the background: published while the loop stands still elsewhere, killed in the middle of one, and a full
disk. In the end nothing differs from a run that wrote each at once, and that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import differing, lineage, load_all
from disk import Disk
from jobs import COLOCATED, Job

SAMPLES = 32
"""A rollout has 4 groups of 8; sample numbers count over the run."""


@pytest.fixture(scope="module")
def killed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("behind")
    (folder / "disk").mkdir()
    disk = Disk(folder / "disk")
    job = Job(folder, task, sockets, (*COLOCATED, "--async-save"), rollouts=6, ranks=3, save=disk.folder / "save")
    try:
        _kill_after_it_was_published_behind_the_loop(job)
        _kill_while_saving(job)
        _fill_disk_before_save(job, disk)
        with job.start() as run:
            assert run.wait() == 0, run.text()
            assert f"resuming from {job.checkpoint(3)}: rollout 4 of 6" in run.text()
        yield job
    finally:
        disk.close()


def _kill_after_it_was_published_behind_the_loop(job: Job) -> None:
    """No rank comes further than rollout 2, and the checkpoint of rollout 1 is there."""
    job.hold(2 * SAMPLES + 13)
    with job.start() as run:
        run.until(job.held, "rollout 2 to be generated")
        run.until(job.checkpoint(1).exists, "checkpoint 1 to be published while rollout 2 is held")
        assert job.held()
        run.kill(rank=1)
        assert run.wait(120) == 128 + signal.SIGKILL, run.text()
        run.wait_until_gone()
    job.let_go()


def _kill_while_saving(job: Job) -> None:
    """`kill -9` of a device rank as soon as the folder of checkpoint 3 has appeared: the one before it is used."""
    with job.start() as run:
        run.until(lambda: "resuming from" in run.text(), "the run to resume")
        assert f"resuming from {job.checkpoint(1)}: rollout 2 of 6" in run.text()
        pid = run.pid(rank=0)
        run.until(lambda: any(job.save.glob("partial-0000003-*")), "checkpoint 3 to be written")
        os.kill(pid, signal.SIGKILL)
        assert run.wait(120) == 128 + signal.SIGKILL, run.text()
        run.wait_until_gone()
    assert any(job.save.glob("partial-*")) and not job.checkpoint(3).exists()


def _fill_disk_before_save(job: Job, disk: Disk) -> None:
    """The thread's error ends the run, and names the folder."""
    job.hold(4 * SAMPLES + 13)
    with job.start() as run:
        run.until(job.held, "rollout 4 to be generated")
        assert f"resuming from {job.checkpoint(1)}: rollout 2 of 6" in run.text()
        run.until(job.checkpoint(3).exists, "checkpoint 3 to be published")
        disk.fill(run)
        job.let_go()
        assert run.wait(120) == 1, run.text()
        run.wait_until_gone()
    (line, *_) = [x for x in run.text().splitlines() if "could not be written" in x]
    assert str(job.save / "partial-0000005-") in line and ("No space left" in line or "File too large" in line), run.text()
    assert job.checkpoint(3).exists() and not job.checkpoint(5).exists()
    disk.free()


@pytest.mark.parametrize("rollout_id", range(6))
def test_every_token_logprob_and_the_data_cursor_are_the_same(straight: Job, killed: Job, rollout_id: int) -> None:
    assert lineage(killed.run_dir)[rollout_id] == lineage(straight.run_dir)[rollout_id]


@pytest.mark.parametrize("rollout_id", [1, 3, 5])
def test_every_tensor_is_the_same(straight: Job, killed: Job, rollout_id: int) -> None:
    assert differing(load_all(straight.checkpoint(rollout_id)), load_all(killed.checkpoint(rollout_id))) == []


def test_the_loop_waits_for_the_copy_and_not_for_the_disk(killed: Job) -> None:
    rows = [json.loads(line) for line in (killed.run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = [row["rollout_id"] for row in rows if "perf/save_time" in row]
    behind = [row["rollout_id"] for row in rows if "perf/async_save_time" in row]
    assert saved == [1, 3, 5] and behind == [3, 5]          # the first run was killed before it could say of 1


def test_nothing_unfinished_is_left(killed: Job) -> None:
    assert sorted(p.name for p in killed.save.iterdir() if not p.name.startswith(".")) == [f"rollout_{i:07d}" for i in (1, 3, 5)]
    assert killed.left_sockets() == []
