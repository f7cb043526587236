"""A node's host: its device ranks' socket, its engines, its rewards.

The controller (host rank 0) has the `NodeHost` of its own node in its process, and talks to the others' through the mesh.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Callable, Optional

import msgspec
import zmq.asyncio

from rlmono.config.schema import Config
from rlmono.data.heap import keep_freed_memory
from rlmono.data.sample import ABORTED, FAILED, FINISHED, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rewards.pool import RewardPool
from rlmono.rollout.endpoint import Endpoint
from rlmono.rollout.engines import EngineClient
from rlmono.rollout.functions import SampleFailed, function_at, generate_function, make_samples
from rlmono.rollout.garbage import Garbage
from rlmono.rollout.generate import GenerateState
from rlmono.rollout.tasks import cancel, send_now, while_healthy
from rlmono.rollout.text import Texts
from rlmono.world import messages
from rlmono.world.channel import HEARTBEAT_S, DeviceSocket, HostMesh, PrivateFolder
from rlmono.world.messages import EndPhase, Failed, Failure, Goodbye, GroupDone, Heartbeat, Message, Outputs, Relay, RunGroup, decode, encode
from rlmono.world.roles import RankGrid

log = logging.getLogger(__name__)


class NodeHost:
    """One node. `upward(rank, message)` takes what its device ranks have to say to the controller."""

    def __init__(self, config: Config, grid: RankGrid, rank: int, folder: PrivateFolder, context: zmq.asyncio.Context,
                 upward: Callable[[int, Message], None]):
        self.config, self.grid, self.rank, self._upward = config, grid, rank, upward
        self._devices = DeviceSocket(context, folder.address)
        self.engines: dict[int, EngineClient] = {}
        self._by_rank: dict[int, EngineClient] = {}
        self._running = 0               # groups
        self._ends_now = False          # and all of them have been aborted
        self._garbage = Garbage()
        self.serves = bool(grid.engines)
        if not self.serves:
            return
        self.tokenizer = Tokenizer(config.hf_checkpoint or "")
        self.texts = Texts(self.tokenizer, config.rollout_skip_special_tokens)
        self.rewards = RewardPool(config)
        self._generate = generate_function(config)
        self._logged: set[str] = set()
        self._endpoint = Endpoint(config.hf_checkpoint or "")
        for i, ranks in enumerate(grid.engines):
            if grid.node_of(ranks[0]) == grid.node_of(rank):
                self.engines[i] = self._by_rank[ranks[0]] = self._client(i, ranks[0])

    def _client(self, engine: int, first_rank: int) -> EngineClient:
        name, concurrency = f"engine {engine} (rank {first_rank})", self.config.sglang_server_concurrency
        return EngineClient(name, lambda m: self._send(first_rank, encode(m)), concurrency)

    async def start(self) -> None:
        """Start the reward workers, and see that memory does not hold up requests."""
        if self.serves:
            await self.rewards.start()
            self._garbage.start()
            keep_freed_memory()

    async def close(self) -> None:
        self._garbage.close()
        if self.serves:
            await self._endpoint.close()
            await self.rewards.close()
            self.texts.close()
        self._devices.close()

    async def read_devices(self) -> None:
        """For ever: answers go to their engine's client, everything else up to the controller."""
        def take(rank: int, payload: bytes) -> None:
            message = decode(payload)
            if isinstance(message, Outputs):
                self._by_rank[rank].deliver(message)
            elif isinstance(message, Heartbeat):
                self._by_rank[rank].heard()
            else:
                self._upward(rank, message)
        await self._devices.serve(take)

    async def watch_engines(self) -> None:
        """For ever: raises RuntimeError for an engine that has requests and is silent. It is looked at twice, so that what has come is read.
        Before its first answer an engine may compile kernels for long: that is still its start."""
        c, suspects = self.config, set[EngineClient]()
        while True:
            silent = {e for e in self.engines.values() if e.silent_s() > (c.heartbeat_timeout_s if e.tokens else c.start_timeout_s)}
            for engine in suspects & silent:
                raise RuntimeError(f"{engine.name} has {engine.waiting} requests, and nothing has come from it for {engine.silent_s():.0f} s: "
                                   f"taken for dead (--heartbeat-timeout-s {c.heartbeat_timeout_s:g}; before a first answer --start-timeout-s "
                                   f"{c.start_timeout_s:g})")
            suspects = silent
            await asyncio.sleep(min(HEARTBEAT_S, c.heartbeat_timeout_s / 4))

    def to_device(self, rank: int, payload: bytes) -> None:
        """A message of the controller for a device rank of this node; EndPhase is first checked against what still waits."""
        if rank in self._by_rank and isinstance(decode(payload), EndPhase):
            self._by_rank[rank].end_phase()
        else:
            self._send(rank, payload)

    def _send(self, rank: int, payload: bytes) -> None:
        self._devices.send(rank, payload)

    async def run_group(self, job: RunGroup) -> GroupDone:
        """Generate and reward one group. A sample that comes to nothing is a Failure; in an evaluation it stays, with reward 0."""
        started = time.perf_counter()
        self._begin_group()
        try:
            samples = await asyncio.gather(*(self._run_sample(job, s) for s in job.samples))
            kept = [s for made, _ in samples for s in made]
            if self.config.group_rm and not any(s.status == ABORTED for s in kept):
                await self._reward([s for s in kept if s.status != FAILED], group=True)
        except Exception as e:
            log.exception("group %d failed", job.samples[0].group_index)
            return GroupDone(job.job, [], error=f"{type(e).__name__}: {e}")
        finally:
            self._running -= 1
            if not self._running:
                self._garbage.rest()
        engine = self.engines[job.engine]
        idle_s, slack_s = engine.rest_s()
        return GroupDone(job.job, kept, seconds=time.perf_counter() - started, failures=[f for _, f in samples if f is not None],
                         tokens=engine.take_tokens(), idle_s=idle_s, slack_s=slack_s, strays=engine.take_strays())

    def _begin_group(self) -> None:
        if self._running == 0:          # the controller begins a phase when all groups of the one before have answered
            self._ends_now = False
            self._garbage.busy()
            for engine in self.engines.values():
                engine.begin_phase()
        self._running += 1

    def abort_groups(self) -> None:
        """Every group that runs here answers now: its samples with what they have, and without a reward where that is not there yet."""
        if not self._running:
            return
        self._ends_now = True
        for engine in self.engines.values():
            engine.abort_all()
        self.rewards.abandon()

    def _failed(self, sample: Sample, why: SampleFailed, evaluation: bool) -> tuple[list[Sample], Failure]:
        if (cause := f"{why.outcome}: {why}"[:200]) not in self._logged:
            self._logged.add(cause)
            log.warning("sample %d (counted; not shown again for this cause): %s: %s", sample.index, why.outcome, why, exc_info=why.__cause__)
        failure, key = Failure(sample.index, why.outcome, str(why)), sample.reward_key or self.config.reward_key
        if not evaluation:
            return [], failure
        return [Sample(index=sample.index, group_index=sample.group_index, prompt=sample.prompt, label=sample.label, metadata=sample.metadata,
                       status=FAILED, reward_key=key, reward={key: 0.0} if key else 0.0, remarks=[why.outcome])], failure

    async def _run_sample(self, job: RunGroup, sample: Sample) -> tuple[list[Sample], Optional[Failure]]:
        """What the generate function made of one sample, rewarded."""
        state = GenerateState(self.config, self.engines[job.engine], self.tokenizer, sample, job.sampling, job.evaluation,
                              self._endpoint, self.texts)
        function = self._generate if sample.generate_function_path is None else function_at(sample.generate_function_path)
        try:
            samples = [sample]
            if sample.status not in FINISHED:           # else it came back from an earlier rollout
                samples = await make_samples(function, self.config, sample, job.sampling, state)
        except SampleFailed as e:
            await self.engines[job.engine].settle()
            if self._ends_now:                          # no wonder; the prompt comes again
                return [], None
            return self._failed(sample, e, job.evaluation)
        if not self.config.group_rm:
            await self._reward([s for s in samples if s.status != ABORTED])
        return samples, None

    async def _reward(self, samples: list[Sample], group: bool = False) -> None:
        """Reward samples, unless all groups are aborted: then those that have no reward yet stay without."""
        if self._ends_now:
            return
        try:
            await self.rewards.reward(samples, group)
        except asyncio.CancelledError:      # abandoned; or this task itself is cancelled
            if not self._ends_now or asyncio.current_task().cancelling():       # type: ignore[union-attr]
                raise


