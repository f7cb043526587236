"""Stand-ins for the engines of a node, in one process: `python tests/bench/engines.py FOLDER ADDRESS ENGINES TOKENS RATE DELAY_S SPREAD`.

They speak the real messages over the real unix socket. Each request is answered with TOKENS tokens, RATE a second over all engines (0: as
fast as it goes), and not before a time of its own, DELAY_S · (1 ± SPREAD), evenly drawn. An answer begins with the last two tokens of its
prompt, and where its first four logprobs would be it has the times when its request came and when it went (`times`). Its text is
that of FOLDER/texts/TOKENS.txt: engines make theirs each in its own rank, and here one process would take the time of eight.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import zmq

from rlmono.world.channel import HostLink
from rlmono.world.messages import EndPhase, Generate, Output, in_parts

STEP_S = 0.005
"""Answers come in steps, as a scheduler's do."""
VOCABULARY = 150_000


def main(folder: str, address: str, engines: int, tokens: int, rate: float, delay_s: float, spread: float) -> None:
    links = [HostLink(address, rank) for rank in range(engines)]
    draw, poller = random.Random(0), zmq.Poller()
    ids, log_probs = array("i", answer(tokens)), array("f", [-draw.random() for _ in range(tokens)])
    text = (Path(folder) / "texts" / f"{tokens}.txt").read_bytes().decode()

    def answered(request: Generate, came: float, went: float) -> Output:
        ids[:2], log_probs[:4] = array("i", request.input_ids[-2:]), array("f", [*in_two(came), *in_two(went)])
        return Output(request.rid, ids.tobytes(), log_probs.tobytes(), "length", 1, text=text)
    by_socket = {link.socket: link for link in links}
    for link in links:
        poller.register(link.socket, zmq.POLLIN)
        link.report("ready", 0)
    later: list[tuple[float, int, float, HostLink, Generate]] = []        # a heap: due when, number, came when
    waiting: deque[tuple[float, HostLink, Generate]] = deque()
    numbers, credit, stepped, parent = itertools.count(), 0.0, time.monotonic(), os.getppid()
    while os.getppid() == parent:       # else the bench was killed
        for socket, _ in poller.poll(1 if waiting or later else 100):
            link = by_socket[socket]
            while (message := link.receive_now()) is not None:
                if isinstance(message, EndPhase):
                    return
                assert isinstance(message, Generate), message
                came = time.monotonic()
                heapq.heappush(later, (came + delay_s * draw.uniform(1 - spread, 1 + spread), next(numbers), came, link, message))
        now = time.monotonic()
        while later and later[0][0] <= now:
            waiting.append(heapq.heappop(later)[2:])
        if not delay_s and now - stepped < STEP_S:
            continue
        credit, stepped = min(credit + rate * (now - stepped), max(1.0, rate * 0.1)) if rate else float(len(waiting)), now
        if not delay_s:
            waiting.rotate(draw.randrange(len(waiting) + 1))        # in another order
        step: dict[HostLink, list[tuple[Generate, float]]] = {}
        while waiting and credit >= 1:
            came, link, request = waiting.popleft()
            credit -= 1
            step.setdefault(link, []).append((request, came))
        for link, answers in step.items():
            went = time.monotonic()
            for part in in_parts(answered(*a, went) for a in answers):
                link.send(part)


def in_two(time_s: float) -> tuple[float, float]:
    """Two numbers of fp32 that add up to it."""
    first = array("f", [time_s])[0]
    return first, time_s - first


def times(log_probs: Sequence[float]) -> tuple[float, float]:
    """(when the request came, when its answer went), monotonic seconds."""
    return log_probs[0] + log_probs[1], log_probs[2] + log_probs[3]


def answer(tokens: int) -> list[int]:
    """The ids of every answer but for their first two, which are each one's own."""
    draw = random.Random(tokens)
    return [draw.randrange(VOCABULARY) for _ in range(tokens)]


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), *map(float, sys.argv[5:8]))      # type: ignore[call-arg]
