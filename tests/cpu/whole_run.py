"""A whole run in this process without torch: the real controller, cluster, host and checkpoints, and stand-ins for what is on devices.

An engine writes tokens that are a function of the request's seed, the position and the weights' version, each request at a speed of its
own that another run does not repeat. A run can be killed at any message; what is on disk is all that is left of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq.asyncio

from rlmono.checkpoint import store
from rlmono.checkpoint.store import CheckpointStore
from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.loop import host as program
from rlmono.observe.metrics import MetricsLog
from rlmono.observe.progress import Progress
from rlmono.rollout import host as rollout_host
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.controller import Controller
from rlmono.rollout.host import NodeHost
from rlmono.world.messages import Abort, EndPhase, Generate, Message, Output, Outputs, Report, TrainBatch, decode
from rlmono.world.roles import RankGrid

STOP = 2


class Tokenizer:
    """Characters are tokens."""

    eos_ids = (STOP,)
    byte_table = None

    def __init__(self, folder: str = ""):
        pass

    def render(self, prompt: str, tools: Any = None, apply_chat_template: bool = False) -> list[int]:
        return [ord(c) for c in prompt]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))

    def decode_batch(self, many: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids) for ids in many]


class Rewards:
    """1 where the response's tokens add up to an even number; it takes as long as it likes."""

    def __init__(self, config: Config):
        self.noise = random.Random()
        self.turns: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def abandon(self) -> None:
        for turn in self.turns:
            turn.cancel()

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self.turns.add(turn)
        loop.call_soon(lambda: turn.done() or turn.set_result(None))
        try:
            await turn
        finally:
            self.turns.discard(turn)

    async def reward(self, samples: list[Sample], group: bool = False) -> None:
        for sample in samples:
            for _ in range(self.noise.randrange(3)):
                await self._turn()
            sample.reward = float(sum(sample.tokens[-sample.response_length:]) % 2 == 0)


class Engine:
    """Some requests get a token in a turn of the loop, others not."""

    def __init__(self, run: Run, rank: int):
        self.run, self.rank, self.version = run, rank, 0
        self.requests: dict[str, Generate] = {}
        self.done: dict[str, list[int]] = {}

    def take(self, message: Message) -> None:
        if isinstance(message, Generate):
            self.requests[message.rid], self.done[message.rid] = message, []
        elif isinstance(message, Abort):
            for rid in [message.rid] if message.rid else list(self.requests):
                self.finish(rid, "abort")
        elif isinstance(message, EndPhase):
            assert not self.requests

    def step(self) -> None:
        for rid, request in list(self.requests.items()):
            if self.run.noise.random() < 0.6:
                continue
            ids, s = self.done[rid], request.sampling
            draw = random.Random(f"{s.seed if self.run.config.deterministic else self.run.noise.random()} "
                                 f"{len(request.input_ids) + len(ids)} {self.version}")
            ids.append(STOP if draw.random() < 0.08 else draw.randrange(65, 90))
            if ids[-1] in s.stop_token_ids:
                self.finish(rid, "stop")
            elif len(ids) == s.max_new_tokens:
                self.finish(rid, "length")

    def finish(self, rid: str, how: str) -> None:
        ids = self.done.pop(rid)
        del self.requests[rid]
        self.run.from_device(self.rank, Outputs([Output(rid, ids, [-1 / (t + self.version) for t in ids], how, self.version)]))


