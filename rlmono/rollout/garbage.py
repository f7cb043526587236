"""`Garbage`: collects Python's cyclic garbage on a host when nothing runs there.

A collection goes through all objects that it finds, and through every token of every sample: as often as Python does it by default it takes a
fifth of the event loop's time, and holds up requests for milliseconds. Nearly all that a rollout makes is freed without it.
"""

from __future__ import annotations

import asyncio
import gc

REST_S = 1.0
"""After the last group of a phase: by then the controller has handed its batch on."""
MOST = 500_000
"""More new objects than that are gone through also while groups run: 20,000 samples, or what a few hundred HTTP clients leave behind."""


class Garbage:
    """`start` once what stays is there, `busy` and `rest` as groups begin and end, `close` at the end."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """What there is by now (modules, prompts) is never gone through again: that takes a second."""
        self._before = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(MOST, *self._before[1:])

    def busy(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def rest(self) -> None:
        self.busy()
        self._timer = asyncio.get_running_loop().call_later(REST_S, gc.collect)

    def close(self) -> None:
        """As it was, but for what is frozen."""
        self.busy()
        if self._before is not None:
            gc.set_threshold(*self._before)
