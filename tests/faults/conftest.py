"""The task of all fault tests, and a run of it that nothing happens to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import COLOCATED, Job

from rlmono import quickstart

ALWAYS = "test_one_node.py"
"""Runs with the other tests too: a resume that is not exact must not stay unseen."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name != ALWAYS:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, and its prompts."""
    folder = tmp_path_factory.mktemp("task") / "data"
    quickstart.make(folder, seed=5)
    return folder


@pytest.fixture(scope="session")
def sockets() -> Iterator[Path]:
    """A folder with a short path: unix sockets ask for one."""
    folder = Path(tempfile.mkdtemp(prefix="flt"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def straight(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Six rollouts on two colocated device ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("straight")
    return Job(folder, task, sockets, COLOCATED, rollouts=6, ranks=3, save=folder / "save").run_through()
