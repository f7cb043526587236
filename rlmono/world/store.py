"""The attempt's store: torchrun's own store, under a prefix that no earlier attempt has used.

torchrun restarts a world on the same store, with the same keys still in it, and its restart count can differ
between the nodes of one new world. So nothing that torchrun exports names an attempt. Instead every rank posts a
fresh id and rank 0, alone, answers each id with the name of the attempt; a rank believes only an answer to the id
that it has just made, and rank 0 goes on until each rank has said under the attempt's name that it heard.
"""

from __future__ import annotations

import datetime
import time
import uuid

from torch.distributed import PrefixStore, Store, TCPStore

from rlmono.world.launch import Launch


class Deadline:
    """A moment, and a sentence for when it passes: `Deadline(60, "rank 3 waits for …")`."""

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what, self.end = seconds, what, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline; raises TimeoutError when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{self.what}: nothing within {self.seconds:g} s")
        return left


def open_store(launch: Launch, timeout_s: float) -> Store:
    """torchrun's agent store, or, under srun, one that rank 0 serves."""
    return TCPStore(launch.master_addr, launch.master_port, None, is_master=not launch.agent_store and launch.rank == 0,
                    wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_s))


def join_attempt(store: Store, rank: int, world_size: int, timeout_s: float) -> tuple[str, Store]:
    """(name of this attempt, store of this attempt alone). Every rank of the world calls it; see the module's text."""
    me = uuid.uuid4().hex
    store.set(f"rlmono/hello/{rank}", me)
    if rank == 0:
        name = uuid.uuid4().hex[:12]
        _answer_all(store, name, world_size, timeout_s)
    else:
        deadline = Deadline(timeout_s, f"rank {rank} waits for rank 0 to name the attempt")
        while not store.check([f"rlmono/answer/{me}"]):
            deadline.left()
            time.sleep(0.02)
        name = store.get(f"rlmono/answer/{me}").decode()
        store.set(f"rlmono/{name}/heard/{rank}", "1")
    return name, PrefixStore(f"rlmono/{name}", store)


def _answer_all(store: Store, name: str, world_size: int, timeout_s: float) -> None:
    waiting, answered = set(range(1, world_size)), set()
    deadline = Deadline(timeout_s, "")
    while waiting:
        deadline.what = f"rank 0 waits for rank(s) {sorted(waiting)[:16]} of {world_size} to start"
        deadline.left()
        for rank in sorted(waiting):
            if store.check([f"rlmono/{name}/heard/{rank}"]):
                waiting.discard(rank)
            elif store.check([f"rlmono/hello/{rank}"]):
                their = store.get(f"rlmono/hello/{rank}").decode()
                if their not in answered:
                    store.set(f"rlmono/answer/{their}", name)
                    answered.add(their)
        time.sleep(0.02)


def store_get(store: Store, key: str, timeout_s: float, who: str) -> str:
    """The value of a key that another rank sets; raises TimeoutError that names `who` has not set it."""
    deadline = Deadline(timeout_s, f"waiting for {who} to publish {key!r}")
    while not store.check([key]):
        deadline.left()
        time.sleep(0.02)
    return store.get(key).decode()
