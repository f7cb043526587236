"""Each rank writes to a log file of its own; the console belongs to the controller."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple, TextIO


class RankLog(NamedTuple):
    """Where this process writes now, and the console that it was started on."""

    path: Path
    out: TextIO
    """The original stdout: for the controller's progress."""
    err: TextIO
    """The original stderr: for an error that the user must see."""


def rank_log(run_dir: Path, attempt_name: str, rank: int) -> RankLog:
    """Sends all output of this process to `<run_dir>/logs/<attempt_name>/rank-<rank>.log`.

    File descriptors 1 and 2 are replaced, so the output of C++ and of child processes lands there too; an
    attempt that writes a second time appends. Logging is set up with time, rank and level, on stderr.
    """
    path = Path(run_dir) / "logs" / attempt_name / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = _duplicate(1), _duplicate(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, force=True,
        format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s",
    )
    faulthandler.enable()
    return RankLog(path, out, err)


def _duplicate(descriptor: int) -> TextIO:
    """A text stream on what `descriptor` points to now; not inherited by child processes."""
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8", errors="replace")
