"""Every layout computes what one rank computes, for dense models, experts and latent attention; see worlds/layouts.py.

The default run takes each layout per sample without recompute and per token with it; `--slow` takes all four, four ranks, checkpoints from every
layout to every other (worlds/checkpoints.py), and the engine after an update from every layout (worlds/engine_layouts.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchrun import ROOT, WORLDS, case_names, run_world

SCRIPT, CHECKPOINTS, ENGINE = WORLDS / "layouts.py", WORLDS / "checkpoints.py", WORLDS / "engine_layouts.py"
CASES = case_names(SCRIPT)
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    subprocess.run([sys.executable, str(WORLDS / "make_families.py"), str(made)], check=True, timeout=300, env=ENVIRON)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_world(SCRIPT, 1, str(folder), timeout_s=600)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_world(SCRIPT, 2, str(folder), timeout_s=900)


@pytest.fixture(scope="module")
def all_of_two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_world(SCRIPT, 2, str(folder), "all", timeout_s=1800)


@pytest.fixture(scope="module")
def four(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_world(SCRIPT, 4, str(folder), "all", timeout_s=3600)


@pytest.mark.parametrize("name", CASES)
def test_one_rank(one: dict[str, Any], name: str) -> None:
    one[name].check()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(two: dict[str, Any], name: str) -> None:
    two[name].check()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_in_every_way(all_of_two: dict[str, Any], name: str) -> None:
    all_of_two[name].check()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks(four: dict[str, Any], name: str) -> None:
    four[name].check()


# ---------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def moved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One rank saves; two save and load both, then four; one loads all."""
    store = tmp_path_factory.mktemp("checkpoints")
    return [run_world(CHECKPOINTS, ranks, str(folder), str(store), timeout_s=1200) for ranks in (1, 2, 4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", case_names(CHECKPOINTS))
def test_a_checkpoint_of_any_layout_loads_on_every_other(moved: list[dict[str, Any]], name: str) -> None:
    for world in moved:
        world[name].check()


# ---------------------------------------------------------------- the engine

@pytest.mark.slow
def test_changed_values_reach_the_engine(folder: Path) -> None:
    """Rotary base and percentage, and norm epsilon: trainer and engine agree, and are others than without."""
    run_world(ENGINE, 1, str(folder), "glm4_moe", "rotary_base=300", "rotary_percent=0.25", "norm_epsilon=0.01",
              timeout_s=300)["case_every_layout"].check()


@pytest.mark.slow
def test_the_engine_agrees_after_an_update_from_every_layout(folder: Path) -> None:
    """With the trainer, and with transformers on the trainer's export; SGLang has no latent attention on a CPU."""
    worlds = [(2, "qwen3"), (2, "qwen3_moe"), (2, "glm4_moe"), (4, "qwen3"), (4, "glm4_moe"), (1, "qwen3", "rotary_base=300", "norm_epsilon=0.01")]
    for ranks, *arguments in worlds:
        run_world(ENGINE, ranks, str(folder), *arguments, timeout_s=900)["case_every_layout"].check()
    done = subprocess.run([sys.executable, str(WORLDS / "score.py"), str(folder)], stdout=subprocess.PIPE, check=True, timeout=600, env=ENVIRON)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 6 + 7 + 7 + 7 + 9 + 1 and max(found.values()) <= 1e-5, found
