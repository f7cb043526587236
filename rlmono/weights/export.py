"""The trainer's weights as full tensors with HF names: what engines load, and what HF exports hold.

Shards are gathered over tensor-parallel ranks in buckets, so that small tensors share a collective; experts then come
from their expert-parallel ranks, and layers from their pipeline stage. Where nothing is sharded, tensors are views of the
parameters: nothing is copied.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional, Protocol, Sequence

import torch
import torch.distributed as dist

from rlmono.models.mapping import Tensor

BUCKET_BYTES = 512 * 2**20
Named = list[tuple[str, torch.Tensor]]


class Groups(Protocol):
    """Where the parts of a tensor are."""

    @property
    def tp(self) -> dist.ProcessGroup: ...
    @property
    def expert_tp(self) -> dist.ProcessGroup: ...
    @property
    def ep(self) -> dist.ProcessGroup: ...
    @property
    def pp(self) -> dist.ProcessGroup: ...


def export(held: Mapping[str, torch.Tensor], tensors: Sequence[Tensor], groups: Groups, vocab_size: int,
           bucket_bytes: int = BUCKET_BYTES, about: Optional[Mapping[str, About]] = None) -> Iterator[Named]:
    """Buckets of (HF name, full tensor), in the order of `tensors`; the same on all ranks of the model-parallel world.

    `held` is what this rank has, by Megatron's names in the whole model; `about` is `describe`'s answer, from an earlier export of the same.
    Collective. A bucket is valid until the next one is asked for.
    """
    about = describe(held, tensors, groups) if about is None else about
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += about[tensor.name].full_bytes
        if size >= bucket_bytes and not tensor.with_next:
            yield _gather(bucket, held, about, groups, vocab_size)
            bucket, size = [], 0
    if bucket:
        yield _gather(bucket, held, about, groups, vocab_size)


class About:
    """Where a tensor is, as every rank of the model-parallel world knows it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int, ep_rank: int, ranks: int):
        self.shape, self.dtype, self.stage, self.ep_rank = shape, dtype, stage, ep_rank
        self.full_bytes = ranks * dtype.itemsize * int(torch.Size(shape).numel())


def describe(held: Mapping[str, torch.Tensor], tensors: Sequence[Tensor], groups: Groups) -> dict[str, About]:
    """Collective. Ask the pipeline stages and expert ranks what they hold; without them this rank knows it all."""
    mine = {t.name: (tuple(held[t.name].shape), held[t.name].dtype, dist.get_rank(groups.pp), dist.get_rank(groups.ep))
            for t in tensors if t.name in held}
    for group in (groups.ep, groups.pp):
        if group.size() > 1:
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, mine, group=group)
            mine = {k: v for part in reversed(parts) for k, v in part.items()}
    missing = [t.name for t in tensors if t.name not in mine]
    if missing:
        raise RuntimeError(f"no rank holds {', '.join(missing[:4])}")
    return {t.name: About(*mine[t.name], 1 if t.replicated else _tensor_group(t, groups).size()) for t in tensors}


def _tensor_group(t: Tensor, groups: Groups) -> dist.ProcessGroup:
    return groups.expert_tp if t.expert else groups.tp


@torch.no_grad()
def _gather(bucket: Sequence[Tensor], held: Mapping[str, torch.Tensor], about: Mapping[str, About], groups: Groups, vocab_size: int) -> Named:
    full: dict[str, torch.Tensor] = {}
    for expert in (False, True):
        kind = [t for t in bucket if t.expert == expert and t.name in held]
        full.update(_join_shards(kind, held, groups.expert_tp if expert else groups.tp))
    if groups.ep.size() > 1:
        here = [t for t in bucket if t.expert and about[t.name].stage == dist.get_rank(groups.pp)]
        _share(here, full, about, groups, groups.ep, lambda a: a.ep_rank)
    if groups.pp.size() > 1:
        _share(bucket, full, about, groups, groups.pp, lambda a: a.stage)
    out: Named = []
    for t in bucket:
        parts = t.to_hf(full[t.name])
        out += [(name, part[:vocab_size] if t.vocabulary else part) for name, part in zip(t.hf_names, parts, strict=True)]
    return out


def _join_shards(tensors: Sequence[Tensor], held: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Full tensors of those that this rank holds a shard of: one collective for all."""
    n = group.size()
    shards = {t.name: [held[t.name].detach()] for t in tensors}
    cut = [t for t in tensors if not t.replicated and n > 1]
    if cut:
        mine = torch.cat([held[t.name].detach().reshape(-1) for t in cut])
        every = mine.new_empty(n * mine.numel())
        dist.all_gather_into_tensor(every, mine, group=group)
        sizes = [held[t.name].numel() for t in cut]
        per_rank = [part.split(sizes) for part in every.chunk(n)]
        for i, t in enumerate(cut):
            shards[t.name] = [rank[i].view(held[t.name].shape) for rank in per_rank]
    return {t.name: t.join(shards[t.name]) for t in tensors}


def _share(tensors: Sequence[Tensor], full: dict[str, torch.Tensor], about: Mapping[str, About], groups: Groups, group: dist.ProcessGroup,
           owner_of: Any) -> None:
    """Every rank of the group gets what one of them has: a broadcast for each owner, dtype by dtype."""
    for owner in range(group.size()):
        for dtype in sorted({about[t.name].dtype for t in tensors}, key=str):
            theirs = [t for t in tensors if owner_of(about[t.name]) == owner and about[t.name].dtype == dtype]
            if not theirs:
                continue
            shapes = [_full_shape(t, about[t.name], groups) for t in theirs]
            sizes = [int(torch.Size(s).numel()) for s in shapes]
            if dist.get_rank(group) == owner:
                flat = torch.cat([full[t.name].reshape(-1) for t in theirs])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=_device(full))
            dist.broadcast(flat, group=group, group_src=owner)
            for t, part, shape in zip(theirs, flat.split(sizes), shapes, strict=True):
                full[t.name] = part.view(shape)


def _full_shape(t: Tensor, about: About, groups: Groups) -> tuple[int, ...]:
    ranks = 1 if t.replicated else _tensor_group(t, groups).size()
    dim = t.cut_dimension
    return tuple(n * ranks if i == dim else n for i, n in enumerate(about.shape))


def _device(full: Mapping[str, torch.Tensor]) -> Optional[torch.device]:
    if full:
        return next(iter(full.values())).device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