class Run:
    """One attempt of a run. `trained` is what each rollout's trainers were sent; `killed` whether it was ended by `kill_at` messages."""

    def __init__(self, config: Config, seed: int, kill_at: int = 0):
        self.config, self.noise, self.kill_at = config, random.Random(seed), kill_at
        self.messages, self.turns, self.killed = 0, 0, False
        self.trained: dict[int, list[TrainBatch]] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def go(self) -> Run:
        asyncio.run(self._go())
        return self

    async def _go(self) -> None:
        c = self.config
        self.prompts, plan = program.plan_run(c, f"{self.noise.random()}")
        self.grid = RankGrid.for_config(c, 1, 3)
        self.store = CheckpointStore(c, f"{self.noise.random()}")
        self.start, self.num_rollout = plan.start, plan.num_rollout
        self.rollout_id = dict.fromkeys(self.grid.devices, plan.start)
        context = zmq.asyncio.Context()
        self.host = NodeHost(c, self.grid, self.grid.hosts[0], SimpleNamespace(address="inproc://devices"), context, lambda *_: None)   # type: ignore
        self.host._send = self.to_device        # type: ignore[method-assign]
        self.cluster = Cluster(c, self.grid, self.host, None)
        self.engines = {ranks[0]: Engine(self, ranks[0]) for ranks in self.grid.engines}
        for engine in self.engines.values():
            engine.version = plan.start
        metrics = MetricsLog(Path(str(c.run_dir)), [])
        metrics.truncate_from(plan.start)
        controller = Controller(c, self.cluster, self.prompts, self.store, metrics, Progress("none", plan.num_rollout, ""), Path(str(c.run_dir)),
                                plan.start)
        await self.cluster.start()
        devices = asyncio.create_task(self._devices())
        self.task = asyncio.create_task(controller.run())
        for rank in self.grid.devices:
            self.report(rank, "ready", plan.start, dp_rank=rank)
        try:
            await asyncio.wait_for(self.task, 60)
        except asyncio.CancelledError:
            assert self.killed
        finally:
            devices.cancel()
            await self.cluster.close()
            metrics.close()
            context.destroy(linger=0)

    async def _devices(self) -> None:
        while True:
            self.turns += 1
            for engine in self.engines.values():
                if not self.killed:
                    engine.step()
            await asyncio.sleep(0)

    def count(self) -> bool:
        """One more message; False when this run is dead."""
        self.messages += 1
        if self.messages == self.kill_at:
            self.killed = True
            self.task.cancel()
        return not self.killed

    def from_device(self, rank: int, message: Message) -> None:
        if not self.count():
            return
        if isinstance(message, Outputs):
            self.host._by_rank[rank].deliver(message)
        else:
            self.cluster._from_device(rank, message)

    def report(self, rank: int, kind: str, rollout_id: int, **data: Any) -> None:
        self.from_device(rank, Report(kind, rollout_id, data))

    def to_device(self, rank: int, payload: bytes) -> None:
        if not self.count():
            return
        message = decode(payload)
        if isinstance(message, TrainBatch):
            self._train(rank, message)
        else:
            self.engines[rank].take(message)

    def _train(self, rank: int, batch: TrainBatch) -> None:
        self.trained.setdefault(batch.rollout_id, []).append(batch)
        r = batch.rollout_id
        self.report(rank, "trained", r, metrics={}, reports=rank == 0)
        if self.store.due(r, self.num_rollout):
            folder = self.store.partial(r)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{rank}").write_text(str(r))
            self.report(rank, "saved", r)
        self.engines[rank].version = r + 1
        self.report(rank, "updated", r)


def job(folder: Path, prompts: int = 40, **values: Any) -> Config:
    """A run of 6 rollouts of 4 groups of 4 samples on two engines."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "data.jsonl").write_text("".join(json.dumps({"input": f"prompt {i}"}) + "\n" for i in range(prompts)))
    settings: dict[str, Any] = dict(
        hf_checkpoint=str(folder / "model"), prompt_data=(str(folder / "data.jsonl"),), colocate=True, num_rollout=6, rollout_batch_size=4,
        n_samples_per_prompt=4, rollout_max_response_len=40, save=str(folder / "save"), load=str(folder / "save"), save_interval=2,
        run_dir=str(folder / "run"), custom_rm_path="none", num_steps_per_rollout=1, sglang_server_concurrency=8, device="cpu",
        model={"max_position_embeddings": 4096})
    (folder / "run").mkdir()
    return dataclasses.replace(Config(), **{**settings, **values})


@pytest.fixture(scope="module")
def whole_runs() -> Any:
    """The real thing but for tokenizer, rewards and the lock of the save folder."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="whole-run-") as folder:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(program, "Tokenizer", Tokenizer)
        patch.setattr(rollout_host, "Tokenizer", Tokenizer)
        patch.setattr(rollout_host, "RewardPool", Rewards)
        patch.setattr(store, "hold", lambda path: 0)        # the lock of a process that is killed goes with it; this one lives on
        yield


def fresh(**values: Any) -> Config:
    return job(Path(tempfile.mkdtemp()), **values)
