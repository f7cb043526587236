"""Checkpoints written in the background: published while the loop stands still elsewhere, killed in the middle of one, and a full
disk. In the end nothing differs from a run that wrote each at once, and that nothing happened to."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import differing, lineage, load_all
from jobs import COLOCATED, SAMPLES, Job, killed_job


@pytest.fixture(scope="module")
def killed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with killed_job(tmp_path_factory.mktemp("behind"), task, sockets, (*COLOCATED, "--async-save"), _kill_when_published) as job:
        yield job


def _kill_when_published(job: Job) -> None:
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
