"""Engines that go wrong, as their host sees them. The engines are threads that speak the real messages over the real socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.quickstart import MODEL, write_model
from rlmono.rollout import engines
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.host import NodeHost
from rlmono.rollout.text import Texts
from rlmono.world.channel import HostLink, PrivateFolder
from rlmono.world.messages import Abort, EndPhase, Generate, Heartbeat, Message, Output, Outputs, Sampling
from rlmono.world.roles import RankGrid

Program = Callable[["Engine", Message], None]
TOKENS = 3


class Engine(threading.Thread):
    """One engine's rank: hands every message to `program`, and has a heartbeat while `beats` is set."""

    def __init__(self, address: str, rank: int, program: Program):
        super().__init__(daemon=True)
        self.address, self.rank, self.program, self.beats = address, rank, program, True
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.later: list[tuple[float, Generate]] = []       # (when to answer, request)
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        self.link, beaten = HostLink(self.address, self.rank), 0.0
        while not self.ended.is_set():
            if self.beats and time.monotonic() - beaten > 0.1:
                self.link.send(Heartbeat())
                beaten = time.monotonic()
            for entry in [x for x in self.later if x[0] <= time.monotonic()]:
                self.later.remove(entry)
                self.answer(entry[1])
            if not self.link.socket.poll(20):
                continue
            message = self.link.receive(1, "a message")
            if isinstance(message, EndPhase):
                break
            if isinstance(message, Generate):
                self.requests.append(message)
            elif isinstance(message, Abort):
                self.aborted.append(message.rid)
            self.program(self, message)
        self.link.close()
        self.ended.set()

    def answer(self, request: Generate, rid: str = "", error: str = "", finish: str = "stop") -> None:
        """With the last token of its prompt, so that it can be told whose answer it is."""
        ids = [] if error else request.input_ids[-1:] * TOKENS
        self.link.send(Outputs([Output(rid or request.rid, ids, [-0.5] * len(ids), finish, 1, error=error)]))


def healthy(engine: Engine, message: Message) -> None:
    if isinstance(message, Generate):
        engine.answer(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "model"
    write_model(folder, 0)
    (folder / "reward.py").write_text("def reward(args, sample, **kwargs):\n    return float(sample.tokens[-1])\n")
    return folder


class World:
    """A node with engines, its host and the controller's view of it."""

    def __init__(self, cluster: Cluster, engines: list[Engine]):
        self.cluster, self.engines = cluster, engines

    async def groups(self, *groups: list[Sample], timeout_s: float = 20) -> list[list[Sample]]:
        runs = [self.cluster.run_group(g, Sampling(TOKENS), False) for g in groups]
        return await self.cluster.gather(runs, timeout_s, "generating")


@contextlib.asynccontextmanager
async def world(model: Path, *programs: Program, **options: Any) -> AsyncIterator[World]:
    config = dataclasses.replace(Config(), hf_checkpoint=str(model), model=MODEL, colocate=True, actor_num_gpus_per_node=len(programs),
                                 custom_rm_path=f"{model}/reward.py:reward", phase_timeout_s=60.0, **options)
    grid = RankGrid.for_config(config, 1, len(programs) + 1)
    folder, context = PrivateFolder("faults"), zmq.asyncio.Context()
    cluster = Cluster(config, grid, NodeHost(config, grid, grid.hosts[0], folder, context, lambda *_: None), None)
    ranks = [Engine(folder.address, rank, program) for rank, program in enumerate(programs)]
    try:
        await cluster.start()
        gc.unfreeze()           # it was for the life of a host
        yield World(cluster, ranks)
    finally:
        for engine in ranks:
            engine.ended.set()
            engine.join(10)
        await cluster.close()
        context.term()
        folder.close()


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(program, 60))


def group(number: int, size: int = 2) -> list[Sample]:
    """Its samples' prompts end with their numbers."""
    return [Sample(index=number * size + i, group_index=number, prompt="p", tokens=[5, 10 + number * size + i]) for i in range(size)]


