"""A host's view of one engine of its node: requests out, answers back."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Callable

from rlmono.world.messages import Abort, EndPhase, Generate, Message, Output, Outputs, Sampling

log = logging.getLogger(__name__)
_numbers = itertools.count()
ABORT_TIMEOUT_S = 60.0
"""For an engine to answer a request that was aborted: a scheduler step, at most."""


class EngineClient:
    """Requests to one engine. `send` puts a message on the socket to the engine's first rank."""

    def __init__(self, name: str, send: Callable[[Message], None], concurrency: int):
        self.name, self._send = name, send
        self._room = asyncio.Semaphore(concurrency)
        self._waiting: dict[str, asyncio.Future[Output]] = {}
        self._left: dict[str, asyncio.Future[Output]] = {}      # whose caller was cancelled; the engine still has them
        self.unknown = 0
        self.tokens = 0

    async def generate(self, input_ids: list[int], sampling: Sampling, timeout_s: float) -> Output:
        """One response; a call that is cancelled aborts its request. Raises TimeoutError when the engine does not answer in time (it is
        aborted then), RuntimeError when it refuses."""
        async with self._room:
            rid = f"{next(_numbers):016x}"      # one length: SGLang aborts by prefix
            answer: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
            self._waiting[rid] = answer
            self._send(Generate(rid, input_ids, sampling))
            try:
                await asyncio.wait([answer], timeout=timeout_s)
            except asyncio.CancelledError:
                if not answer.done():
                    self._left[rid] = answer
                    self._send(Abort(rid))
                raise
            finally:
                self._waiting.pop(rid, None)
            if not answer.done():
                self._send(Abort(rid))
                raise TimeoutError(f"{self.name} has not answered a request of {len(input_ids)} + {sampling.max_new_tokens} tokens "
                                   f"within {timeout_s:g} s; {len(self._waiting) + 1} requests wait there")
            output = answer.result()
            if output.error:
                raise RuntimeError(f"{self.name} refused a request of {len(input_ids)} + {sampling.max_new_tokens} tokens: {output.error}")
            return output

    def deliver(self, outputs: Outputs) -> None:
        """Answers from the socket. One that nobody waits for is counted: it came late, twice, or is not ours."""
        for item in outputs.items:
            self.tokens += len(item.output_ids)
            answer = self._waiting.get(item.rid) or self._left.pop(item.rid, None)
            if answer is None or answer.done():
                self.unknown += 1
                log.warning("%s: an answer to request %s, which nobody waits for", self.name, item.rid)
            else:
                answer.set_result(item)

    async def settle(self) -> None:
        """Until the engine has answered the requests whose callers were cancelled. Raises TimeoutError when it does not."""
        left = list(self._left.values())
        if left and (await asyncio.wait(left, timeout=ABORT_TIMEOUT_S))[1]:
            raise TimeoutError(f"{self.name} has not let go of {len(self._left)} aborted requests within {ABORT_TIMEOUT_S:g} s")

    def abort_all(self) -> None:
        """Every request answers at once, with what it has."""
        self._send(Abort())

    def end_phase(self) -> None:
        """The engine leaves its loop. Raises RuntimeError while requests wait: their answers would be lost."""
        if waiting := len(self._waiting) + len(self._left):
            raise RuntimeError(f"{self.name}: the phase can't end while {waiting} requests wait")
        self._send(EndPhase())
