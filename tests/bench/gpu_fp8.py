"""Rollouts in fp8 against bf16: gpu_fp8.py SECTION OUT WORK. Writes OUT/SECTION.json. Runs of `rlmono train` as a user starts them:

    fp8_speed       a larger shape, generated only (--debug-rollout-only), from the bf16 folder and from what `rlmono convert bf16-to-fp8` makes of it
    fp8_accuracy    a smaller one, trained too: the mean |Δlogprob| of sampled tokens between engine and trainer, with engines in bf16 and in fp8
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu

ON_GPU = gpu.has_gpu()
SHAPES = {"fp8_speed": "qwen3-8b", "fp8_accuracy": "qwen3-0.6b"} if ON_GPU else dict.fromkeys(gpu.FP8, "tiny")
LIMIT_S = 400
"""For a run: where DeepGEMM's cache is cold, its kernels are compiled for minutes."""


def main() -> int:
    section, out, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shape = SHAPES[section]
    bf16, fp8 = make(shape, work)
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, folder in (("bf16", bf16), ("fp8", fp8)):
        if folder is not None:
            rows[kind] = run(folder, work / f"run-{section}-{kind}", section)
            (out / f"{section}.json").write_text(json.dumps((accuracy if section == "fp8_accuracy" else speed)(shape, rows), indent=1))
    return 0


def make(shape: str, work: Path) -> tuple[Path, Path | None]:
    """(bf16 folder, fp8 folder); without a GPU engines have no fp8, and there is none."""
    made = work / shape
    subprocess.run([sys.executable, str(gpu.BENCH / "random_model.py"), shape, str(made)], check=True)
    convert = [sys.executable, "-m", "rlmono", "convert", "bf16-to-fp8", "--model-dir", str(made / "model"), "--save-dir", str(made / "fp8")]
    subprocess.run([*convert, "--strategy", "block", "--block-size", "128", "128", "--max-workers", str(min(16, os.cpu_count() or 1))], check=True)
    return made / "model", made / "fp8" if ON_GPU else None


def run(model: Path, folder: Path, section: str) -> list[dict[str, Any]]:
    """Metrics of the run's rollouts."""
    more = ["--debug-rollout-only"] if section == "fp8_speed" else ["--check-weight-update-equal", "--lr", "1e-6"]
    command = gpu.train_command(model, folder, 512 if ON_GPU else 8, ON_GPU, 1, "0.5", *more)
    print(" ".join(command), flush=True)
    # The fast warm-up compiles DeepGEMM's kernels for fewer batch sizes before the first request.
    subprocess.run(command, check=True, timeout=LIMIT_S, env=os.environ | {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def accuracy(shape: str, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    name = "train/train_rollout_logprob_abs_diff"
    return [gpu.figure(f"rollout in {kind}, {shape}: mean |Δlogprob| between engine and trainer",
                       max(r[name] for r in found if name in r), "", "", f"the trainer in bf16, {gpu.ROLLOUTS} rollouts, the largest",
                       "updates compared bit for bit") for kind, found in rows.items()]


def speed(shape: str, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rates = {kind: max(r["perf/tokens_per_gpu_per_sec"] for r in found if "perf/tokens_per_gpu_per_sec" in r) for kind, found in rows.items()}
    return [gpu.figure(f"rollout in {kind}, {shape}: generated", rate, "tokens/s", "", "256 samples of 512 tokens, the best of three rollouts",
                       f"{rate / rates['bf16']:.2f} of bf16") for kind, rate in rates.items()]


if __name__ == "__main__":
    sys.exit(main())
