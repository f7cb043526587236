"""Memory that this process has freed and will soon need again."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3       # of glibc's mallopt(3)
KEPT, LARGEST = 64 << 20, 32 << 20
"""Bytes free at the heap's end that stay with the process, and the largest piece that comes from the heap (glibc allows no more)."""


def keep_freed_memory() -> None:
    """By default glibc gives freed messages of long samples back to the kernel, which clears every page anew for the next: a quarter of what
    such a message costs. The thresholds are those that it may come to by itself. Elsewhere than in glibc nothing changes."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        log.debug("no mallopt in this C library: freed memory goes back as it does by default")
        return
    libc.mallopt(_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, KEPT)
