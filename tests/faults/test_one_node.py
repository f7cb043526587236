"""One node, two colocated device ranks: killed while it generates, killed while it saves, and a full disk. Each time it is
started again, and in the end nothing of it differs from a run that nothing happened to."""

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
    with killed_job(tmp_path_factory.mktemp("killed"), task, sockets, COLOCATED, _kill_while_generating) as job:
        yield job


def _kill_while_generating(job: Job) -> None:
    """`kill -9` of a device rank in rollout 2, while one sample is known to be waited for."""
    job.hold(2 * SAMPLES + 13)
    with job.start() as run:
        run.until(job.held, "rollout 2 to be generated")
        run.kill(rank=1)
        assert run.wait(120) == 128 + signal.SIGKILL, run.text()
        run.wait_until_gone()
    assert job.left_sockets() == []         # the host was told to end, and tidied up
    assert sorted(lineage(job.run_dir)) == [0, 1]
    job.let_go()


@pytest.mark.parametrize("rollout_id", range(6))
def test_every_token_logprob_and_the_data_cursor_are_the_same(straight: Job, killed: Job, rollout_id: int) -> None:
    assert lineage(killed.run_dir)[rollout_id] == lineage(straight.run_dir)[rollout_id]


@pytest.mark.parametrize("rollout_id", [1, 3, 5])
def test_every_tensor_is_the_same(straight: Job, killed: Job, rollout_id: int) -> None:
    expected, found = load_all(straight.checkpoint(rollout_id)), load_all(killed.checkpoint(rollout_id))
    assert sum(name.startswith(".optimizer.state.exp_avg") for name in expected) >= 20
    assert differing(expected, found) == []


def test_training_changed_the_model(straight: Job) -> None:
    """Else equality would say nothing."""
    changed = differing(load_all(straight.checkpoint(1)), load_all(straight.checkpoint(5)))
    assert ".output_layer.weight" in changed and ".optimizer.state.exp_avg.output_layer.weight" in changed
    rollouts = lineage(straight.run_dir)
    assert len({row["samples"] for row in rollouts.values()}) == 6


def test_the_data_cursor_in_the_checkpoint_is_the_same(straight: Job, killed: Job) -> None:
    states = [json.loads((job.checkpoint(5) / "state.json").read_text()) for job in (straight, killed)]
    assert states[0] == states[1]
    assert states[0]["data"]["next_rollout"] == 6 and states[0]["data"]["cursor"]["samples"] == 6 * SAMPLES


def test_nothing_unfinished_is_left(killed: Job) -> None:
    assert sorted(p.name for p in killed.save.iterdir() if not p.name.startswith(".")) == [f"rollout_{i:07d}" for i in (1, 3, 5)]
    assert killed.left_sockets() == []


def test_rewards_that_fail_are_counted_and_end_nothing(straight: Job) -> None:
    rows = [json.loads(line) for line in (straight.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["rollout_id"] == 0 and "rollout/raw_reward" in row)
    remarks = {k: v for k, v in first.items() if k.startswith("rollout/remarks/")}
    assert remarks == {f"rollout/remarks/reward_{what}": 1.0 for what in ("error", "invalid", "timeout")}
    assert not any(k.startswith("rollout/remarks/") for row in rows if row["rollout_id"] for k in row)
