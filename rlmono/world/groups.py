"""Process groups: one default group a pool, and groups across pools made by their members alone.

Megatron and SGLang each take the default group for the world, so a pool's default group has just the pool's ranks.
Nothing here makes a world-wide group. `device_id` is never bound: a bound default group makes later
cross-pool groups split from it, which hangs.
"""

from __future__ import annotations

import datetime
from typing import Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def init_pool(store: dist.Store, pool: Sequence[int], rank: int, device: str, timeout_s: float) -> None:
    """Make the pool's default group; `rank` is the global rank, and its place in `pool` becomes its rank in the pool."""
    name = "-".join(map(str, (pool[0], pool[-1], len(pool))))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.PrefixStore(f"pool/{name}", store),
                            rank=pool.index(rank), world_size=len(pool), timeout=datetime.timedelta(seconds=timeout_s))


def cross_pool_group(store: dist.Store, name: str, members: Sequence[int], rank: int, device: str, timeout_s: float) -> dist.ProcessGroup:
    """A group of global ranks out of several pools; only its members call this. In it, ranks count along `members`."""
    backend = c10d.Backend("nccl" if device == "cuda" else "gloo")
    group, _ = c10d._new_process_group_helper(len(members), members.index(rank), [], backend, dist.PrefixStore(f"cross/{name}", store),
                                              group_name=f"cross/{name}",     # type: ignore[arg-type]
                                              timeout=datetime.timedelta(seconds=timeout_s))
    c10d._world.pg_group_ranks[group] = {i: i for i in range(len(members))}
    return group


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, source: int) -> dist.Work:
    """Start a broadcast over a cross-pool group; `source` is a rank in that group."""
    return c10d.broadcast(tensor, group_src=source, group=group, async_op=True)
