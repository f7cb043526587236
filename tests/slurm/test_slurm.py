"""slurm/train.sbatch on two nodes of a real Slurm: it runs over both, and when its time is nearly over it goes back into the queue and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Slurm

from rlmono import quickstart

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS = 5


@pytest.fixture(scope="module")
def finished(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that got the signal after its first checkpoint, and ended."""
    folder = tmp_path_factory.mktemp("slurm")
    quickstart.make(folder / "data", seed=5)
    log, run_dir = folder / "log", folder / "run"
    flags = ["--hf-checkpoint", folder / "data/model", "--prompt-data", folder / "data/train.jsonl", "--input-key", "messages", "--label-key",
             "label", "--apply-chat-template", "--custom-rm-path", "rlmono.quickstart.reward", "--rollout-batch-size", 4, "--n-samples-per-prompt", 4,
             "--rollout-max-response-len", 12, "--use-dynamic-batch-size", "--max-tokens-per-gpu", 1024, "--deterministic", "--device", "cpu",
             "--num-rollout", ROLLOUTS, "--save-interval", 1, "--colocate", "--actor-num-nodes", 2, "--actor-num-gpus-per-node", 1]
    submitted = slurm.run("sbatch", "--parsable", "--chdir", str(ROOT), "--nodes", "2", "--gpus-per-node", "0", "--output", str(log),
                          str(ROOT / "slurm/train.sbatch"), *map(str, flags),
                          RLMONO_RUN_DIR=str(run_dir), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    job = submitted.strip().partition(";")[0]

    def text() -> str:
        return log.read_text(errors="replace") if log.exists() else ""

    first = run_dir / "checkpoints" / "rollout_0000001"
    slurm.until(lambda: first.exists() or slurm.state(job) in ("FAILED", "COMPLETED"), "the second checkpoint", 300, text)
    assert slurm.state(job) == "RUNNING", text()
    slurm.run("scancel", "--batch", "--signal=USR1", job)       # what Slurm does before the time limit
    slurm.until(lambda: "back into the queue" in text() and slurm.state(job) in ("PENDING", "COMPLETING"), "the job to be requeued", 60, text)
    slurm.until(lambda: slurm.state(job) == "PENDING", "the job to wait", 60, text)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")        # it would wait two minutes
    slurm.until(lambda: slurm.state(job) in ("FAILED", "COMPLETED"), "the end of the job", 300, text)
    assert slurm.state(job) == "COMPLETED", text()
    return folder


def test_the_second_attempt_resumes(finished: Path) -> None:
    assert "resuming from" in (finished / "log").read_text()


def test_it_runs_on_both_nodes(finished: Path) -> None:
    assert "2 node(s) x 2 ranks" in (finished / "log").read_text()


def test_every_rollout_was_trained_once(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["rollout_id"] for r in rows if "train/loss" in r] == list(range(ROLLOUTS))


def test_the_last_checkpoint_is_there(finished: Path) -> None:
    assert (finished / "run" / "checkpoints" / f"rollout_{ROLLOUTS - 1:07d}" / "manifest.json").is_file()
