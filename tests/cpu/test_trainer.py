"""The trainer's numbers on one rank and on two; the cases are in worlds/trainer_one.py and worlds/trainer_two.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import WORLDS, Result, case_names, run_world

ONE, TWO = WORLDS / "trainer_one.py", WORLDS / "trainer_two.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Result]:
    return run_world(ONE, 1, str(folder), timeout_s=900)


@pytest.fixture(scope="module")
def two_ranks(folder: Path, one_rank: dict[str, Result]) -> dict[str, Result]:
    return run_world(TWO, 2, str(folder), timeout_s=900)


@pytest.mark.parametrize("name", case_names(ONE))
def test_one_rank(one_rank: dict[str, Result], name: str) -> None:
    one_rank[name].check()


@pytest.mark.parametrize("name", case_names(TWO))
def test_two_ranks(two_ranks: dict[str, Result], name: str) -> None:
    two_ranks[name].check()
