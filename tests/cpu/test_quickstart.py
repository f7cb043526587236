"""The quickstart end to end: fine-tuning, then GRPO, which learns from true rewards and not from shuffled ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlmono import quickstart
from rlmono.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SEED = 1


def launch(folder: Path, recipe: str, *options: str) -> str:
    """Run a recipe of configs/recipes to its end; what its console shows."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RLMONO_")}
    environ = inherited | {"QUICKSTART": str(folder), "CALCULATOR": str(folder), "RLMONO_VENV": sys.prefix}
    command = [ROOT / "launch" / "run.sh", "--env-file", ROOT / "configs" / "recipes" / recipe, *options]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the fine-tuned model."""
    folder = tmp_path_factory.mktemp("quickstart")
    quickstart.make(folder / "data", SEED)
    launch(folder, "quickstart-sft.env")
    return folder


def test_grpo_learns(warm: Path) -> None:
    console = launch(warm, "quickstart-grpo.env")
    accuracies = quickstart.accuracies(warm / "grpo")
    assert accuracies[0] < 0.5 and accuracies[-1] >= 0.9
    rows = read_metrics(warm / "grpo")
    assert min(row["eval/heldout/samples"] for row in rows if "eval/heldout" in row) >= 4 * 200
    assert max(row["train/train_rollout_logprob_abs_diff_max"] for row in rows if "train/loss" in row) < 1e-4
    report = warm / "grpo" / "report" / "index.html"
    assert str(report) in console and "data:image/png" in report.read_text()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (warm / "grpo" / "model").iterdir()}


def test_shuffled_labels_teach_nothing(warm: Path) -> None:
    launch(warm, "quickstart-grpo.env", "--prompt-data", str(warm / "data" / "shuffled.jsonl"), "--run-dir", str(warm / "control"),
           "--save", str(warm / "control" / "checkpoints"), "--save-hf", str(warm / "control" / "model"))
    assert quickstart.accuracies(warm / "control")[-1] < 0.6
