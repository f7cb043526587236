"""A Slurm of two nodes on this machine, for as long as the tests run. Needs root, and Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Slurm

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    reason = "" if os.getuid() == 0 else "Slurm's daemons need root"
    if missing:
        reason = f"no {', '.join(missing)} here (Debian: apt install slurm-wlm munge)"
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slurm)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)                 # munge, which is another user, has its socket here
    os.chown(folder, pwd.getpwnam("munge").pw_uid, -1)
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
