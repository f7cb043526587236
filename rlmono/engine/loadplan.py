"""Where the parts of HF tensors lie in SGLang's parameters: found out at the first update, replayed as plain copies afterwards.

SGLang's `load_weights` walks its names and its loaders for every tensor, which takes longer than the copies themselves. It is run once
under a recorder that notes each copy into a parameter: which part of which tensor, to which place. A model for which anything else
happens to a parameter (a conversion, something derived from it, a copy that the recorder does not see) has no plan: it is loaded the
long way each time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Optional, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

Named = Sequence[tuple[str, torch.Tensor]]
Place = tuple[tuple[tuple[int, int], ...], torch.Tensor]
SMALL = 2**20
"""Copies of fewer bytes are put together in a few kernels; a larger one is worth its own launch."""


@dataclass
class _Entry:
    """One HF tensor: what it must be like, and its copies: (place in a parameter, size, stride and offset of the part; None where it is all)."""

    shape: torch.Size
    dtype: torch.dtype
    copies: list[tuple[torch.Tensor, Optional[tuple[tuple[int, ...], tuple[int, ...], int]]]] = field(default_factory=list)


class LoadPlan:
    """The copies of one model on this rank."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.why_not = ""
        """Why the model can't be planned; empty while it can."""
        self._entries: dict[str, _Entry] = {}
        self._filled: list[torch.Tensor] = []       # padding, constant for good
        self._parameters = list(model.parameters())
        self._pointers = self._addresses()
        self._places = self._storages()
        self._sealed = False

    def load(self, named: Named, long_way: Callable[[Named], None]) -> None:
        """Load full tensors with HF names; those that were not seen before by `long_way`, which is recorded."""
        if not self.why_not and (addresses := self._addresses()) != self._pointers:     # somebody gave the model other memory
            self._entries, self._filled, self._sealed = {}, [], False
            self._pointers, self._places = addresses, self._storages()
        if self.why_not or any(not t.is_contiguous() for _, t in named):
            long_way(named)
            return
        known = [(self._entries[n], t) for n, t in named if (e := self._entries.get(n)) and e.shape == t.shape and e.dtype == t.dtype]
        if len(known) == len(named):
            copy([pair for entry, t in known for pair in _pairs(entry, t)])
            return
        self._sealed = False
        with _Recorder(self, named) as recorder:
            long_way(named)
        if recorder.why_not:
            self._give_up(recorder.why_not)
        else:
            self._entries.update(recorder.entries)
            self._filled += recorder.filled

    def seal(self) -> None:
        """After all tensors of an update: a plan whose copies leave part of a parameter out is none."""
        if self.why_not or self._sealed or not self._entries:
            return
        self._sealed = True
        covered = dict.fromkeys(self._places, 0)
        places = [place for e in self._entries.values() for place, _ in e.copies] + self._filled
        for ptr, _, nbytes in {(p.untyped_storage().data_ptr(), p.data_ptr(), p.nbytes) for p in places}:
            covered[ptr] += nbytes
        sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        missing = [self._places[ptr] for ptr, n in covered.items() if n < sizes[ptr]]
        if missing:
            self._give_up(f"no copy was seen into a part of {missing[0]}")

    def places(self) -> Optional[dict[str, tuple[torch.Size, list[Place]]]]:
        """HF name -> (shape of the tensor, [(range in each dimension, the place that it goes to)]); None where there is no plan, or a part is no
        such block of its tensor."""
        if self.why_not or not self._sealed or self._addresses() != self._pointers:
            return None
        out = {}
        for name, e in self._entries.items():
            blocks = [(_block(e.shape, part), place) for place, part in e.copies]
            if any(block is None or tuple(b - a for a, b in block) != place.shape for block, place in blocks):
                return None
            out[name] = e.shape, blocks
        return out      # type: ignore[return-value]    # mypy does not see that no block is None

    def _give_up(self, why: str) -> None:
        self.why_not, self._entries, self._filled = why, {}, []
        log.info("weights are loaded the long way: %s", why)

    def _addresses(self) -> list[int]:
        """A walk over the model's names takes longer than many copies; this does not."""
        return [p.data_ptr() for p in self._parameters]

    def _storages(self) -> dict[int, str]:
        return {p.untyped_storage().data_ptr(): name for name, p in self.model.named_parameters()}


