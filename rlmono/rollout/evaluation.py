"""Evaluation: all sets at once with the weights of the moment; metrics, and every sample in a jsonl that a person can read."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from rlmono.config.evals import EvalSet
from rlmono.config.schema import Config
from rlmono.data.sample import FAILED, Group
from rlmono.observe.metrics import MetricsLog
from rlmono.observe.progress import Progress
from rlmono.observe.samples import write_samples
from rlmono.rollout.batch import eval_statistics
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.debug import SavedRollouts
from rlmono.rollout.prompts import Prompts
from rlmono.rollout.sampling import eval_sampling


class Evaluation:
    """The run's evaluation sets."""

    def __init__(self, config: Config, cluster: Cluster, prompts: Prompts | SavedRollouts, metrics: MetricsLog, progress: Progress, run_dir: Path):
        self.config, self.cluster, self.prompts = config, cluster, prompts
        self.metrics, self.progress, self.run_dir = metrics, progress, run_dir

    def due(self, rollout_id: int) -> bool:
        """Evaluate before this rollout? Before the first one, and every --eval-interval."""
        c = self.config
        if not self.prompts.eval_sets:
            return False
        if rollout_id == 0:
            return not c.skip_eval_before_train
        return c.eval_interval is not None and rollout_id % c.eval_interval == 0

    async def run(self, rollout_id: int) -> float:
        """Generate, reward and report; the seconds that it took. Raises TimeoutError after --phase-timeout-s."""
        begun = time.perf_counter()
        sets = list(self.prompts.eval_groups())
        what, everything = f"evaluating before rollout {rollout_id}", [group for _, groups in sets for group in groups]
        self.progress.phase(f"evaluate {', '.join(s.name for s, _ in sets)}", rollout_id, len(everything))
        self.cluster.failures.begin(what, sum(map(len, everything)))
        jobs = [self._run(group, eval_sampling(s, self.prompts.tokenizer.eos_ids)) for s, groups in sets for group in groups]
        done = iter(await self.cluster.gather(jobs, self.config.phase_timeout_s, what))
        for s, groups in sets:
            self._report(s, rollout_id, [next(done) for _ in groups])
        return time.perf_counter() - begun

    async def _run(self, group: Group, sampling: Any) -> Group:
        done = await self.cluster.run_group(group, sampling, evaluation=True)
        self.progress.advance()
        return done

    def _report(self, s: EvalSet, rollout_id: int, groups: list[Group]) -> None:
        samples = [sample for group in groups for sample in group]
        for sample in samples:
            if sample.status == FAILED:
                sample.reward = 0.0
        failed = Counter(remark for sample in samples if sample.status == FAILED for remark in sample.remarks[:1])
        values = eval_statistics(s.name, groups, s.config(self.config)) | {f"eval/{s.name}/failed/{name}": float(n) for name, n in failed.items()}
        self.metrics.log(rollout_id, values)
        self.progress.show(rollout_id, values)
        limit = len(samples) if self.config.log_eval_samples is None else self.config.log_eval_samples
        write_samples(self.run_dir / "samples" / f"eval_{s.name}_{rollout_id}.jsonl", samples, limit, self.prompts.tokenizer.decode)