def check(samples: list[Sample]) -> None:
    """Each sample has its own answer, and its own reward."""
    for s in samples:
        assert s.tokens[2:] == [10 + s.index] * TOKENS and s.response_length == TOKENS and s.reward == 10 + s.index, s


# ---------------------------------------------------------------- engines that are silent

def test_an_engine_that_is_silent_while_it_has_requests_ends_the_run(model: Path) -> None:
    """It has answered before: only for its first answer it has as long as for its start."""
    def program(engine: Engine, message: Message) -> None:
        if len(engine.requests) <= 2:
            return healthy(engine, message)
        engine.beats = False

    async def main() -> None:
        async with world(model, healthy, program, heartbeat_timeout_s=1.0, start_timeout_s=50.0) as w:
            await w.groups(group(0), group(1))
            await asyncio.sleep(2)          # nothing to do: silence means nothing
            with pytest.raises(RuntimeError, match=r"engine 1 \(rank 1\) has 2 requests.*taken for dead.*heartbeat-timeout-s 1;"):
                await w.groups(group(2), group(3))
    run(main())


def test_an_engine_may_be_as_slow_as_it_likes_while_its_heart_beats(model: Path) -> None:
    def slow(engine: Engine, message: Message) -> None:
        if isinstance(message, Generate):
            engine.later.append((time.monotonic() + 2.0, message))

    async def main() -> None:
        async with world(model, slow, heartbeat_timeout_s=1.0, start_timeout_s=1.0) as w:
            (samples,) = await w.groups(group(0))
            check(samples)
    run(main())


# ---------------------------------------------------------------- answers that go wrong

async def outcome(w: World, *groups: list[Sample]) -> tuple[list[list[Sample]], dict[str, float]]:
    """(groups that came back, their samples checked; failures and strays as the metrics get them)."""
    w.cluster.failures.begin("the test", 100)
    done = await w.groups(*groups)
    for samples in done:
        check(samples)
    return done, w.cluster.failures.counts("failed/") | w.cluster.take_strays()


def test_answers_in_any_order_go_to_their_samples(model: Path) -> None:
    def last_first(engine: Engine, message: Message) -> None:
        if len(engine.requests) == 8:
            for request in reversed(engine.requests):
                engine.answer(request)

    async def main() -> None:
        async with world(model, last_first) as w:
            done, counts = await outcome(w, *map(group, range(4)))
            assert [[s.index for s in g] for g in done] == [[0, 1], [2, 3], [4, 5], [6, 7]] and counts == {}
    run(main())


def test_answers_that_come_twice_or_to_nobodys_request_are_counted_and_change_nothing(model: Path) -> None:
    def program(engine: Engine, message: Message) -> None:
        if isinstance(message, Generate):
            if engine.requests[0] is message:
                engine.answer(message, rid="0123456789abcdef")
                engine.answer(message, rid="short")
            engine.answer(message)
            if len(engine.requests) % 2:
                engine.answer(message)

    async def main() -> None:
        async with world(model, program) as w:
            _, counts = await outcome(w, *map(group, range(3)))
            await asyncio.sleep(0.3)
            _, more = await outcome(w, group(3))
            assert {k: counts.get(k, 0) + more.get(k, 0) for k in counts | more} == {
                "rollout/stray_answers/unknown": 2, "rollout/stray_answers/twice": 4}
            w.cluster.end_phase()
    run(main())


def late(engine: Engine, message: Message) -> None:
    """The first request is answered long after its deadline, and its abort changes nothing."""
    if isinstance(message, Generate):
        engine.later.append((time.monotonic() + (2.5 if engine.requests[0] is message else 0.0), message))


