"""The swap: one state machine owns what lies on the GPU.

    start → boot → sync → rollout → train → sync → rollout → …

A tag is memory with one purpose. SGLang's tags are *dropped* when no state needs them (torch-memory-saver frees their pages, and they
come back empty: the KV cache; the engine's weights, which the next update fills). The trainer's are moved by ourselves: gradients are dropped,
the others are *kept* in pinned host memory. Which of them leave, the plan says (plan.py); a transition moves only tags whose need changes.

What is kept begins to leave in `sync`, beside the update of the weights, and goes on beside `rollout` where the KV cache has room next to
it; and it begins to come back in `train`, beside the first passes: the optimizer's state is waited for only before the optimizer runs (`wait`).
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, Protocol

import torch

from rlmono.memory.holding import Holding
from rlmono.memory.host import HostMemory
from rlmono.memory.plan import GIB, RESERVE, TRAINER_TAGS, SwapPlan

log = logging.getLogger(__name__)

STATES = ("boot", "sync", "rollout", "train")
BUILT = "start"
"""Where a role has just been built: all of it is present."""
LEAVE_S = 300
"""For what leaves beside a phase: hundreds of GiB travel in that time."""


@dataclass(frozen=True)
class Tag:
    """`needed_in` lists the states in which the tag must be on the GPU. `kept` says if its content survives leaving; `constant`, that
    it never changes; `together`, that it is many tensors of which there are no views."""

    name: str
    needed_in: tuple[str, ...]
    kept: bool = False
    constant: bool = False
    together: bool = False


# SGLang's own names for what it allocates.
ENGINE_TAGS = (Tag("kv_cache", ("rollout",)), Tag("cuda_graph", ("rollout", "sync")), Tag("weights", ("rollout", "sync")))
TRAINER = (Tag("params", ("train", "sync"), kept=True), Tag("frozen", ("train",), kept=True, constant=True, together=True),
           Tag("optimizer", ("train",), kept=True, together=True), Tag("gradients", ("train",)))
assert {t.name for t in TRAINER} == set(TRAINER_TAGS)


class Owner(Protocol):
    """Who lets go of a tag's memory and takes it again: the engine, which has more to mind than pages."""

    def pause(self, tag: str) -> None: ...
    def resume(self, tag: str) -> None: ...