def _block(shape: torch.Size, part: Optional[tuple[tuple[int, ...], tuple[int, ...], int]]) -> Optional[tuple[tuple[int, int], ...]]:
    """The ranges of a contiguous tensor of this shape that a part (size, stride, offset) of it covers; None where it is no block."""
    if part is None:
        return tuple((0, n) for n in shape)
    (size, stride, offset), strides = part, torch.empty(shape, device="meta").stride()
    if len(size) != len(shape) or any(s != own and n > 1 for s, own, n in zip(stride, strides, size, strict=True)):
        return None
    starts = []
    for own in strides:
        first, offset = divmod(offset, own)
        starts.append(first)
    return tuple((first, first + n) for first, n in zip(starts, size, strict=True))


def _pairs(entry: _Entry, t: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for place, part in entry.copies:
        yield place, t if part is None else t.as_strided(part[0], part[1], t.storage_offset() + part[2])


def copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """(place, part) pairs of one shape."""
    together: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for place, part in pairs:
        if part.nbytes < SMALL and place.is_contiguous() and part.is_contiguous() and place.dtype == part.dtype:
            places, parts = together.setdefault(part.dtype, ([], []))
            places.append(place)
            parts.append(part)
        else:
            place.copy_(part, non_blocking=True)
    for places, parts in together.values():
        torch._foreach_copy_(places, parts)


_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class _Recorder(TorchDispatchMode):
    """Notes copies of the given tensors into the model's parameters, and whatever else happens to a parameter."""

    def __init__(self, plan: LoadPlan, named: Named):
        super().__init__()
        self.entries = {n: _Entry(t.shape, t.dtype) for n, t in named}
        self.filled: list[torch.Tensor] = []
        self.why_not = ""
        self._parameters = plan._places
        self._sources = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, n, t) for n, t in named)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None) -> Any:
        if not self.why_not and not getattr(func, "is_view", False):
            if func is torch.ops.aten.copy_.default and self._is_parameter(args[0]):
                self._note(args[0], args[1])
            elif func in _FILLS and self._is_parameter(args[0]):
                self._note_fill(args[0])
            elif (touched := self._first_parameter(args, kwargs or {})) is not None:
                self.why_not = f"{func} is done to {self._parameters[touched.untyped_storage().data_ptr()]}"
        return func(*args, **(kwargs or {}))

    def _first_parameter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[torch.Tensor]:
        return next((t for t in (*_tensors(args), *_tensors(kwargs.values())) if self._is_parameter(t)), None)

    def _is_parameter(self, t: Any) -> bool:
        return isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self._parameters

    def _note(self, place: torch.Tensor, part: torch.Tensor) -> None:
        source = next(((n, t) for a, b, n, t in self._sources if a <= part.data_ptr() < b), None)
        if source is None or part.shape != place.shape:
            self.why_not = f"{self._parameters[place.untyped_storage().data_ptr()]} is not filled from a part of an HF tensor"
            return
        name, t = source
        offset = (part.data_ptr() - t.data_ptr()) // t.element_size()
        whole = part.shape == t.shape and part.stride() == t.stride()
        self.entries[name].copies.append((place.detach(), None if whole else (tuple(part.shape), part.stride(), offset)))

    def _note_fill(self, place: torch.Tensor) -> None:
        """Padding that nobody else writes to stays as it is; a fill over what was copied is something else."""
        copied = [p for e in self.entries.values() for p, _ in e.copies]
        if any(_overlap(place, p) for p in copied):
            self.why_not = f"a part of {self._parameters[place.untyped_storage().data_ptr()]} is filled anew"
        elif place.numel():
            self.filled.append(place.detach())


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do their ranges of addresses meet?"""
    if not a.numel() or not b.numel():
        return False
    ends = [t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (a, b)]
    return a.data_ptr() < ends[1] and b.data_ptr() < ends[0]


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