async def serve_node(host: NodeHost, mesh: HostMesh, timeout_s: float) -> None:
    """The program of every host but the controller's: do what comes over the mesh until the controller says goodbye.

    Raises TimeoutError when the controller is silent for `timeout_s`, and RuntimeError when it says that the run has failed.
    """
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    up = lambda message: send_now(mesh.socket, [encode(message)])  # noqa: E731
    host._upward = lambda rank, message: up(Relay(rank, msgspec.Raw(encode(message))))

    async def read_mesh() -> None:
        while True:
            try:
                payload = await asyncio.wait_for(mesh.socket.recv(), timeout_s)
            except TimeoutError:
                raise TimeoutError(f"host rank {host.rank}: nothing from the controller within {timeout_s:g} s; its node is taken for dead") from None
            message = decode(payload)
            if not isinstance(message, Heartbeat):
                inbox.put_nowait(message)

    async def beat() -> None:
        while True:
            up(Heartbeat())
            await asyncio.sleep(HEARTBEAT_S)

    async def run(job: RunGroup) -> None:
        done = await host.run_group(job)
        try:
            up(done)
        except Exception as e:          # the controller would wait for it
            log.exception("what became of group %d cannot be sent", job.samples[0].group_index)
            up(GroupDone(job.job, [], error=f"what its samples hold cannot be sent: {type(e).__name__}: {e}"))

    running: set[asyncio.Task[None]] = set()
    loops = {"reading from the controller": read_mesh(), "the heartbeat": beat(), "reading from devices": host.read_devices(),
             "watching the engines": host.watch_engines()}
    background = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
    try:
        while True:
            message = await while_healthy(inbox.get(), background, None, "serving the controller")
            if isinstance(message, RunGroup):
                task = asyncio.create_task(run(message))
                running.add(task)
                task.add_done_callback(running.discard)
            elif isinstance(message, messages.AbortGroups):
                host.abort_groups()
            elif isinstance(message, Goodbye):
                if message.error:
                    raise RuntimeError(f"the controller has ended the run: {message.error}")
                return
            elif isinstance(message, Relay):
                host.to_device(message.rank, bytes(message.payload))
    except BaseException as e:
        if not isinstance(e, (ConnectionError, TimeoutError)):      # the controller is there: tell it
            up(Failed(f"{type(e).__name__}: {e}"))
        raise
    finally:
        await cancel([*background, *running])
