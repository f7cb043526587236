"""`RemoteWorker`: the pool's end of one worker process: start, tasks out, outcomes in, and its death."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
import time
from typing import NamedTuple

import msgspec

from rlmono.rewards import RewardError
from rlmono.rewards.protocol import LENGTH, Outcome, Ready, Setup, frame

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For a worker to start and import its reward."""
AHEAD = 8
"""Tasks at a worker that takes one after the other: enough to hide the way, few enough that a slow one holds up little."""
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


class RemoteWorker:
    """One worker process, and the next after its death. `in_flight` has the tasks sent and not answered, oldest first.

    A worker for async rewards (`concurrent`) gets `at_once` tasks at a time.
    """

    def __init__(self, setup: Setup, timeout_s: float, at_once: int) -> None:
        self.in_flight: dict[int, Item] = {}
        self.concurrent = False
        self._setup, self._timeout_s, self._at_once = setup, timeout_s, at_once
        self._process: asyncio.subprocess.Process | None = None
        self._buffer = bytearray()
        self._ready = False
        self._answered_at = 0.0
        self._condemned: set[int] = set()

    async def start(self) -> None:
        """Starts the process and waits until its reward is loaded; RewardError says why it is not."""
        self._buffer.clear()
        self._condemned.clear()
        # The worker finds the modules that this process finds; a session of its own, so that it and its children die together.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rlmono.rewards.worker", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env=environment, start_new_session=True, limit=1 << 20)
        _widen(self._process)
        self._write(frame(msgspec.structs.replace(self._setup, parent=os.getpid())))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                frames = await self._frames()
        except TimeoutError:
            await self.bury()
            raise RewardError(f"a reward worker took more than {START_TIMEOUT_S:g} s to import {_functions(self._setup)}") from None
        ready = msgspec.msgpack.decode(frames[0], type=Ready) if frames else None
        if ready is None or ready.problem is not None:
            _, _, death = await self.bury()
            if ready is not None:
                raise RewardError(f"the reward cannot be loaded: {ready.problem}")
            raise RewardError(f"a reward worker died while it imported {_functions(self._setup)}: {death.detail}; its output says more")
        self.concurrent, self._ready = ready.concurrent, True

    @property
    def room(self) -> int:
        """How many more samples may be sent now. A suspect is worked on alone."""
        if not self._ready or any(item.suspect for item in self.in_flight.values()):
            return 0
        return (self._at_once if self.concurrent else AHEAD) - len(self.in_flight)

    @property
    def idle(self) -> bool:
        return self._ready and not self.in_flight

    def send(self, items: list[Item]) -> None:
        now = time.monotonic()
        for item in items:
            item.sent_at = now
            self.in_flight[item.id] = item
        if items:
            self._write(b"".join(item.data for item in items))

    async def receive(self) -> list[tuple[Item, Outcome]]:
        """The next outcomes, at least one; none when the process has ended. (Bounded by the pool's watch, which kills.)"""
        pairs: list[tuple[Item, Outcome]] = []
        while not pairs:
            frames = await self._frames()
            if not frames:
                break
            self._answered_at = time.monotonic()
            for outcome in map(_decode_outcome, frames):
                item = self.in_flight.pop(outcome.id, None)
                if item is not None:
                    pairs.append((item, outcome))
        return pairs

    def overdue(self) -> set[int]:
        """The samples whose reward runs for longer than its deadline."""
        now = time.monotonic()
        if self.concurrent:
            return {item.id for item in self.in_flight.values() if now > item.sent_at + self._timeout_s + GRACE_S}
        running = next(iter(self.in_flight.values()), None)
        late = running is not None and now > max(running.sent_at, self._answered_at) + self._timeout_s
        return {running.id} if running is not None and late else set()

    def kill_for(self, ids: set[int]) -> None:
        """Kills the process because of these samples; `receive` then sees its end."""
        self._condemned = set(ids)
        self._kill()

    async def bury(self) -> tuple[list[Item], list[Item], Death]:
        """After the process has ended (or to end it): the samples to blame, the others, and the cause.

        Of several async rewards at work none can be told to be the cause of a crash: they become suspects.
        """
        self._ready = False
        self._kill()
        code = await self._wait(10.0)
        items, self.in_flight = list(self.in_flight.values()), {}
        if self._condemned:
            culprits = [item for item in items if item.id in self._condemned]
            death = Death("reward_timeout", "")
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
        if self._process is None or self._process.stdin is None:
            return
        if self.in_flight:
            self._kill()
        self._process.stdin.close()
        await self._wait(timeout_s)
        self._kill()

    def _write(self, data: bytes | bytearray) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(data)

    async def _frames(self) -> list[bytes]:
        """The messages that come next, at least one; none at the end of the stream."""
        assert self._process is not None and self._process.stdout is not None
        frames: list[bytes] = []
        while not frames:
            data = await self._process.stdout.read(1 << 18)
            if not data:
                break
            self._buffer += data
            start = 0
            while len(self._buffer) >= start + LENGTH.size:
                end = start + LENGTH.size + LENGTH.unpack_from(self._buffer, start)[0]
                if len(self._buffer) < end:
                    break
                frames.append(bytes(self._buffer[start + LENGTH.size:end]))
                start = end
            del self._buffer[:start]
        return frames

    def _kill(self) -> None:
        """The whole process group: a reward's children too."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            logger.debug("reward worker %d has already ended", self._process.pid)

    async def _wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when the process has not ended in time; it is killed then."""
        assert self._process is not None
        try:
            async with asyncio.timeout(timeout_s):
                return await self._process.wait()
        except TimeoutError:
            self._kill()
            logger.warning("reward worker %d did not end within %g s", self._process.pid, timeout_s)
            return None


def _widen(process: asyncio.subprocess.Process) -> None:
    """A pipe holds 64 KiB, and a sample of 8k tokens has twice that: each would take several turns of the loop and of the worker."""
    assert process.stdin is not None
    try:
        fcntl.fcntl(process.stdin.transport.get_extra_info("pipe"), fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError as error:        # the user has too many pipes, or the system allows no larger ones
        logger.debug("the pipe to reward worker %d stays as small as it is: %s", process.pid, error)


def _functions(setup: Setup) -> str:
    return ", ".join(setup.paths) or "nothing"


def _ending(code: int | None) -> str:
    if code is None:
        return "without a trace"
    return f"with {signal.Signals(-code).name} (SIGKILL can mean that memory ran out)" if code < 0 else f"with exit code {code}"
