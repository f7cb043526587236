"""Disaggregated, one trainer and two engines: the launcher itself is killed while the engines generate, and the run started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from checkpoints import differing, lineage, load_all
from jobs import SAMPLES, Job

PLACEMENT = ("--actor-num-gpus-per-node", 1, "--rollout-num-gpus", 2, "--check-weight-update-equal")


def _job(task: Path, sockets: Path, folder: Path) -> Job:
    return Job(folder, task, sockets, PLACEMENT, rollouts=4, ranks=4, save=folder / "save")


@pytest.fixture(scope="module")
def undisturbed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(task, sockets, tmp_path_factory.mktemp("undisturbed")).run_through()


@pytest.fixture(scope="module")
def killed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = _job(task, sockets, tmp_path_factory.mktemp("killed"))
    job.hold(2 * SAMPLES + 13)
    with job.start() as run:
        run.until(job.held, "rollout 2 to be generated")
        os.kill(run.agent.pid, signal.SIGKILL)
        run.wait_until_gone()               # no rank outlives its agent, and no reward worker its rank
    assert len(job.left_sockets()) == 1     # nobody was there to tidy up
    job.let_go()
    job.run_through(after=1)
    assert job.left_sockets() == []         # the next start did
    return job


@pytest.mark.parametrize("rollout_id", range(4))
def test_every_token_logprob_and_the_data_cursor_are_the_same(undisturbed: Job, killed: Job, rollout_id: int) -> None:
    assert lineage(killed.run_dir)[rollout_id] == lineage(undisturbed.run_dir)[rollout_id]


@pytest.mark.parametrize("rollout_id", [1, 3])
def test_every_tensor_is_the_same(undisturbed: Job, killed: Job, rollout_id: int) -> None:
    assert differing(load_all(undisturbed.checkpoint(rollout_id)), load_all(killed.checkpoint(rollout_id))) == []


def test_engines_sampled_with_each_new_version_of_the_weights(undisturbed: Job, straight: Job) -> None:
    """The first rollout has the weights of the start, as the colocated run's has; the second other ones than the first."""
    assert lineage(undisturbed.run_dir)[0] == lineage(straight.run_dir)[0]
    assert ".output_layer.weight" in differing(load_all(undisturbed.checkpoint(1)), load_all(undisturbed.checkpoint(3)))
