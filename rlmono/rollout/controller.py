"""The controller: the run's program, on host rank 0.

    evaluate if due → collect groups → end the phase when every request has answered → schedule packs → send
    → metrics → save with the others → next
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Optional

from rlmono.checkpoint.store import CheckpointStore
from rlmono.config.schema import Config
from rlmono.data.sample import Group, Sample
from rlmono.observe.metrics import MetricsLog
from rlmono.observe.phases import write_timeline
from rlmono.observe.progress import Progress
from rlmono.observe.samples import write_samples
from rlmono.rollout.batch import rollout_statistics, train_batches
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.collect import Collector
from rlmono.rollout.debug import SavedRollouts, save_rollout
from rlmono.rollout.evaluation import Evaluation
from rlmono.rollout.failures import refuse_without_rewards
from rlmono.rollout.prompts import Prompts
from rlmono.rollout.sampling import rollout_sampling

Data = tuple[dict[str, Any], dict[str, bytes]]
"""Of a checkpoint: what state.json says of the data, and the data's files."""


class Controller:
    """One run, from `start` (the first rollout that is not in the checkpoint) to `num_rollout`."""

    def __init__(self, config: Config, cluster: Cluster, prompts: Prompts | SavedRollouts, checkpoints: Optional[CheckpointStore],
                 metrics: MetricsLog, progress: Progress, run_dir: Path, start: int):
        self.config, self.cluster, self.prompts, self.checkpoints = config, cluster, prompts, checkpoints
        self.metrics, self.progress, self.run_dir, self.start = metrics, progress, run_dir, start
        self.evaluation = Evaluation(config, cluster, prompts, metrics, progress, run_dir)
        self.num_rollout = prompts.num_rollout
        self._dp_rank: dict[int, int] = {}
        self._collector = Collector(config, cluster, prompts) if isinstance(prompts, Prompts) else None
        self._spent: dict[str, float] = {}
        self._copied: asyncio.Queue[tuple[int, Data]] = asyncio.Queue()
        self._behind: list[tuple[int, float]] = []

    async def run(self) -> None:
        """The whole run. Every wait inside has a deadline and says who waits for whom."""
        await self._ready()
        self.cluster.watch(self._publish_copied(), "publishing checkpoints")
        for rollout_id in range(self.start, self.num_rollout):
            begun = time.perf_counter()
            self._spent = {}
            if self.evaluation.due(rollout_id):
                self._spent["perf/eval_time"] = await self.evaluation.run(rollout_id)
            groups = await self.collect(rollout_id)
            self._save_debug_data(rollout_id, groups)
            self.cluster.end_phase()
            values = await self.train(rollout_id, groups)
            values |= await self._save_if_due(rollout_id)
            values |= await self._updated(rollout_id)
            self._log(rollout_id, groups, values, time.perf_counter() - begun)
        if self.prompts.eval_sets and self.start < self.num_rollout:
            await self.evaluation.run(self.num_rollout)
        await self._published()
        self._log_behind()
        self.cluster.end_phase()
        self._write_timeline()

    async def _ready(self) -> None:
        c, grid = self.config, self.cluster.grid
        ready = await self.cluster.reports("ready", self.start, grid.devices, c.start_timeout_s)
        self._dp_rank = {r: ready[r]["dp_rank"] for r in grid.trainers}

    # ------------------------------------------------------------ generate

    async def collect(self, rollout_id: int) -> list[Group]:
        """The rollout's groups in submission order, generated and rewarded; in SFT, as the data has them."""
        begun, c, loads = time.perf_counter(), self.config, self.cluster.loads
        if not self.cluster.grid.engines:           # SFT, or saved rollouts
            return self.prompts.next_groups(rollout_id, c.rollout_batch_size)
        assert self._collector is not None
        self.progress.phase("generate", rollout_id, c.rollout_batch_size)
        loads.begin()
        done = await self._collector.collect(rollout_id, rollout_sampling(c, self.prompts.tokenizer.eos_ids), self.progress.advance)
        seconds = time.perf_counter() - begun
        per_device = loads.tokens / seconds / len(self.cluster.grid.engine_ranks)
        self._spent |= {**done.values, **loads.end(), "rollout/generated_tokens": loads.tokens, "perf/rollout_time": seconds,
                        "perf/tokens_per_gpu_per_sec": per_device}
        samples = [s for g in done.groups for s in g]
        write_samples(self.run_dir / "samples" / f"rollout_{rollout_id}.jsonl", samples, c.log_samples, self.prompts.tokenizer.decode)
        refuse_without_rewards(f"rollout {rollout_id}", samples)
        return done.groups

    def _save_debug_data(self, rollout_id: int, groups: list[Group]) -> None:
        if self.config.save_debug_rollout_data is not None:
            path = save_rollout(self.config.save_debug_rollout_data, rollout_id, groups, self.prompts.tokenizer.decode)
            self.progress.message(f"rollout {rollout_id}: samples in {path}")

    # ------------------------------------------------------------ train, save, update

    async def train(self, rollout_id: int, groups: list[Group]) -> dict[str, float]:
        """Send each trainer its share, and wait for the metrics."""
        grid, c = self.cluster.grid, self.config
        if c.deterministic:
            self._write_hashes(rollout_id, groups)
        if not grid.trainers:                       # --debug-rollout-only
            return {}
        self.progress.phase("train", rollout_id)
        batches = train_batches(rollout_id, groups, self.prompts.steps_per_rollout, c, grid.data_parallel_size)
        if self._save_due(rollout_id):
            await self._published()     # one at a time
        for rank in grid.trainers:
            self.cluster.send(rank, batches[self._dp_rank[rank]])
        trained = await self.cluster.reports("trained", rollout_id, grid.trainers, c.phase_timeout_s)
        return next(data["metrics"] for data in trained.values() if data["reports"])

    def _save_due(self, rollout_id: int) -> bool:
        return self.checkpoints is not None and self.checkpoints.due(rollout_id, self.num_rollout)

    async def _save_if_due(self, rollout_id: int) -> dict[str, float]:
        """Wait for the checkpoint; in the background, only until every rank has copied its part to host memory."""
        if not self._save_due(rollout_id):
            return {}
        begun = time.perf_counter()
        self.progress.phase("save", rollout_id)
        devices, data = self.cluster.grid.devices, (self.prompts.state(rollout_id + 1), self.prompts.files())
        if self.config.async_save:
            await self.cluster.reports("copied", rollout_id, devices, self.config.phase_timeout_s)
            self._copied.put_nowait((rollout_id, copy.deepcopy(data)))         # what it names goes on
        else:
            await self._publish(rollout_id, data)
        return {"perf/save_time": time.perf_counter() - begun}

    async def _publish(self, rollout_id: int, data: Data) -> None:
        """Make a checkpoint of what every rank has written."""
        await self.cluster.reports("saved", rollout_id, self.cluster.grid.devices, self.config.phase_timeout_s)
        assert self.checkpoints is not None
        # In a thread: hashing takes minutes for a large model, and the heartbeats of the other nodes must go on.
        publish = asyncio.to_thread(self.checkpoints.publish, rollout_id, *data)
        await self.cluster.gather([publish], self.config.phase_timeout_s, f"publishing the checkpoint of rollout {rollout_id}")

    async def _publish_copied(self) -> None:
        while True:
            rollout_id, data = await self._copied.get()
            begun = time.perf_counter()
            await self._publish(rollout_id, data)
            self._behind.append((rollout_id, time.perf_counter() - begun))
            self._copied.task_done()

    async def _published(self) -> None:
        """Every checkpoint that was begun is there."""
        await self.cluster.gather([self._copied.join()], self.config.phase_timeout_s, "the last checkpoint to be written and published")

    def _log_behind(self) -> None:
        """How long checkpoints took in the background, after the line of the rollout's own."""
        for rollout_id, seconds in self._behind:
            self.metrics.log(rollout_id, {"perf/async_save_time": seconds})
        self._behind.clear()

    async def _updated(self, rollout_id: int) -> dict[str, float]:
        """The weights that this rollout made are in every engine; the slowest rank's times."""
        ranks = self.cluster.grid.engine_ranks
        if not ranks or not self.cluster.grid.trainers:
            return {}
        self.progress.phase("update", rollout_id)
        done = await self.cluster.reports("updated", rollout_id, ranks, self.config.phase_timeout_s)
        return {k: max(d[k] for d in done.values()) for k in next(iter(done.values()))}

    def _log(self, rollout_id: int, groups: list[Group], values: dict[str, float], seconds: float) -> None:
        values = values | self._spent | self.prompts.left_out() | {"perf/step_time": seconds}
        if self.config.loss_type != "sft":
            values |= rollout_statistics(groups, self.config) | self.cluster.failures.counts("rollout/failed/") | self.cluster.take_strays()
        trains = sum(values.get(f"perf/{k}", 0.0) for k in ("train_time", "log_probs_time", "ref_log_probs_time"))
        values["perf/wait_time_ratio"] = 1 - trains / seconds
        self.metrics.log(rollout_id, values)
        self._log_behind()
        self.progress.show(rollout_id, values)
        self._write_timeline()

    def _write_timeline(self) -> None:
        """What ranks have said that they did when."""
        for rollout_id, by_rank in sorted(self.cluster.arrived("phases").items()):
            write_timeline(self.run_dir, rollout_id, {rank: data["events"] for rank, data in by_rank.items()})

    def _write_hashes(self, rollout_id: int, groups: list[Group]) -> None:
        """What a resumed run is compared by: every sampled token of the rollout, in order."""
        tokens = [[s.group_index, s.index, Sample.tokens.peek(s), Sample.rollout_log_probs.peek(s)] for g in groups for s in g]
        digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
        with open(self.run_dir / "hashes.jsonl", "a") as f:
            f.write(json.dumps({"rollout_id": rollout_id, "samples": digest, "data": self.prompts.state(rollout_id + 1)}) + "\n")
