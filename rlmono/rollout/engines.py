"""A host's view of one engine of its node: requests out, answers back."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Callable

from rlmono.world.messages import Abort, EndPhase, Generate, Message, Output, Outputs, Sampling

log = logging.getLogger(__name__)
_numbers = itertools.count()


class EngineClient:
    """Requests to one engine. `send` puts a message on the socket to the engine's first rank."""

    def __init__(self, name: str, send: Callable[[Message], None], concurrency: int):
        self.name, self._send = name, send
        self._room = asyncio.Semaphore(concurrency)
        self._waiting: dict[str, asyncio.Future[Output]] = {}
        self.unknown = 0
        self.tokens = 0

    async def generate(self, input_ids: list[int], sampling: Sampling, timeout_s: float) -> Output:
        """One response. Raises TimeoutError when the engine does not answer in time (it is aborted then), RuntimeError when it refuses."""
        async with self._room:
            rid = f"{next(_numbers):016x}"      # one length: SGLang aborts by prefix
            answer: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
            self._waiting[rid] = answer
            self._send(Generate(rid, input_ids, sampling))
            try:
                output = await asyncio.wait_for(answer, timeout_s)
            except TimeoutError:
                self._send(Abort(rid))
                raise TimeoutError(f"{self.name} has not answered a request of {len(input_ids)} + {sampling.max_new_tokens} tokens "
                                   f"within {timeout_s:g} s; {len(self._waiting)} requests wait there") from None
            finally:
                self._waiting.pop(rid, None)
            if output.error:
                raise RuntimeError(f"{self.name} refused a request of {len(input_ids)} + {sampling.max_new_tokens} tokens: {output.error}")
            return output

    def deliver(self, outputs: Outputs) -> None:
        """Answers from the socket. One that nobody waits for is counted: it came late, twice, or is not ours."""
        for item in outputs.items:
            self.tokens += len(item.output_ids)
            answer = self._waiting.get(item.rid)
            if answer is None or answer.done():
                self.unknown += 1
                log.warning("%s: an answer to request %s, which nobody waits for", self.name, item.rid)
            else:
                answer.set_result(item)

    def abort_all(self) -> None:
        """Every request answers at once, with what it has."""
        self._send(Abort())

    def end_phase(self) -> None:
        """The engine leaves its loop. Raises RuntimeError while requests wait: their answers would be lost."""
        if self._waiting:
            raise RuntimeError(f"{self.name}: the phase can't end while {len(self._waiting)} requests wait")
        self._send(EndPhase())
