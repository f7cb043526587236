"""Dynamic sampling and partial rollout on the real engine: killed twice, resumed, and in the end nothing differs from a run that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import differing, lineage, load_all
from jobs import COLOCATED, FUNCTIONS, Job

from rlmono.data.sample import Sample

SELECTING = (*COLOCATED, "--over-sampling-batch-size", 6, "--dynamic-sampling-filter-path", f"{FUNCTIONS}:keep", "--partial-rollout",
             "--partial-rollout-max-age", 2, "--rollout-max-response-len", 48, "--rollout-stop-token-ids", 5, 6, 7, "--log-samples", 1000)
"""Stops that are drawn often: responses of many lengths."""


def _job(task: Path, sockets: Path, folder: Path) -> Job:
    return Job(folder, task, sockets, SELECTING, rollouts=6, ranks=3, save=folder / "save")


@pytest.fixture(scope="module")
def undisturbed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(task, sockets, tmp_path_factory.mktemp("undisturbed")).run_through()


@pytest.fixture(scope="module")
def killed(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = _job(task, sockets, tmp_path_factory.mktemp("killed"))
    with job.start() as run:                # `kill -9` of a device rank in rollout 3, whose buffer is not yet on disk
        run.until(lambda: _rollouts(job) > 2, "rollout 2 to be generated")
        run.kill(rank=1)
        assert run.wait(120) == 128 + signal.SIGKILL, run.text()
        run.wait_until_gone()
    with job.start() as run:                # and of the launcher in rollout 5
        run.until(lambda: 4 in (lineage(job.run_dir) if _rollouts(job) else ()), "rollout 4 to be generated")
        assert job.resuming(1) in run.text()
        os.kill(run.agent.pid, signal.SIGKILL)
        run.wait_until_gone()
    return job.run_through(after=3)


def _rollouts(job: Job) -> int:
    hashes = job.run_dir / "hashes.jsonl"
    return hashes.read_text().count("\n") if hashes.exists() else 0


@pytest.mark.parametrize("rollout_id", range(6))
def test_every_token_and_the_buffer_are_the_same(undisturbed: Job, killed: Job, rollout_id: int) -> None:
    assert lineage(killed.run_dir)[rollout_id] == lineage(undisturbed.run_dir)[rollout_id]


@pytest.mark.parametrize("rollout_id", [1, 3, 5])
def test_every_tensor_is_the_same(undisturbed: Job, killed: Job, rollout_id: int) -> None:
    assert differing(load_all(undisturbed.checkpoint(rollout_id)), load_all(killed.checkpoint(rollout_id))) == []


def test_every_prompt_is_accounted_for(killed: Job) -> None:
    """None is trained on twice; each that was given out was trained on, dropped by the filter, or waits in the checkpoint."""
    trained = [g for r in range(6) for g in {row["group_index"] for row in _samples(killed, r)}]
    assert len(trained) == len(set(trained)) == 24
    state = json.loads((killed.checkpoint(5) / "state.json").read_text())["data"]
    waiting = state["buffer"]["groups"]
    assert waiting and not set(waiting) & set(trained)
    rows = [json.loads(line) for line in (killed.run_dir / "metrics.jsonl").read_text().splitlines()]
    dropped = sum(v for row in rows for k, v in row.items() if k.startswith("rollout/dynamic_filter/drop_"))
    assert dropped > 0 and state["cursor"]["groups"] == len(trained) + len(waiting) + dropped


def test_samples_went_on_with_newer_weights(killed: Job) -> None:
    """Samples in the last checkpoint's buffer carry the version of each token; and some that were trained on were begun earlier."""
    groups = msgspec.msgpack.decode((killed.checkpoint(5) / "buffer.msgpack").read_bytes(), type=list[list[Sample]])
    begun = [s for g in groups for s in g if s.response_length]
    assert begun and all(len(s.weight_versions or []) == len(s.rollout_log_probs or []) == s.response_length for s in begun)
    assert all(0 <= s.metadata["start_rollout_id"] <= 5 and s.tokens[-s.response_length:] for s in begun)
    rows = [json.loads(line) for line in (killed.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("rollout/old_tokens_ratio", 0) for row in rows) > 0
    cut = [s for s in begun if s.status == "aborted" and 0 < s.response_length < 48]
    assert cut or any(row.get("rollout/token_age_max", 0) > 0 for row in rows)


def _samples(job: Job, rollout_id: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "samples" / f"rollout_{rollout_id}.jsonl").read_text().splitlines()]
