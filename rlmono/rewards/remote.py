"""`RemoteWorker`: the pool's end of one worker process: start, tasks out, outcomes in, and its death."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import msgspec

from rlmono.rewards import RewardError
from rlmono.rewards.protocol import LENGTH, OUT_OF_MEMORY, Outcome, Ready, Setup, frame

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For a worker to start and import its reward."""
AHEAD_S, LEAST_AHEAD, MOST_AHEAD = 0.01, 4, 64
"""Tasks at a worker that takes one after the other: what keeps it at work for so long, so that the way there and back, through a busy loop, is
hidden; and few enough that a slow one holds up little."""
GRACE_S = 1.0
"""What an async worker gets beyond the deadline to end an overdue reward by itself."""

_decode_outcome = msgspec.msgpack.Decoder(Outcome).decode


class Item:
    """A task on its way, with a sample or a group: its frame, who waits for it, and what happened to it."""

    __slots__ = ("id", "data", "future", "sent_at", "suspect")

    def __init__(self, id: int, data: bytearray, future: asyncio.Future[Outcome]) -> None:
        self.id, self.data, self.future = id, data, future
        self.sent_at = 0.0
        self.suspect = False
        """A worker died while it worked on this one and others."""


class Death(NamedTuple):
    """Why a worker ended: the remark for the samples that it was working on, and a sentence."""

    remark: str
    detail: str


