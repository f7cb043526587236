"""A disk that can be filled."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
from processes import Run


class Disk:
    """A folder on a disk that can be filled: a tmpfs where this user may mount one, else by the ranks' own limit on file sizes."""

    def __init__(self, folder: Path):
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, run: Run) -> None:
        if not self.mounted:
            for rank in (0, 1):
                resource.prlimit(run.pid(rank), resource.RLIMIT_FSIZE, (2**16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with pytest.raises(OSError, match="No space left"), open(self.folder / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(2**16))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
