"""The swap: one state machine owns what lies on the GPU.

    start → rollout → train → sync → rollout → …

Every allocation that can leave the GPU has a tag. A tag is *dropped* (its pages are freed and come back empty: KV cache,
engine weights, which the next update fills) or *kept* (copied to retained pinned host memory: the trainer). A transition
moves only tags whose need changes. On CPU, and without --colocate, the same states are walked and nothing moves.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, ContextManager, Optional, Protocol

STATES = ("rollout", "train", "sync")
BUILT = "start"
"""Where every role has just been built: all is present."""


@dataclass(frozen=True)
class Tag:
    """`needed_in` lists the states in which the tag must be on the GPU; `kept` says if its content survives leaving;
    `of_engine`, that SGLang allocates it."""

    name: str
    needed_in: tuple[str, ...]
    kept: bool
    of_engine: bool = True


# The first three are SGLang's own names for what it allocates.
TAGS = (
    Tag("kv_cache", ("rollout",), kept=False),
    Tag("cuda_graph", ("rollout", "sync"), kept=False),
    Tag("weights", ("rollout", "sync"), kept=False),
    Tag("trainer", ("sync", "train"), kept=True, of_engine=False),
)


class Owner(Protocol):
    """Who lets go of a tag's memory and takes it again: torch-memory-saver itself, or the engine, which has more to mind."""

    def pause(self, tag: str) -> None: ...
    def resume(self, tag: str) -> None: ...


class Memory:
    """The state machine of one rank. `saver` is torch_memory_saver's object, or None where nothing is to move."""

    def __init__(self, saver: Optional[Any]):
        self.state = BUILT
        self.saver = saver
        self.engine: Optional[Owner] = None         # set when it is built
        self.seconds: dict[str, float] = {}

    def region(self, name: str) -> ContextManager[Any]:
        """Allocations inside belong to this tag."""
        tag = next(t for t in TAGS if t.name == name)
        if self.saver is None:
            return contextlib.nullcontext()
        return self.saver.region(tag=tag.name, enable_cpu_backup=tag.kept)

    def to(self, state: str) -> float:
        """Go to a state; returns the seconds that it took."""
        if state not in STATES:
            raise ValueError(f"no such memory state: {state!r}")
        started = time.perf_counter()
        if self.saver is not None:
            self._move(state)
        took = time.perf_counter() - started
        self.seconds[f"{self.state} → {state}"] = took
        self.state = state
        return took

    def _move(self, state: str) -> None:
        import torch
        torch.cuda.synchronize()
        present = {t for t in TAGS if self.state == BUILT or self.state in t.needed_in}
        leaving = [t for t in TAGS if t in present and state not in t.needed_in]
        coming = [t for t in TAGS if t not in present and state in t.needed_in]
        if leaving:
            torch.cuda.empty_cache()
        for tag in leaving:             # first make room
            self._owner(tag).pause(tag.name)
        for tag in coming:
            self._owner(tag).resume(tag.name)
        torch.cuda.synchronize()

    def _owner(self, tag: Tag) -> Owner:
        owner = self.engine if tag.of_engine else self.saver
        assert owner is not None, f"nobody owns {tag.name}"
        return owner