class _Messages(asyncio.SubprocessProtocol):
    """What a process writes, handed over in the turn of the loop in which it comes: a stream with a reader takes a turn more."""

    def __init__(self, take: Callable[[list[bytes]], None]) -> None:
        self._take, self._buffer = take, bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Nothing more comes; or what has come is no message."""
        self.exited = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._buffer += data
        frames, start = [], 0
        while len(self._buffer) >= start + LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(self._buffer, start)[0]
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + LENGTH.size:end]))
            start = end
        del self._buffer[:start]
        try:
            self._take(frames)
        except Exception as error:
            if not self.ended.done():
                self.ended.set_exception(error)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1 and not self.ended.done():
            self.ended.set_result(None)

    def process_exited(self) -> None:
        self.exited.set()


class RemoteWorker:
    """One worker process, and the next after its death. `in_flight` has the tasks sent and not answered, oldest first.

    A worker for async rewards (`concurrent`) gets `at_once` tasks at a time. `settle(pairs)` gets outcomes as they come.
    """

    def __init__(self, setup: Setup, timeout_s: float, at_once: int, settle: Callable[[list[tuple[Item, Outcome]]], None]) -> None:
        self.in_flight: dict[int, Item] = {}
        self.concurrent = False
        self._setup, self._timeout_s, self._at_once, self._settle = setup, timeout_s, at_once, settle
        self._transport: asyncio.SubprocessTransport | None = None
        self._messages: _Messages
        self._first: asyncio.Future[bytes]
        self._task_s = AHEAD_S / LEAST_AHEAD        # of late, a task
        self._ready = False
        self._answered_at = 0.0
        self._condemned: set[int] = set()
        self._full = False
        """A reward has exhausted the process's memory, and may keep it: it is replaced."""

    async def start(self) -> None:
        """Starts the process and waits until its reward is loaded; RewardError says why it is not."""
        self._condemned.clear()
        self._full = False
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        # The worker finds the modules that this process finds; a session of its own, so that it and its children die together.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._transport, self._messages = await loop.subprocess_exec(
            lambda: _Messages(self._take), sys.executable, "-m", "rlmono.rewards.worker", stderr=None, env=environment, start_new_session=True)
        _widen(self._inbox())
        self._inbox().write(frame(msgspec.structs.replace(self._setup, parent=os.getpid())))
        news: list[asyncio.Future[Any]] = [self._first, self._messages.ended]
        await asyncio.wait(news, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        ready = msgspec.msgpack.decode(self._first.result(), type=Ready) if self._first.done() else None
        if ready is None or ready.problem is not None:
            died = self._messages.ended.done()
            _, _, death = await self.bury()
            if ready is not None:
                raise RewardError(f"the reward cannot be loaded: {ready.problem}")
            if not died:
                raise RewardError(f"a reward worker took more than {START_TIMEOUT_S:g} s to import {_functions(self._setup)}")
            raise RewardError(f"a reward worker died while it imported {_functions(self._setup)}: {death.detail}; its output says more")
        self.concurrent, self._ready = ready.concurrent, True

    @property
    def room(self) -> int:
        """How many more samples may be sent now. A suspect is worked on alone."""
        if not self._ready or any(item.suspect for item in self.in_flight.values()):
            return 0
        ahead = self._at_once if self.concurrent else min(max(LEAST_AHEAD, int(AHEAD_S / self._task_s)), MOST_AHEAD)
        return ahead - len(self.in_flight)

    @property
    def idle(self) -> bool:
        return not self.in_flight and self.room > 0

    def send(self, items: list[Item]) -> None:
        now = time.monotonic()
        for item in items:
            item.sent_at = now
            self.in_flight[item.id] = item
        if items:
            self._inbox().write(items[0].data if len(items) == 1 else b"".join(item.data for item in items))

    def _take(self, frames: list[bytes]) -> None:
        if frames and not self._first.done():
            self._first.set_result(frames.pop(0))
        if not frames:
            return
        self._answered_at = time.monotonic()
        pairs: list[tuple[Item, Outcome]] = []
        for outcome in map(_decode_outcome, frames):
            if outcome.remark == OUT_OF_MEMORY and self._is_not_its_own(outcome):
                continue
            item = self.in_flight.pop(outcome.id, None)
            if item is not None:
                pairs.append((item, outcome))
                self._task_s += (outcome.seconds - self._task_s) / 16
        self._settle(pairs)

    def _is_not_its_own(self, outcome: Outcome) -> bool:
        """Ends the process after an outcome for want of memory. True where others may have taken it: the task is then done again, by the next."""
        others = self._full or (self.concurrent and len(self.in_flight) > 1)
        if outcome.id in self.in_flight and not self._full:
            self._full, self._ready = True, False
            self._kill()
        return others

    async def end(self) -> None:
        """Until the process has ended. (Bounded by the pool's watch, which kills.) Raises what its messages are wrong with."""
        await asyncio.shield(self._messages.ended)

    def overdue(self) -> set[int]:
        """The samples whose reward runs for longer than its deadline."""
        now = time.monotonic()
        if self.concurrent:
            return {item.id for item in self.in_flight.values() if now > item.sent_at + self._timeout_s + GRACE_S}
        running = next(iter(self.in_flight.values()), None)
        late = running is not None and now > max(running.sent_at, self._answered_at) + self._timeout_s
        return {running.id} if running is not None and late else set()

    def kill_for(self, ids: set[int]) -> None:
        """Kills the process because of these samples; `end` then returns."""
        self._condemned = set(ids)
        self._kill()

    async def bury(self) -> tuple[list[Item], list[Item], Death]:
        """After the process has ended (or to end it): the samples to blame, the others, and the cause.

        Of several async rewards at work none can be told to be the cause of a crash, or to have the memory: they become suspects.
        """
        self._ready = False
        self._kill()
        code = await self._wait(10.0)
        items, self.in_flight = list(self.in_flight.values()), {}
        if self._condemned:
            culprits = [item for item in items if item.id in self._condemned]
            death = Death("reward_timeout", "")
        elif self._full:
            culprits, death = [], Death(OUT_OF_MEMORY, "")
            for item in items if self.concurrent else ():
                item.suspect = True
        else:
            running = items if self.concurrent else items[:1]
            culprits = running if len(running) == 1 else []
            for item in running:
                item.suspect = True
            death = Death("reward_crashed", f"its worker process ended {_ending(code)}")
        return culprits, [item for item in items if item not in culprits], death

    async def stop(self, timeout_s: float) -> None:
        """Lets an idle process end by itself, within the deadline; kills one that is at work."""
        self._ready = False
        if self._transport is None:
            return
        if self.in_flight:
            self._kill()
        self._inbox().close()
        await self._wait(timeout_s)
        self._kill()

    def _inbox(self) -> asyncio.WriteTransport:
        assert self._transport is not None
        return cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))

    def _kill(self) -> None:
        """The whole process group: a reward's children too."""
        if self._transport is None:
            return
        try:
            os.killpg(self._transport.get_pid(), signal.SIGKILL)
        except ProcessLookupError:
            logger.debug("reward worker %d has already ended", self._transport.get_pid())

    async def _wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when the process has not ended in time; it is killed then."""
        assert self._transport is not None
        try:
            async with asyncio.timeout(timeout_s):
                await self._messages.exited.wait()
                return self._transport.get_returncode()
        except TimeoutError:
            self._kill()
            logger.warning("reward worker %d did not end within %g s", self._transport.get_pid(), timeout_s)
            return None


def _widen(inbox: asyncio.WriteTransport) -> None:
    """A pipe holds 64 KiB, and a sample of 8k tokens has twice that: each would take several turns of the loop and of the worker."""
    try:
        fcntl.fcntl(inbox.get_extra_info("pipe"), fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError as error:        # the user has too many pipes, or the system allows no larger ones
        logger.debug("a reward worker's pipe stays as small as it is: %s", error)


def _functions(setup: Setup) -> str:
    return ", ".join(setup.paths) or "nothing"


def _ending(code: int | None) -> str:
    if code is None:
        return "without a trace"
    return f"with {signal.Signals(-code).name} (SIGKILL can mean that memory ran out)" if code < 0 else f"with exit code {code}"
