"""Each device rank has a GPU of its own: ranks publish which one they took, and the controller refuses a GPU with two of them."""

from __future__ import annotations

from typing import Mapping, Sequence

from torch.distributed import Store

from rlmono.world.launch import HOW_TO_START, WorldError
from rlmono.world.store import Deadline, store_get


def claim_gpu(store: Store, rank: int, local_rank: int, hostname: str) -> None:
    """Take GPU `local_rank` and publish it, or that this node has none of that number: the controller refuses the run then."""
    import torch
    count = torch.cuda.device_count()
    if local_rank >= count:
        store.set(f"gpu/{rank}", f"{hostname} none:{count}")
        return
    torch.cuda.set_device(local_rank)
    store.set(f"gpu/{rank}", f"{hostname} {torch.cuda.get_device_properties(local_rank).uuid}")


def refuse_shared(store: Store, devices: Sequence[int], timeout_s: float) -> None:
    """On the controller: raises WorldError when a rank has no GPU, or two ranks share one; TimeoutError when one does not say."""
    deadline = Deadline(timeout_s, "the controller waits for device ranks to take their GPUs")
    problem = find_problem({r: store_get(store, f"gpu/{r}", deadline.left(), f"device rank {r}") for r in devices})
    if problem:
        raise WorldError(problem)


def find_problem(claims: Mapping[int, str]) -> str:
    """What is wrong with `hostname uuid` of each rank; "" when every rank has a GPU of its own."""
    taken: dict[str, int] = {}
    for rank, claim in claims.items():
        host, _, gpu = claim.partition(" ")
        if gpu.startswith("none:"):
            return (f"rank {rank} has no GPU: {host} shows {gpu.removeprefix('none:')}. Start as many ranks a node as it has GPUs, "
                    f"and one host rank. {HOW_TO_START}")
        other = taken.setdefault(claim, rank)
        if other != rank:
            return (f"ranks {other} and {rank} are on one GPU ({gpu} of {host}). Each device rank needs a GPU of its own: a node starts "
                    f"one rank a GPU and a host rank, once, and every rank sees all GPUs of its node. {HOW_TO_START}")
    return ""
