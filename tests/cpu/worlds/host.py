"""Rank 0's stand-in for the host rank: it sends requests to engines and collects what they answer, while the engines serve."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
import zmq

from rlmono.world.channel import HostLink
from rlmono.world.messages import Abort, EndPhase, Generate, Heartbeat, Message, Output, Outputs, Sampling, decode, encode

DEADLINE_S = 60


class Host:
    """Build it on every rank; `engines` are the ranks of each engine."""

    def __init__(self, engines: Sequence[Sequence[int]]):
        self.rank, self.firsts = dist.get_rank(), [e[0] for e in engines]
        folder: list[Any] = [tempfile.mkdtemp(prefix="engine-") if self.rank == 0 else None]
        dist.broadcast_object_list(folder)
        address = f"ipc://{Path(folder[0])}/host"
        if self.rank == 0:
            self._router = zmq.Context().socket(zmq.ROUTER)
            self._router.bind(address)
        self.link = HostLink(address, self.rank)

    def phase(self, engine: Any, program: Callable[[], Any], ended: Sequence[int] = ()) -> Any:
        """All ranks serve one phase, while `program` runs beside rank 0 with `send` and `answers`. All ranks get what it returned.
        The engines in `ended` are those whose phase the program itself ends."""
        done: list[Any] = [None]
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done[0] = program()
            except BaseException as e:
                failed.append(e)
            for first in self.firsts:
                if failed or first not in ended:
                    self.send(first, EndPhase())
        thread = threading.Thread(target=run, daemon=True)
        if self.rank == 0:
            thread.start()
        engine.serve()
        engine.drain()
        if self.rank == 0:
            thread.join(DEADLINE_S)
        dist.broadcast_object_list(done)
        if failed:
            raise failed[0]
        return done[0]

    def send(self, rank: int, message: Message) -> None:
        self._router.send_multipart([str(rank).encode(), encode(message)])

    def answers(self, count: int, until: Optional[str] = None) -> dict[str, Output]:
        """The next `count` answers by request; or those up to request `until`."""
        got: dict[str, Output] = {}
        while len(got) < count and until not in got:
            message = self._next(DEADLINE_S)
            if message is None:
                raise TimeoutError(f"{len(got)} of {count} answers, then nothing for {DEADLINE_S} s")
            assert isinstance(message, Outputs), message
            for item in message.items:
                assert item.rid not in got, f"{item.rid} answered twice"
                got[item.rid] = item
        return got

    def quiet(self) -> bool:
        """Nothing more has come."""
        return self._next(0.2) is None

    def _next(self, timeout_s: float) -> Optional[Message]:
        """The next message but heartbeats; None when there is none in time."""
        end = time.monotonic() + timeout_s
        while self._router.poll(max(0.0, end - time.monotonic()) * 1000):
            message = decode(self._router.recv_multipart()[1])
            if not isinstance(message, Heartbeat):
                return message
        return None

    def generate(self, engine: Any, requests: dict[int, list[Generate]]) -> dict[str, Output]:
        """A phase with these requests, by the engine's first rank; every answer."""
        def program() -> dict[str, Output]:
            for rank, batch in requests.items():
                for request in batch:
                    self.send(rank, request)
            return self.answers(sum(map(len, requests.values())))
        return self.phase(engine, program)      # type: ignore[no-any-return]


def request(number: int, prompt: list[int], tokens: int, seed: Optional[int] = None, temperature: float = 1.0, stop: tuple[int, ...] = (),
            ignore_eos: bool = True) -> Generate:
    return Generate(f"{number:016x}", prompt, Sampling(tokens, temperature, stop_token_ids=stop, ignore_eos=ignore_eos, seed=seed))


def abort(number: int) -> Abort:
    return Abort(f"{number:016x}")