def test_a_request_that_is_answered_late_fails_its_sample_alone(model: Path) -> None:
    async def main() -> None:
        async with world(model, late, generate_timeout_s=1.0) as w:
            done, counts = await outcome(w, group(0, 4), group(1, 4))
            assert [len(g) for g in done] == [3, 4] and counts == {"failed/engine_timeout": 1, "rollout/stray_answers/late": 1}
            (engine,) = w.engines
            assert engine.aborted == [engine.requests[0].rid]
            w.cluster.end_phase()           # the engine has answered: nothing is left
            await asyncio.to_thread(engine.ended.wait, 10)
            assert engine.ended.is_set()
    run(main())


def test_a_request_that_is_never_answered_fails_its_sample_and_is_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when it is aborted. Its answer, when it comes after all, is late and nobody's."""
    monkeypatch.setattr(engines, "ABORT_TIMEOUT_S", 0.5)

    def program(engine: Engine, message: Message) -> None:
        if isinstance(message, Generate):
            if len(engine.requests) == 9:
                engine.answer(engine.requests[0])
            if len(engine.requests) > 1:
                engine.answer(message)

    async def main() -> None:
        async with world(model, program, generate_timeout_s=1.0) as w:
            done, counts = await outcome(w, group(0, 4), group(1, 4))
            assert [len(g) for g in done] == [3, 4]
            assert counts == {"failed/engine_timeout": 1, "rollout/stray_answers/missing": 1}
            _, counts = await outcome(w, group(2, 4))
            assert counts == {"rollout/stray_answers/late": 1}
            w.cluster.end_phase()
    run(main())


def test_a_refused_request_fails_its_sample_alone(model: Path) -> None:
    def program(engine: Engine, message: Message) -> None:
        if isinstance(message, Generate):
            engine.answer(message, error="no room for it" if message.input_ids[-1] == 11 else "")

    async def main() -> None:
        async with world(model, program) as w:
            done, counts = await outcome(w, group(0), group(1))
            assert [len(g) for g in done] == [1, 2] and counts == {"failed/engine_refused": 1}
    run(main())


def test_an_engine_that_refuses_everything_ends_the_run(model: Path) -> None:
    def program(engine: Engine, message: Message) -> None:
        if isinstance(message, Generate):
            engine.answer(message, error="no room for it")

    async def main() -> None:
        async with world(model, program) as w:
            w.cluster.failures.begin("generating rollout 0", 8)
            with pytest.raises(RuntimeError, match=r"generating rollout 0: \d of 8 samples have failed \(\d x engine_refused\).*"
                                                   r"engine 0 \(rank 0\) refused a request of 2 \+ 3 tokens: no room for it"):
                await w.groups(group(0), group(1))
    run(main())


def test_a_phase_cannot_end_while_a_request_waits(model: Path) -> None:
    async def main() -> None:
        async with world(model, lambda *_: None) as w:
            running = asyncio.create_task(w.groups(group(0)))
            while not w.cluster.host.engines[0].waiting:
                await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="can't end while 2 requests wait"):
                w.cluster.end_phase()
            running.cancel()
            await asyncio.wait([running])
    run(main())


# ---------------------------------------------------------------- texts

def test_texts_are_those_of_the_tokenizer(model: Path) -> None:
    """Also of many at once, with and without special tokens, and of nothing; one that is given up holds up nobody."""
    async def main() -> None:
        for skip in (False, True):
            texts = Texts(tokenizer, skip)
            batch = [[7, 8, 2, 9 + i % 30] * (i % 5) for i in range(100)]
            asked = [asyncio.create_task(texts.decode(ids)) for ids in batch]
            await asyncio.sleep(0)
            asked.pop(1).cancel()
            assert await asyncio.gather(*asked) == [tokenizer.decode(ids, skip) for i, ids in enumerate(batch) if i != 1]
            with pytest.raises((OverflowError, TypeError)):
                await texts.decode([-1])
            assert await texts.decode(batch[3]) == tokenizer.decode(batch[3], skip)
            texts.close()
    tokenizer = Tokenizer(str(model))
    assert tokenizer._decodes_in_rust and tokenizer.byte_table is None
    run(main())
