"""Trainer to engine without full tensors between: from where a number lies in Megatron's parameter to where it lies in SGLang's.

An update through HF tensors copies what is cut or interleaved twice, and walks hundreds of names. Which part of which tensor goes where is
the same each time; the engine knows it after the first update (its load plan), and then it is worked out once:

    box     a part of an HF tensor: a range in each dimension
    source  a rank's box of an HF tensor, and the view of its Megatron parameter that holds those numbers
    place   a box, and the view of an engine's parameter that wants those numbers
    copy    where a source and a place meet

What this rank's trainer holds itself is copied. What lies on another tensor-parallel rank travels in buckets, gathered while the one before is
copied. Where layers or experts are dealt over ranks (pipeline and expert parallel), weights go through HF tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from rlmono.models.mapping import Tensor

BUCKET_BYTES = 256 * 2**20
Box = tuple[tuple[int, int], ...]
Pair = tuple[torch.Tensor, torch.Tensor]
Place = tuple[Box, torch.Tensor]
Places = Mapping[str, tuple[torch.Size, Sequence[Place]]]
"""HF name -> (shape of the HF tensor, places in this rank's engine)."""


@dataclass(frozen=True)
class Sources:
    """What this rank's trainer holds, by Megatron's names; `group_of` is the tensor-parallel group of a tensor's ranks."""

    held: Mapping[str, torch.Tensor]
    tensors: Sequence[Tensor]
    group_of: Callable[[Tensor], dist.ProcessGroup]


class Direct:
    """The copies of an update, worked out. Building it is collective over the default group; see `plan`."""

    def __init__(self, sources: Sources, places: Places, travels: frozenset[str]):
        self._held = [(p, p.detach()) for p in sources.held.values()]
        here = [t for t in sources.tensors if t.name not in travels]
        self._local = [pair for t in here for pair in _shard_pairs(t, sources.held[t.name].detach(), *_rank_and_size(t, sources), places)]
        self._buckets = [_Bucket(b, sources, places) for b in _buckets([t for t in sources.tensors if t.name in travels], sources)]

    @property
    def holds(self) -> bool:
        """False when a parameter of the trainer is another tensor now."""
        return all(p.data_ptr() == known.data_ptr() for p, known in self._held)

    def update(self, fill: Callable[[Sequence[Pair]], None]) -> None:
        """Collective over tensor-parallel ranks. `fill` is the engine's: it copies (place, part) pairs."""
        started = [b.start() for b in self._buckets[:1]]
        fill(self._local)
        for i, bucket in enumerate(self._buckets):
            started += [b.start() for b in self._buckets[i + 1:i + 2]]
            work, flat = started[i]
            work.wait()
            fill(bucket.pairs(flat))
            started[i] = (work, flat[:0])       # let go of the bucket


def plan(sources: Optional[Sources], places: Optional[Places]) -> Optional[Direct]:
    """Collective over the default group. None, on every rank, when a rank has no sources or no places, or numbers would come from nowhere."""
    mine: Optional[frozenset[str]] = None
    if sources is not None and places is not None and _same_names(sources, places):
        mine = frozenset(t.name for t in sources.tensors if _is_far(t, sources, places))
    everyone: list[Optional[frozenset[str]]] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if sources is None or places is None or any(names is None for names in everyone):
        return None
    return Direct(sources, places, frozenset().union(*(names for names in everyone if names is not None)))


def _same_names(sources: Sources, places: Places) -> bool:
    return all(t.name in sources.held for t in sources.tensors) and set(places) == {n for t in sources.tensors for n in t.hf_names}


# ---------------------------------------------------------------- boxes

def box_of(shape: Sequence[int], part: Sequence[slice]) -> Box:
    """The part of a tensor of this shape that the slices name; () is all of it."""
    ranges = [s.indices(n)[:2] for s, n in zip(part, shape, strict=False)]
    return tuple(ranges) + tuple((0, n) for n in shape[len(ranges):])


def meet(a: Box, b: Box) -> Optional[Box]:
    """What two boxes of one tensor have in common."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _cut(view: torch.Tensor, box: Box, part: Box) -> torch.Tensor:
    """The part of a view that holds a box."""
    return view[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, box, strict=True))]


def _pairs(view: torch.Tensor, box: Box, places: Sequence[Place]) -> Iterator[Pair]:
    """Copies from a source to the places. A view with one dimension more than the box has its rows in groups: [groups, rows, …]."""
    for wanted, place in places:
        if (common := meet(box, wanted)) is None:
            continue
        if view.dim() == len(box):
            yield _cut(place, wanted, common), _cut(view, box, common)
            continue
        rows, (start, stop) = view.shape[1], (common[0][0] - box[0][0], common[0][1] - box[0][0])
        if start % rows == stop % rows == 0:
            grouped = ((start // rows, stop // rows), (0, rows), *common[1:])
            yield _cut(place, wanted, common).unflatten(0, (-1, rows)), _cut(view, ((0, view.shape[0]), (0, rows), *box[1:]), grouped)
        else:                                   # an engine's rank has part of a group
            for g in range(start // rows, -(-stop // rows)):
                first = box[0][0] + g * rows
                yield from _pairs(view[g], ((first, first + rows), *box[1:]), [(wanted, place)])


# ---------------------------------------------------------------- sources

def _rank_and_size(t: Tensor, sources: Sources) -> tuple[int, int]:
    group = sources.group_of(t)
    return dist.get_rank(group), group.size()


def _boxes(t: Tensor, places: Places, rank: int, size: int) -> list[Box]:
    """What rank `rank` holds of each of the tensor's HF tensors."""
    return [box_of(shape := places[name][0], t.part(shape, rank, size)) for name in t.hf_names]


def _views(t: Tensor, shard: torch.Tensor, boxes: Sequence[Box]) -> list[torch.Tensor]:
    """The shard's numbers for each box; a vocabulary's padding is left out."""
    return [v.narrow(0, 0, box[0][1] - box[0][0]) if t.vocabulary else v for v, box in zip(t.hf_views(shard), boxes, strict=True)]


def _is_far(t: Tensor, sources: Sources, places: Places) -> bool:
    """Whether this rank's engine wants something of the tensor that its trainer does not hold."""
    boxes = _boxes(t, places, *_rank_and_size(t, sources))
    return any(meet(box, wanted) != wanted for name, box in zip(t.hf_names, boxes, strict=True) for wanted, _ in places[name][1])


def _shard_pairs(t: Tensor, shard: torch.Tensor, rank: int, size: int, places: Places) -> Iterator[Pair]:
    """Copies from what rank `rank` of `size` holds of the tensor."""
    boxes = _boxes(t, places, rank, size)
    for name, view, box in zip(t.hf_names, _views(t, shard, boxes), boxes, strict=True):
        yield from _pairs(view, box, places[name][1])


def _buckets(tensors: Sequence[Tensor], sources: Sources) -> Iterator[list[Tensor]]:
    """Tensors that travel together: of one dtype and one group, up to BUCKET_BYTES when whole."""
    kinds: dict[Any, list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((sources.held[t.name].dtype, t.expert), []).append(t)
    for same in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for t in same:
            bucket.append(t)
            size += sources.held[t.name].nbytes * _rank_and_size(t, sources)[1]
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


class _Bucket:
    """Shards that are gathered together, and the parts of the gathered ones that this rank's engine wants."""

    def __init__(self, tensors: Sequence[Tensor], sources: Sources, places: Places):
        self._shards = [sources.held[t.name].detach() for t in tensors]
        self._group = sources.group_of(tensors[0])
        self._rank, size = _rank_and_size(tensors[0], sources)
        self._shape = size, sum(s.numel() for s in self._shards)
        self._parts: list[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int]] = []
        flat = torch.empty(self._shape, dtype=self._shards[0].dtype, device="meta")         # no memory: only strides and offsets
        for rank in range(size):
            for t, shard in zip(tensors, self._split(flat[rank]), strict=True):
                self._parts += [(to, part.shape, part.stride(), int(part.storage_offset()))
                                for to, part in _shard_pairs(t, shard, rank, size, places)]

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """A rank's row of the bucket as its shards."""
        return [part.view(s.shape) for part, s in zip(row.split([s.numel() for s in self._shards]), self._shards, strict=True)]

    def start(self) -> tuple[dist.Work, torch.Tensor]:
        """Begin to gather."""
        flat = self._shards[0].new_empty(self._shape)
        mine = flat[self._rank]
        torch._foreach_copy_(self._split(mine), self._shards)
        return dist.all_gather_into_tensor(flat.view(-1), mine, group=self._group, async_op=True), flat

    def pairs(self, flat: torch.Tensor) -> list[Pair]:
        """The copies out of the gathered bucket."""
        return [(place, flat.as_strided(shape, stride, offset)) for place, shape, stride, offset in self._parts]
