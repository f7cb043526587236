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
from typing import Callable, NamedTuple

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


class _Request(NamedTuple):
    """One that waits for its answer."""

    answer: asyncio.Future[Output]
    ends: float
    """When its deadline passes, in the loop's time."""
    timeout_s: float
    what: tuple[int, int]
    """Tokens: the prompt's, and the most that it may get."""


class EngineClient:
    """Requests to one engine. `send` puts a message on the socket to the engine's first rank."""

    def __init__(self, name: str, send: Callable[[Message], None], concurrency: int):
        self.name, self._send = name, send
        self._room = asyncio.Semaphore(concurrency)
        self._prefix, self._requests = f"{next(_clients):04x}", 0
        self._waiting: dict[str, _Request] = {}
        self._left: dict[str, asyncio.Future[Output]] = {}      # nobody waits for them any more; the engine still has them
        self._given_up: set[str] = set()                        # not even their abort was answered
        self._timer: asyncio.TimerHandle | None = None          # one for all that wait: each needs none of its own
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
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[Output] = loop.create_future()
            self._send(Generate(rid, input_ids, sampling))
            if not self.waiting:
                self.heard()
            request = self._waiting[rid] = _Request(answer, loop.time() + timeout_s, timeout_s, (len(input_ids), sampling.max_new_tokens))
            self._most = max(self._most, len(self._waiting))
            if self._timer is None or request.ends < self._timer.when():
                self._set_timer(request.ends)
            try:
                output = await answer
            except asyncio.CancelledError:
                if rid in self._waiting:
                    self._leave(rid)
                raise
            if output.error:
                raise EngineFault("engine_refused", f"{self.name} refused {_tokens(request)}: {output.error}")
            return output

    def _leave(self, rid: str) -> None:
        """Nobody waits for this request any more."""
        del self._waiting[rid]
        self._left[rid] = asyncio.get_running_loop().create_future()
        self._send(Abort(rid))

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        """Give up what is overdue, and come again when the next may be."""
        assert self._timer is not None
        now, self._timer = self._timer.when(), None
        for rid, request in [(rid, r) for rid, r in self._waiting.items() if r.ends <= now]:
            self._leave(rid)
            if not request.answer.done():       # else its call has been cancelled in this turn of the loop
                request.answer.set_exception(EngineFault("engine_timeout", f"{self.name} has not answered {_tokens(request)} within "
                                                         f"{request.timeout_s:g} s; {len(self._waiting)} others wait there"))
        if self._waiting:
            self._set_timer(min(r.ends for r in self._waiting.values()))

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
            self.tokens += item.length
            if len(self._waiting) == self._most:
                self._slack_since = now
            request = self._waiting.pop(item.rid, None)
            if request is not None:
                if not request.answer.done():       # else its call has been cancelled in this turn of the loop
                    request.answer.set_result(item)
                continue
            left = self._left.pop(item.rid, None)
            if left is not None:
                left.set_result(item)
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


def _tokens(request: _Request) -> str:
    return "a request of {} + {} tokens".format(*request.what)
