"""Host memory: how much a node has left, and memory that is pinned once, in the background, and kept for the whole run.

Pinning is what makes the first swap of a run slow: pages are made, and locked, at a few GiB/s. A copy to or from pinned pages
then runs at the rate of the link.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
import weakref
from pathlib import Path
from typing import Iterator, Mapping, Optional

import torch

log = logging.getLogger(__name__)

CHUNK = 2**30
"""Pages are made and pinned in pieces of this size; one copy must not cross from one into the next."""
PIECE = 32 * 2**20
"""Bytes of one copy, 0.6 ms: what an engine or a trainer copies meanwhile waits for no more than one."""
THREADS = 4
DEADLINE_S = 600
"""For pages that somebody waits for: hundreds of GiB are made in that time."""
_ALIGN = 512


class HostMemory:
    """Pinned memory of `nbytes`, ready piece by piece as a thread makes it; `take` waits for its piece, and `waited_s` counts how long.

    Without `pin` it is ready at once, and its pages are made as they are first written. What was taken lasts as long as this object.
    """

    def __init__(self, nbytes: int, pin: bool):
        self.nbytes, self.pin, self.waited_s = _up(nbytes, CHUNK) if pin else nbytes, pin, 0.0
        self._taken = self._ready = 0
        self._error: Optional[Exception] = None
        self._device = torch.cuda.current_device() if pin else None
        self._news = threading.Condition()
        self._all = torch.empty(self.nbytes, dtype=torch.uint8)
        _ask_for_huge_pages(self._all)
        self._pinned: list[torch.Tensor] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False        # then it goes with the process
        if not pin:
            self._ready = self.nbytes
        elif self.nbytes:
            threading.Thread(target=self._make, name="pin host memory", daemon=True).start()

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that nobody else has. Waits until it is pinned; raises MemoryError when pinning has failed or there is not so much."""
        start, self._taken = self._taken, self._taken + aligned(nbytes)
        if start + nbytes > self.nbytes:
            raise MemoryError(f"{self._taken / 2**30:.1f} GiB of host memory are wanted, and {self.nbytes / 2**30:.1f} were planned")
        begun = time.perf_counter()
        with self._news:
            made = self._news.wait_for(lambda: self._error is not None or self._ready >= start + nbytes, DEADLINE_S)
        if not made:
            raise MemoryError(f"{self.nbytes / 2**30:.1f} GiB of host memory are not pinned within {DEADLINE_S} s: {self._ready / 2**30:.1f} are")
        self.waited_s += time.perf_counter() - begun
        if self._error is not None:
            raise MemoryError(f"{self.nbytes / 2**30:.1f} GiB of host memory can't be pinned: {self._error}") from self._error
        return self._all[start:start + nbytes]

    def rewind(self) -> None:
        """All that was taken may be taken again."""
        self._taken = 0

    def _make(self) -> None:
        begun = time.perf_counter()
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)         # a thread begins on the first
                _let_others_capture()
                torch.set_num_threads(THREADS)              # torchrun allows one, which makes 2 GiB of pages a second
            for start in range(0, self.nbytes, CHUNK):
                piece = self._all[start:start + CHUNK]
                piece.zero_()           # by all of torch's threads: makes the pages
                _pin(piece)
                self._pinned.append(piece)
                with self._news:
                    self._ready = start + len(piece)
                    self._news.notify_all()
        except Exception as e:          # told to whoever takes
            with self._news:
                self._error = e
                self._news.notify_all()
            return
        log.info("%.1f GiB of host memory pinned in %.1f s", self.nbytes / 2**30, time.perf_counter() - begun)

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
        """(from, to) of the parts of a taken tensor that are copied one after the other."""
        offset, a = (tensor.data_ptr() - self._all.data_ptr()) % CHUNK, 0
        while a < len(tensor):
            b = min(len(tensor), a + PIECE, a + CHUNK - (offset + a) % CHUNK)
            yield a, b
            a = b


def aligned(nbytes: int) -> int:
    """How much of the memory a piece of so many bytes takes."""
    return _up(nbytes, _ALIGN)


def _pin(piece: torch.Tensor) -> None:
    status = torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.nbytes, 0)
    if int(status) != 0:
        raise RuntimeError(f"cudaHostRegister: {status}")


def _unpin(pieces: list[torch.Tensor]) -> None:
    """Before their pages go back: CUDA would refuse to pin what comes to lie there next."""
    for piece in pieces:
        status = torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
        if int(status) != 0:
            log.warning("%.1f GiB of host memory stay pinned: cudaHostUnregister: %s", piece.nbytes / 2**30, status)
    pieces.clear()


def _let_others_capture() -> None:
    """What this thread asks of CUDA does not concern the CUDA graphs that another thread may capture meanwhile: without this, to pin memory
    then invalidates them."""
    thread_local = ctypes.c_int(1)      # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    status = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))
    if status != 0:
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: {status}")


def _ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Advice only: 512 times fewer page faults where the kernel heeds it."""
    start = _up(tensor.data_ptr(), mmap.PAGESIZE)
    length = tensor.data_ptr() + tensor.nbytes - start
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------- what a node has

def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that this process may still take: what the kernel calls available, or less where its cgroup (v2 or v1) allows less."""
    found = [v for v in (_meminfo(root).get("MemAvailable"), *_cgroup_left(root)) if v is not None]
    return min(found) if found else 0


def node_bytes(given_gib: Optional[float]) -> int:
    """Host memory that ranks of this node may take: what --host-memory-gib gives, or else what is available."""
    return available_bytes() if given_gib is None else int(given_gib * 2**30)


def _meminfo(root: Path) -> Mapping[str, int]:
    """Bytes by name."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest.split()[:1]}


def _cgroup_left(root: Path) -> Iterator[int]:
    """What each cgroup above this process still allows. Page cache counts as used there, but gives way: it is added again."""
    base = root / "sys/fs/cgroup"
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        own = []
    for _, controllers, path in own:
        if controllers == "":
            folder, names = base, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = folder / path.lstrip("/")
        for level in [inner, *inner.parents]:
            if level == folder.parent:
                break
            limit, used = _number(level / names[0]), _number(level / names[1])
            if limit is not None and used is not None and limit < 2**60:
                yield max(0, limit - used + _cache(level / "memory.stat", names[2]))


def _number(path: Path) -> Optional[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache(path: Path, name: str) -> int:
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name), 0)
    except OSError:
        return 0
