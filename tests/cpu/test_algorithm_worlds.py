"""Every algorithm through the trainer: on one rank against naive references, on two against one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import WORLDS, Result, case_names, run_world

ONE, TWO = WORLDS / "algorithms_one.py", WORLDS / "algorithms_two.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithms")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Result]:
    return run_world(ONE, 1, str(folder), timeout_s=600)


@pytest.fixture(scope="module")
def two(one: dict[str, Result], folder: Path) -> dict[str, Result]:
    one["case_packings"].check()
    return run_world(TWO, 2, str(folder), timeout_s=600)


@pytest.mark.parametrize("name", case_names(ONE))
def test_on_one_rank(one: dict[str, Result], name: str) -> None:
    one[name].check()


@pytest.mark.slow
@pytest.mark.parametrize("name", case_names(TWO))
def test_on_two_ranks(two: dict[str, Result], name: str) -> None:
    two[name].check()