class Memory:
    """The state machine of one rank. `saver` is torch_memory_saver's object, or None where the engine's memory can't move (CPU)."""

    def __init__(self, saver: Optional[Any], plan: Optional[SwapPlan] = None, host: Optional[HostMemory] = None):
        self.state = BUILT
        self.saver, self.plan, self.host = saver, plan or SwapPlan("none", (), "nothing to move"), host
        self.engine: Optional[Owner] = None
        self.holdings: dict[str, Holding] = {}
        self.sizes: dict[str, int] = {}
        self.metrics: dict[str, float] = {}
        self._present: set[str] = set()
        self._follower: Optional[_Follower] = None

    # ------------------------------------------------------------ who is here

    def adopt(self, tensors: Mapping[str, Iterable[torch.Tensor]]) -> None:
        """The trainer's tensors by tag, once it is built and loaded."""
        for tag in TRAINER:
            holding = Holding(tag.name, tensors.get(tag.name, ()), tag.kept, tag.constant, tag.together)
            self.holdings[tag.name], self.sizes[tag.name] = holding, holding.nbytes
        self._present |= set(self.holdings)
        _empty_cache()

    def add_engine(self, engine: Owner) -> None:
        """The engine has just been built: all of it is present."""
        self.engine = engine
        if self.saver is not None:
            self._present |= {t.name for t in ENGINE_TAGS}

    def wait(self) -> None:
        """What came back is there for whatever the device does from now on: before the optimizer runs, and before it is saved.
        What was leaving beside the last phase has left."""
        self._finish_leaving()
        for holding in self.holdings.values():
            if holding.here:
                holding.wait()

    # ------------------------------------------------------------ transitions

    def to(self, state: str) -> float:
        """Go to a state; returns the seconds that it took."""
        if state not in STATES:
            raise ValueError(f"no such memory state: {state!r}")
        started = time.perf_counter()
        moved = self._move(state)
        took = time.perf_counter() - started
        name = f"perf/memory/{self.state}_to_{state}"
        self.metrics |= {f"{name}_s": took, f"{name}_gib": moved / GIB}
        self.state = state
        return took

    def _move(self, state: str) -> int:
        """Bytes that began to travel between GPU and host."""
        self._finish_leaving()
        wanted = {t.name for t in (*ENGINE_TAGS, *TRAINER) if state in t.needed_in or (t in TRAINER and t.name not in self.plan.leaves)}
        leaving, coming = self._present - wanted, wanted - self._present
        if not leaving and not coming:
            return 0
        beside = state == "rollout" and _cuda() and self._room_for(coming, RESERVE)
        if not beside:
            _synchronize()
            _empty_cache()              # what the last phase computed with
        moved = self._leave(leaving, only_begin=state == "sync" or beside)
        if state == "sync" and not self._room_for(coming):
            moved += self._leave(leaving & self._present, only_begin=False)
        for tag in ENGINE_TAGS:
            if tag.name in coming and self.engine is not None and self.saver is not None:
                self.engine.resume(tag.name)
                self._present.add(tag.name)
        for tag in TRAINER:
            if tag.name in coming and tag.name in self.holdings:
                moved += self.holdings[tag.name].come()
                self._present.add(tag.name)
        if "params" in coming:
            self._holding_wait("params")
        if "frozen" in coming:
            self._holding_wait("frozen")
        if beside and (still := [self.holdings[name] for name in leaving & self._present]):
            self._follower = _Follower(still)
        return moved

    def _leave(self, tags: set[str], only_begin: bool) -> int:
        """`only_begin`: what is kept starts to travel and stays here for now; what is dropped goes."""
        moved = 0
        for tag in ENGINE_TAGS:
            if tag.name in tags and self.engine is not None:
                self._drop_of_engine(tag.name)
        going = [t for t in TRAINER if t.name in tags]
        begin = [t for t in going if t.kept and only_begin]
        if self.host is not None:
            for tag in going:
                self.holdings[tag.name].reserve(self.host)
        for tag in going:
            if tag not in begin:
                moved += self.holdings[tag.name].leave()
                self._present.discard(tag.name)
        if len(begin) < len(going):
            _empty_cache()              # before a copy begins: to free waits for all that the device does
        return moved + sum(self.holdings[tag.name].start_out() for tag in begin)

    def _finish_leaving(self) -> None:
        """What left beside the last phase has left."""
        if self._follower is not None:
            self._follower.end()
            self._present -= {h.name for h in self._follower.holdings}
            self._follower = None

    def _drop_of_engine(self, name: str) -> None:
        assert self.engine is not None
        _empty_cache()
        before = _free()
        self.engine.pause(name)
        self.sizes[name] = max(self.sizes.get(name, 0), _free() - before)
        self._present.discard(name)

    def _holding_wait(self, name: str) -> None:
        if name in self.holdings:
            self.holdings[name].wait()

    def _room_for(self, tags: set[str], more: int = 0) -> bool:
        """Is there room for the engine's tags beside what has only begun to leave? Taking memory that is not there would end the process."""
        return self.saver is None or sum(self.sizes.get(t.name, 0) for t in ENGINE_TAGS if t.name in tags) + more <= _free()

    # ------------------------------------------------------------ what is where

    def where(self) -> str:
        """Bytes of each tag and where it is, in one line: what an out-of-memory error says."""
        names = [t.name for t in (*TRAINER, *ENGINE_TAGS)]
        parts = [f"{n} {self.sizes[n] / GIB:.1f} GiB {'here' if n in self._present else 'away'}" for n in names if self.sizes.get(n)]
        return f"in state {self.state}: " + (", ".join(parts) or "nothing is tagged yet")

    def report(self) -> dict[str, float]:
        """Metrics: bytes of each tag, and what the last transitions took."""
        waited = {"perf/memory/pin_wait_time": self.host.waited_s} if self.host is not None else {}
        return {f"perf/memory/{name}_gib": n / GIB for name, n in self.sizes.items()} | self.metrics | waited


class _Follower(threading.Thread):
    """Lets go of what has begun to leave, as soon as it has arrived, while the engine generates."""

    def __init__(self, holdings: list[Holding]):
        super().__init__(name="follow what leaves", daemon=True)
        self.holdings, self._device = holdings, torch.cuda.current_device()
        self._error: Optional[Exception] = None
        self.start()

    def run(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            for holding in self.holdings:
                holding.leave()
            _empty_cache()
        except Exception as e:          # told by `end`
            self._error = e

    def end(self) -> None:
        """Wait for it; raises what went wrong there, and TimeoutError."""
        self.join(LEAVE_S)
        if self.is_alive():
            raise TimeoutError(f"{', '.join(h.name for h in self.holdings)} has not left the GPU within {LEAVE_S} s")
        if self._error is not None:
            raise self._error


def _cuda() -> bool:
    return torch.cuda.is_available()


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if _cuda() else 0


def _empty_cache() -> None:
    if _cuda():
        torch.cuda.empty_cache()


def _synchronize() -> None:
    if _cuda():
        torch.cuda.synchronize()
