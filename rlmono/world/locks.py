"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class InUse(Exception):
    """A process that is alive holds the lock."""


def hold(path: Path) -> int:
    """Lock a file (made where it is missing) or a folder until this process ends or closes the returned descriptor. Raises InUse, OSError."""
    handle = os.open(path, os.O_RDONLY) if path.is_dir() else os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InUse(str(path)) from None
    except OSError as e:                # a file system without locks
        log.warning("%s can't be locked (%s): nothing stops a second run from using it", path, e.strerror)
    return handle
