"""Two nodes on loopback, each with an agent and a host rank of its own: one host is killed, the other node ends by itself,
and both started again go on; in the end nothing differs from a run on one node."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from checkpoints import differing, lineage, load_all
from jobs import SAMPLES, Job
from processes import Run, free_port

PLACEMENT = ("--colocate", "--actor-num-nodes", 2, "--actor-num-gpus-per-node", 1, "--heartbeat-timeout-s", 10)


def _start(job: Job) -> tuple[Run, Run]:
    port = free_port()
    return job.start(node=(0, port)), job.start(node=(1, port))


@pytest.fixture(scope="module")
def two_nodes(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("nodes")
    job = Job(folder, task, sockets, PLACEMENT, rollouts=4, ranks=2, save=folder / "save")
    _lose_a_node(job)
    first, second = _start(job)
    with first, second:
        assert first.wait() == 0, first.text() + second.text()
        assert second.wait() == 0, first.text() + second.text()
        assert job.resuming(1) in first.text()
        first.wait_until_gone()
        second.wait_until_gone()
    return job


def _lose_a_node(job: Job) -> None:
    """`kill -9` of the second node's agent and, with it, of its ranks, in the middle of rollout 2."""
    job.hold(2 * SAMPLES + 13)
    first, second = _start(job)
    with first, second:
        first.until(job.held, "rollout 2 to be generated")
        os.kill(second.agent.pid, signal.SIGKILL)
        assert first.wait(120) == 1, first.text()
        first.wait_until_gone()
        second.wait_until_gone()
    told = [line for line in first.text().splitlines() if line.startswith("rlmono: ")]
    assert any("host rank" in line and "3" in line and ("is gone" in line or "silent for 10 s" in line) for line in told), first.text()
    job.let_go()


@pytest.mark.parametrize("rollout_id", range(4))
def test_two_nodes_sample_what_one_does(straight: Job, two_nodes: Job, rollout_id: int) -> None:
    assert lineage(two_nodes.run_dir)[rollout_id] == lineage(straight.run_dir)[rollout_id]


@pytest.mark.parametrize("rollout_id", [1, 3])
def test_every_tensor_is_what_it_is_on_one_node(straight: Job, two_nodes: Job, rollout_id: int) -> None:
    expected, found = load_all(straight.checkpoint(rollout_id)), load_all(two_nodes.checkpoint(rollout_id))
    names = [n for n in differing(expected, found) if not n.startswith("common.")]
    assert names == []


def test_the_grid_is_printed(two_nodes: Job) -> None:
    text = (two_nodes.folder / "console-0").read_text()
    assert "2 node(s) x 2 ranks; 2 train (dp 2 x tp 1 x pp 1 x cp 1); 2 engine(s) of 1" in text
    assert "rank 3    node 1   host\n" in text


def test_no_socket_is_left(two_nodes: Job) -> None:
    assert two_nodes.left_sockets() == []
