"""The trainer's memory that comes and goes: whole storages, of which tensors all over Megatron are views.

A storage that is resized to nothing gives its memory back, and every view of it finds the new memory when it is resized again;
Megatron's own buffers are built to allow that. So nothing has to be allocated in a special way, and nothing has to know.
"""

from __future__ import annotations

from typing import Any, Iterable, Optional, Sequence

import torch

from rlmono.memory.host import HostMemory

FLAT = 4 * 2**30
"""Small tensors are laid side by side in storages of at most so many bytes: few, large copies."""
_ALIGN = 512


class Holding:
    """One tag's storages. `kept`: what they hold survives leaving, in host memory; `constant`: nobody writes to it, so it is copied out once;
    `together`: these are all the tensors that there are of their storages, so they may be laid side by side."""

    def __init__(self, name: str, tensors: Iterable[torch.Tensor], kept: bool, constant: bool = False, together: bool = False):
        self.name, self.kept, self.constant = name, kept, constant
        self.storages = _storages(flattened(list(tensors)) if together else tensors)
        self.sizes = [s.nbytes() for s in self.storages]
        self.here = True
        self._host: list[torch.Tensor] = []
        self._memory: Optional[HostMemory] = None
        self._copied = self._leaving = False        # host memory holds what the device had at the last `start_out`; that was since `come`
        self._stream: Any = None
        self._event: Any = None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def reserve(self, memory: HostMemory) -> None:
        """Host memory for a tag that is kept, before it leaves the first time."""
        if self.kept and not self._host:
            self._memory = memory
            self._host = [memory.take(n) for n in self.sizes]

    def start_out(self) -> int:
        """Begin to copy to the host, behind what the device does now; returns the bytes that travel."""
        if not self.kept or self._leaving or (self.constant and self._copied):
            return 0
        self.wait()
        self._copy(to_host=True)
        self._copied = self._leaving = True
        return self.nbytes

    def leave(self) -> int:
        """Give the memory back (to torch: `torch.cuda.empty_cache` hands it on), after the copy; returns the bytes that had not begun to travel."""
        moved = self.start_out()
        self.wait(on_host=True)
        for s in self.storages:
            s.resize_(0)
        self.here = False
        return moved

    def come(self) -> int:
        """Take memory again and begin to copy back; `wait` before the first use. Returns the bytes that travel.

        A copy begins as soon as its storage has memory: to get 45 GiB takes a tenth of the time of the copies.
        """
        self.here, self._leaving = True, False
        if not self.kept:
            for s, n in zip(self.storages, self.sizes, strict=True):
                s.resize_(n)
            return 0
        self._copy(to_host=False)
        return self.nbytes

    def wait(self, on_host: bool = False) -> None:
        """What the device does from now on comes after the copy that is under way; with `on_host` this thread waits for it too."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            if on_host:
                self._event.synchronize()
            self._event = None

    def _copy(self, to_host: bool) -> None:
        assert self._memory is not None, f"{self.name} has no host memory"
        device = self.storages[0].device if self.storages else torch.device("cpu")
        if device.type != "cuda":
            self._copy_pieces(to_host, None)
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        main = torch.cuda.current_stream(device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            self._copy_pieces(to_host, main)
            self._event = torch.cuda.Event()
            self._event.record()

    def _copy_pieces(self, to_host: bool, main: Any) -> None:
        """On the current stream; memory is taken on `main`, whose it stays."""
        assert self._memory is not None
        for storage, nbytes, host in zip(self.storages, self.sizes, self._host, strict=True):
            if not to_host:
                with torch.cuda.stream(main):
                    storage.resize_(nbytes)
            there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            for a, b in self._memory.pieces(host):
                (host if to_host else there)[a:b].copy_((there if to_host else host)[a:b], non_blocking=True)


def flattened(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors; those that have a small storage for themselves now share large ones, with the same values."""
    alone = {}
    users: dict[int, int] = {}
    for t in {id(t): t for t in tensors}.values():
        users[t.untyped_storage().data_ptr()] = users.get(t.untyped_storage().data_ptr(), 0) + 1
    for t in tensors:
        s = t.untyped_storage()
        if 0 < s.nbytes() == t.nbytes < FLAT and t.is_contiguous() and users[s.data_ptr()] == 1:
            alone[id(t)] = t
    batch: list[torch.Tensor] = []
    size = 0
    for t in alone.values():
        if batch and size + t.nbytes > FLAT:
            _lay_together(batch, size)
            batch, size = [], 0
        batch.append(t)
        size += -(-t.nbytes // _ALIGN) * _ALIGN
    if len(batch) > 1:
        _lay_together(batch, size)
    return list(tensors)


@torch.no_grad()
def _lay_together(tensors: Sequence[torch.Tensor], nbytes: int) -> None:
    flat = torch.empty(nbytes, dtype=torch.uint8, device=tensors[0].device)
    start = 0
    for t in tensors:
        place = flat[start:start + t.nbytes].view(t.dtype).view(t.shape)
        place.copy_(t.data)
        t.data = place
        start += -(-t.nbytes // _ALIGN) * _ALIGN


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.nbytes}
    return list(found.values())
