"""The controller's view of the world: run a group on some engine, send to a rank, and wait for ranks to report."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import Any, Coroutine, Iterable, Sequence

import msgspec
import zmq

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.rollout.failures import Failures
from rlmono.rollout.host import NodeHost
from rlmono.rollout.loads import Loads
from rlmono.rollout.tasks import cancel, send_now, while_healthy
from rlmono.world import messages
from rlmono.world.channel import HEARTBEAT_S, HostMesh
from rlmono.world.messages import EndPhase, Failed, Goodbye, GroupDone, Heartbeat, Message, Relay, Report, RunGroup, Sampling, decode, encode
from rlmono.world.roles import RankGrid


class Cluster:
    """All nodes: the controller's own in this process, others over the mesh (None when there are no others)."""

    def __init__(self, config: Config, grid: RankGrid, host: NodeHost, mesh: HostMesh | None):
        self.config, self.grid, self.host, self.mesh = config, grid, host, mesh
        host._upward = self._from_device
        self.failures = Failures(config.rollout_max_failed_share)
        self._strays: Counter[str] = Counter()
        self.loads = Loads(len(grid.engines), config.sglang_server_concurrency)
        self._jobs: dict[int, asyncio.Future[GroupDone]] = {}
        self._numbers = itertools.count()
        self._reports: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        self._news = asyncio.Event()
        self._background: list[asyncio.Task[Any]] = []
        self._heard: dict[int, float] = {}          # other hosts, from their first message on

    async def start(self) -> None:
        loops = {"reading from devices": self.host.read_devices(), "watching the engines": self.host.watch_engines()}
        if self.mesh is not None:
            loops |= {"reading from hosts": self._read_mesh(self.mesh), "the heartbeat": self._beat(self.mesh)}
        self._background = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        await self.host.start()
        end = time.monotonic() + self.config.start_timeout_s
        while missing := sorted(set(self.grid.hosts[1:]) - set(self._heard)):
            what = f"the controller waits for host rank(s) {missing[:16]} to connect"
            await while_healthy(asyncio.sleep(0.05), self._background, None, what)
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {self.config.start_timeout_s:g} s")

    def watch(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Run a coroutine that never ends beside all others; its failure ends whatever is waited for."""
        self._background.append(asyncio.create_task(loop, name=name))

    async def close(self, error: str = "") -> None:
        """Say goodbye to the other hosts, and why if the run failed, and let go of everything."""
        for rank in self._heard:
            try:
                self._to_host(rank, Goodbye(error))
            except ConnectionError:     # it has gone already
                continue
        await cancel(self._background)
        await self.host.close()

    # ------------------------------------------------------------ groups

    async def run_group(self, samples: list[Sample], sampling: Sampling, evaluation: bool) -> list[Sample]:
        """Generate and reward one prompt's samples on the engine with least to do; without those that came to nothing.
        Raises RuntimeError with the host's text when that failed, or when too many samples have."""
        with self.loads.carried(samples, sampling) as engine:
            done = await self._run(RunGroup(next(self._numbers), engine, samples, sampling, evaluation))
        self.loads.heard(engine, done)
        if done.error:
            raise RuntimeError(f"group {samples[0].group_index} (prompt line in its metadata: {samples[0].metadata}) failed: {done.error}")
        self._strays.update(done.strays)
        self.failures.add(done.failures)
        return done.samples

    def take_strays(self) -> dict[str, float]:
        """`rollout/stray_answers/…`: answers of engines that nobody waited for, by kind, since the last call."""
        taken, self._strays = self._strays, Counter()
        return {f"rollout/stray_answers/{kind}": float(n) for kind, n in taken.items()}

    def abort_groups(self) -> None:
        """Every group that runs anywhere answers now, with what it has."""
        self.host.abort_groups()
        for rank in self._heard:
            self._to_host(rank, messages.AbortGroups())

    async def _run(self, job: RunGroup) -> GroupDone:
        host = self.grid.host_of(self.grid.engines[job.engine][0])
        if host == self.host.rank:
            return await self.host.run_group(job)
        answer = self._jobs[job.job] = asyncio.get_running_loop().create_future()
        try:
            self._to_host(host, job)
            return await answer
        finally:
            del self._jobs[job.job]

    # ------------------------------------------------------------ ranks

    def send(self, rank: int, message: Message) -> None:
        """To a device rank, wherever it is."""
        payload, host = encode(message), self.grid.host_of(rank)
        if host == self.host.rank:
            self.host.to_device(rank, payload)
        else:
            self._to_host(host, Relay(rank, msgspec.Raw(payload)))

    def end_phase(self) -> None:
        """Every engine leaves its loop; the caller has every answer."""
        for ranks in self.grid.engines:
            self.send(ranks[0], EndPhase())

    async def reports(self, kind: str, rollout_id: int, ranks: Sequence[int], timeout_s: float) -> dict[int, dict[str, Any]]:
        """Each rank's report of that kind for that rollout. Raises TimeoutError that names the ranks that are missing."""
        key, end = (kind, rollout_id), time.monotonic() + timeout_s
        while missing := [r for r in ranks if r not in self._reports.get(key, {})]:
            left = end - time.monotonic()
            what = f"the controller waits for {kind!r} of rollout {rollout_id} from rank(s) {missing[:16]}"
            if left <= 0:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s")
            self._news.clear()
            await while_healthy(self._news.wait(), self._background, left, what)
        return self._reports.pop(key)

    def arrived(self, kind: str) -> dict[int, dict[int, dict[str, Any]]]:
        """rollout -> rank -> reports of that kind that have come and were not asked for before; waits for nobody."""
        return {key[1]: self._reports.pop(key) for key in [k for k in self._reports if k[0] == kind]}

    async def gather(self, groups: Iterable[Any], timeout_s: float, what: str) -> list[Any]:
        """All results, in order; a failure of any, or of the world, ends the wait."""
        tasks = [asyncio.ensure_future(g) for g in groups]
        try:
            return await while_healthy(asyncio.gather(*tasks), self._background, timeout_s, what)
        finally:
            await cancel(t for t in tasks if not t.done())

    # ------------------------------------------------------------ sockets

    def _from_device(self, rank: int, message: Message) -> None:
        if isinstance(message, Report):
            self._reports.setdefault((message.kind, message.rollout_id), {})[rank] = message.data
            self._news.set()
        elif isinstance(message, Failed):
            raise RuntimeError(f"rank {rank} failed: {message.error}")
        else:
            raise RuntimeError(f"rank {rank} sent {type(message).__name__}, which no controller expects")

    def _to_host(self, rank: int, message: Message) -> None:
        assert self.mesh is not None
        try:
            send_now(self.mesh.socket, [str(rank).encode(), encode(message)])
        except zmq.ZMQError as e:
            raise ConnectionError(f"host rank {rank} (node {self.grid.node_of(rank)}) is gone: {e}") from None

    async def _read_mesh(self, mesh: HostMesh) -> None:
        while True:
            identity, payload = await mesh.socket.recv_multipart()
            rank, message = int(identity), decode(payload)
            self._heard[rank] = time.monotonic()
            if isinstance(message, GroupDone):
                answer = self._jobs.get(message.job)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            elif isinstance(message, Relay):
                self._from_device(message.rank, decode(bytes(message.payload)))
            elif isinstance(message, Failed):
                self._from_device(rank, message)

    async def _beat(self, mesh: HostMesh) -> None:
        """Tell the others that this node lives, and see that they do."""
        while True:
            now, limit = time.monotonic(), self.config.heartbeat_timeout_s
            silent = [r for r, heard in self._heard.items() if now - heard > limit]
            if silent:
                raise TimeoutError(f"host rank(s) {silent} (node(s) {[self.grid.node_of(r) for r in silent]}) silent for {limit:g} s: taken for dead")
            for rank in self._heard:
                self._to_host(rank, Heartbeat())
            await asyncio.sleep(HEARTBEAT_S)
