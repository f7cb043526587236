"""Every layout computes what one rank computes, for dense models, experts and latent attention; see worlds/layouts.py.

The default run takes each layout per sample without recompute and per token with it; `--slow` takes all four.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchrun import ROOT, WORLDS, case_names, run_world

SCRIPT = WORLDS / "layouts.py"
CASES = case_names(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    subprocess.run([sys.executable, str(WORLDS / "make_families.py"), str(made)], check=True, timeout=300,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_world(SCRIPT, 1, str(folder), timeout_s=600)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_world(SCRIPT, 2, str(folder), timeout_s=900)


@pytest.fixture(scope="module")
def four(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_world(SCRIPT, 4, str(folder), "all", timeout_s=1800)


@pytest.mark.parametrize("name", CASES)
def test_one_rank(one: dict[str, Any], name: str) -> None:
    one[name].check()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(two: dict[str, Any], name: str) -> None:
    two[name].check()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks(four: dict[str, Any], name: str) -> None:
    four[name].check()
