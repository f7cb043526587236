"""Rollouts in fp8 against bf16: gpu_fp8.py OUT WORK. Writes OUT/fp8.json. Runs of `rlmono train` as a user starts them:

    speed       a larger shape, generated only (--debug-rollout-only), from the bf16 folder and from what `rlmono convert bf16-to-fp8` makes of it
    accuracy    a smaller one, trained too: the mean |Δlogprob| of sampled tokens between engine and trainer, with engines in bf16 and in fp8
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu

ON_GPU = gpu.has_gpu()
GENERATED, TRAINED = ("qwen3-8b", "qwen3-0.6b") if ON_GPU else ("tiny", "tiny")


def main() -> int:
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    figures: list[dict[str, Any]] = []
    for shape, what in ((TRAINED, "accuracy"), (GENERATED, "speed")):
        bf16, fp8 = make(shape, work)
        rows: dict[str, list[dict[str, Any]]] = {}
        for kind, folder in (("bf16", bf16), ("fp8", fp8)):
            if folder is not None:
                rows[kind] = run(folder, work / f"run-{what}-{kind}", what)
                made = figures + (accuracy if what == "accuracy" else speed)(shape, rows)
                (out / "fp8.json").write_text(json.dumps(made, indent=1))
        figures = made
        shutil.rmtree(bf16.parent)
    return 0


def make(shape: str, work: Path) -> tuple[Path, Path | None]:
    """(bf16 folder, fp8 folder); without a GPU engines have no fp8, and there is none."""
    made = work / f"fp8-{shape}"
    subprocess.run([sys.executable, str(gpu.BENCH / "random_model.py"), shape, str(made)], check=True)
    convert = [sys.executable, "-m", "rlmono", "convert", "bf16-to-fp8", "--model-dir", str(made / "model"), "--save-dir", str(made / "fp8")]
    subprocess.run([*convert, "--strategy", "block", "--block-size", "128", "128", "--max-workers", "8"], check=True)
    return made / "model", made / "fp8" if ON_GPU else None


def run(model: Path, folder: Path, what: str) -> list[dict[str, Any]]:
    """Metrics of the run's rollouts."""
    more = ["--debug-rollout-only"] if what == "speed" else ["--check-weight-update-equal", "--lr", "1e-6"]
    command = gpu.train_command(model, folder, 512 if ON_GPU else 8, ON_GPU, 1, "0.5", *more)
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=300)
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
