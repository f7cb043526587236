"""Two nodes that over-sample and abort by the clock, as a run does that is not deterministic: one is lost, both start again, and no prompt
is lost or trained on twice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jobs import FUNCTIONS, Job
from processes import Run, free_port

from rlmono.data.sample import ABORTED, Sample

ABORTING = ("--colocate", "--actor-num-nodes", 2, "--actor-num-gpus-per-node", 1, "--heartbeat-timeout-s", 10, "--no-deterministic",
            "--over-sampling-batch-size", 12, "--dynamic-sampling-filter-path", f"{FUNCTIONS}:keep", "--partial-rollout",
            "--mask-offpolicy-in-partial-rollout", "--sglang-server-concurrency", 20, "--rollout-max-response-len", 300,
            "--rollout-stop-token-ids", 5, 6, "--max-tokens-per-gpu", 4096, "--log-samples", 1000)
"""48 requests an engine, and room for 20: some are aborted in their middle, some before they were sent."""


@pytest.fixture(scope="module")
def two_nodes(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("aborting")
    job = Job(folder, task, sockets, ABORTING, rollouts=4, ranks=2, save=folder / "save")
    first, second = _start(job)
    with first, second:
        first.until(lambda: (job.run_dir / "samples" / "rollout_2.jsonl").exists(), "rollout 2 to be generated")
        os.kill(second.agent.pid, signal.SIGKILL)
        assert first.wait(120) != 0
        first.wait_until_gone()
        second.wait_until_gone()
    first, second = _start(job)
    with first, second:
        assert first.wait() == 0, first.text() + second.text()
        assert second.wait() == 0, first.text() + second.text()
        assert job.resuming(1) in first.text()
    return job


def _start(job: Job) -> tuple[Run, Run]:
    port = free_port()
    return job.start(node=(0, port)), job.start(node=(1, port))


def _metrics(job: Job) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "rollout/submitted_groups" in row]


def _samples(job: Job, rollout_id: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "samples" / f"rollout_{rollout_id}.jsonl").read_text().splitlines()]


def test_every_prompt_is_accounted_for(two_nodes: Job) -> None:
    rows = _metrics(two_nodes)
    trained = [g for r in range(4) for g in {row["group_index"] for row in _samples(two_nodes, r)}]
    state = json.loads((two_nodes.checkpoint(3) / "state.json").read_text())["data"]
    waiting = state["buffer"]["groups"]
    dropped = sum(v for row in rows for k, v in row.items() if k.startswith("rollout/dynamic_filter/drop_"))
    assert [row["rollout_id"] for row in rows] == [0, 1, 2, 3]
    assert len(trained) == len(set(trained)) == 16 and not set(waiting) & set(trained) and len(set(waiting)) == len(waiting)
    assert state["cursor"]["groups"] == len(trained) + len(waiting) + dropped


def test_samples_are_aborted_in_their_middle_and_go_on(two_nodes: Job) -> None:
    groups = msgspec.msgpack.decode((two_nodes.checkpoint(3) / "buffer.msgpack").read_bytes(), type=list[list[Sample]])
    aborted = [s for g in groups for s in g if s.status == ABORTED]
    assert any(0 < s.response_length < 300 for s in aborted)
    for s in aborted:
        assert s.reward is None and len(s.weight_versions or []) == len(s.rollout_log_probs or []) == s.response_length
    rows = _metrics(two_nodes)
    assert all(row["rollout/aborted_groups"] > 0 for row in rows) and any(row["rollout/old_tokens_ratio"] > 0 for row in rows)
    # The trainer and the engine agree on what these weights have sampled; tokens of older weights are masked.
    assert all(row["train/train_rollout_logprob_abs_diff"] < 1e-4 for row in rows)


def test_all_tokens_are_counted(two_nodes: Job) -> None:
    for row in _metrics(two_nodes):
        kept = row["rollout/generated_tokens"] - row["rollout/dropped_tokens"] - row["rollout/aborted_tokens"]
        new = row["rollout/response_len/mean"] * row["rollout/samples"] * (1 - row["rollout/old_tokens_ratio"])
        assert kept == pytest.approx(new)
