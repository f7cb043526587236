"""A host's view of one engine of its node: requests out, answers back, and what can go wrong with them.

    a request that is not answered in time      is aborted; its sample fails (`engine_timeout`)
    one that the engine refuses                 its sample fails (`engine_refused`)
    an answer that nobody waits for             changes nothing, and is counted: late, twice, unknown; or missing, also after its abort
    an engine that is silent                    is taken for dead by its host, see `NodeHost.watch_engines`: the run ends
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from typing import Callable

from rlmono.world.messages import Abort, EndPhase, Generate, Message, Output, Outputs, Sampling

log = logging.getLogger(__name__)
_clients = itertools.count()
ABORT_TIMEOUT_S = 60.0
"""For an engine to answer a request that was aborted: a scheduler step, at most."""


class EngineFault(Exception):
    """A request that came to nothing. `outcome` is its name in the metrics."""

    def __init__(self, outcome: str, detail: str):
        super().__init__(detail)
        self.outcome = outcome


class EngineClient:
    """Requests to one engine. `send` puts a message on the socket to the engine's first rank."""

    def __init__(self, name: str, send: Callable[[Message], None], concurrency: int):
        self.name, self._send = name, send
        self._room = asyncio.Semaphore(concurrency)
        self._prefix, self._requests = f"{next(_clients):04x}", 0
        self._waiting: dict[str, asyncio.Future[Output]] = {}
        self._left: dict[str, asyncio.Future[Output]] = {}      # nobody waits for them any more; the engine still has them
        self._given_up: set[str] = set()                        # not even their abort was answered
        self._heard = 0.0           # or, where that is later, when the first of the requests that wait was sent
        self.strays: Counter[str] = Counter()
        self.tokens = self._told = 0
        self.ends_now = False
        """All requests are aborted, and new ones answer with nothing, until `begin_phase`."""
        self._most = 0              # requests in flight at the best of this phase
        self._slack_since = self._idle_since = time.monotonic()

    async def generate(self, input_ids: list[int], sampling: Sampling, timeout_s: float) -> Output:
        """One response; a call that is cancelled aborts its request. Raises EngineFault when the engine does not answer in time (it is
        aborted then), or refuses."""
        async with self._room:
            if self.ends_now:
                return Output("", [], [], "abort", 0)
            rid = f"{self._prefix}{self._requests:012x}"        # one length: SGLang aborts by prefix
            self._requests += 1
            answer: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
            self._send(Generate(rid, input_ids, sampling))
            if not self.waiting:
                self.heard()
            self._waiting[rid] = answer
            self._most = max(self._most, len(self._waiting))
            try:
                await asyncio.wait([answer], timeout=timeout_s)
            finally:
                self._waiting.pop(rid, None)
                if not answer.done():
                    self._left[rid] = answer
                    self._send(Abort(rid))
            what = f"a request of {len(input_ids)} + {sampling.max_new_tokens} tokens"
            if not answer.done():
                others = f"; {len(self._waiting)} others wait there"
                raise EngineFault("engine_timeout", f"{self.name} has not answered {what} within {timeout_s:g} s{others}")
            output = answer.result()
            if output.error:
                raise EngineFault("engine_refused", f"{self.name} refused {what}: {output.error}")
            return output

    def heard(self) -> None:
        """The engine has shown that its loop goes round."""
        self._heard = time.monotonic()

    @property
    def waiting(self) -> int:
        """Requests that the engine has."""
        return len(self._waiting) + len(self._left)

    def silent_s(self) -> float:
        """For how long nothing has come from the engine; 0 while there is nothing for it to do."""
        return time.monotonic() - self._heard if self.waiting else 0.0

    def deliver(self, outputs: Outputs) -> None:
        """Answers from the socket."""
        self.heard()
        now = time.monotonic()
        for item in outputs.items:
            self.tokens += len(item.output_ids)
            if len(self._waiting) == self._most:
                self._slack_since = now
            answer, left = self._waiting.pop(item.rid, None), self._left.pop(item.rid, None)
            if left is not None:
                left.set_result(item)
            elif answer is not None and not answer.done():
                answer.set_result(item)
                continue
            if left is None or item.finish != "abort":      # an abort is what was asked for
                self._stray(item.rid, late=left is not None)
        if not self._waiting:
            self._idle_since = now

    def _stray(self, rid: str, late: bool) -> None:
        if late or rid in self._given_up:
            self._given_up.discard(rid)
            kind = "late"
        elif rid[:4] == self._prefix and rid[4:] < f"{self._requests:012x}":
            kind = "twice"
        else:
            kind = "unknown"
        self.strays[kind] += 1
        log.warning("%s: an answer to request %s, which nobody waits for: %s", self.name, rid, kind)

    def begin_phase(self) -> None:
        """Groups come again: nothing of the phase before, and no abort, goes on."""
        self.ends_now, self._most = False, 0
        self._slack_since = self._idle_since = time.monotonic()

    def take_tokens(self) -> int:
        """Tokens that have been generated since the last call."""
        new, self._told = self.tokens - self._told, self.tokens
        return new

    def rest_s(self) -> tuple[float, float]:
        """(seconds without any request, seconds with fewer than at the best of this phase), up to now."""
        now = time.monotonic()
        idle = 0.0 if self._waiting else now - self._idle_since
        return idle, 0.0 if self._waiting and len(self._waiting) == self._most else now - self._slack_since

    async def settle(self) -> None:
        """Until the engine has answered the requests that nobody waits for any more; those that it does not answer are given up."""
        left = dict(self._left)
        if left:
            await asyncio.wait(left.values(), timeout=ABORT_TIMEOUT_S)
        for rid in left.keys() & self._left.keys():
            del self._left[rid]
            self._given_up.add(rid)
            self.strays["missing"] += 1
            log.warning("%s has not answered request %s, nor its abort within %g s: given up", self.name, rid, ABORT_TIMEOUT_S)

    def take_strays(self) -> dict[str, int]:
        """Answers that nobody waited for, or that never came, by kind, since the last call."""
        taken, self.strays = dict(self.strays), Counter()
        return taken

    def abort_all(self) -> None:
        """Every request answers at once, with what it has, and new ones with nothing, until `begin_phase`."""
        self.ends_now = True
        self._send(Abort())

    def end_phase(self) -> None:
        """The engine leaves its loop. Raises RuntimeError while requests wait: their answers would be lost."""
        if self.waiting:
            raise RuntimeError(f"{self.name}: the phase can't end while {self.waiting} requests wait")
        self._send(EndPhase())
