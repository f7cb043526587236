"""Context parallelism: each sequence is cut into 2·cp chunks, and rank r holds chunks r and 2·cp - 1 - r (zigzag), so that
causal attention is the same work on every rank. Keys and values are gathered; `cu_seqlens` stay those of whole sequences."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F


def held_by(bounds: list[int], size: int, rank: int) -> torch.Tensor:
    """Positions in the whole pack that a rank holds, in its order. `bounds` are cumulative lengths, each a multiple of 2·size."""
    parts = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        chunk = (b - a) // (2 * size)
        parts += [torch.arange(a + rank * chunk, a + (rank + 1) * chunk), torch.arange(b - (rank + 1) * chunk, b - rank * chunk)]
    return torch.cat(parts)


def pack_order(bounds: list[int], size: int) -> torch.Tensor:
    """Where each position of the pack lies in the ranks' parts, one after the other."""
    return torch.argsort(torch.cat([held_by(bounds, size, r) for r in range(size)]))


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward sums the ranks' gradients of each row (all of them used it)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty((x.size(0) * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        g = grads[0]
        out = g.new_empty((g.size(0) // ctx.group.size(), *g.shape[1:]))
        dist.reduce_scatter_tensor(out, g.contiguous(), group=ctx.group)
        return out, None


class _GatherReplicated(torch.autograd.Function):
    """All ranks' rows for a computation that every rank does alike; backward is this rank's own rows, once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.rows = group, x.size(0)
        out = x.new_empty((x.size(0) * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0].narrow(0, dist.get_rank(ctx.group) * ctx.rows, ctx.rows), None


def gather_tokens(x: torch.Tensor, bounds: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[t / cp] values of this rank's tokens -> [t] of the whole pack, on every rank."""
    if group.size() == 1:
        return x
    return _GatherReplicated.apply(x, group)[pack_order(bounds, group.size()).to(x.device)]


def context_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup,
                      scale: Optional[float], attend: Any) -> torch.Tensor:
    """Attention of this rank's queries over the whole sequences: two query chunks a sequence, each with all keys up to its
    end, bottom-right aligned. `attend(q, k, v, cu_q, cu_k, max_q, max_k, scale)` is causal variable-length attention."""
    size, rank, bounds = group.size(), dist.get_rank(group), cu_seqlens.tolist()
    keys, q_lengths, k_lengths = [], [], []
    for a, b in zip(bounds, bounds[1:], strict=False):
        chunk = (b - a) // (2 * size)
        for end in (a + (rank + 1) * chunk, b - rank * chunk):
            keys.append(torch.arange(a, end))
            q_lengths.append(chunk)
            k_lengths.append(end - a)
    index = pack_order(bounds, size)[torch.cat(keys)].to(q.device)
    k, v = (_GatherRows.apply(x, group).index_select(0, index) for x in (k, v))
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(torch.int32).to(q.device) for x in (q_lengths, k_lengths))
    return attend(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths), scale)   # type: ignore[no-any-return]
