"""`Collector`: a rollout's groups, by over-sampling, a filter, and stopping at once when there are enough.

    submit a batch → judge each group as it finishes → while kept + in flight is below the target: submit another
    → at the target abort the rest → what was aborted goes back to the data buffer

With --deterministic groups are judged in the order of submission, and what is kept of an aborted sample must not depend on the clock
either: with --partial-rollout the rest is not aborted but ends by itself, and each of its samples is cut back to as many new tokens as
the longest sample of a judged group has. That is what an abort would have left if every sample had been sampled at one speed.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from rlmono.config.schema import Config
from rlmono.data.sample import ABORTED, Group, Sample
from rlmono.rollout.buffer import copy_prompt, cut, mask_old_tokens, weight_version
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.filters import judge, load_filter
from rlmono.rollout.prompts import Prompts
from rlmono.rollout.selection import Selection
from rlmono.rollout.tasks import cancel
from rlmono.world.messages import Sampling


@dataclass
class Collected:
    """The groups that count, in the order of their numbers, and what there is to report."""

    groups: list[Group]
    values: dict[str, float] = field(default_factory=dict)


class Collector:
    """Runs the groups of one rollout after the other. Building it loads the filter; raises LoadError (a ValueError)."""

    def __init__(self, config: Config, cluster: Cluster, prompts: Prompts):
        self.config, self.cluster, self.prompts = config, cluster, prompts
        self.batch = config.over_sampling_batch_size or config.rollout_batch_size
        self.filter = load_filter(config)
        self.selects = self.filter is not None or self.batch > config.rollout_batch_size or len(prompts.buffer) > 0
        """Whether a rollout may have more groups than it needs."""

    async def collect(self, rollout_id: int, sampling: Sampling, advance: Callable[[], None]) -> Collected:
        """`advance` is called for each group that is kept. Raises TimeoutError after --phase-timeout-s, RuntimeError when a group fails or the
        filter drops too much."""
        what = f"generating rollout {rollout_id}"
        self.cluster.failures.begin(what, 0)
        collecting = _Rollout(self, rollout_id, sampling, advance).run()
        (collected,) = await self.cluster.gather([collecting], self.config.phase_timeout_s, what)
        return collected        # type: ignore[no-any-return]

    def next_groups(self, rollout_id: int, selection: Selection) -> list[Group]:
        """Another batch. Raises RuntimeError when there have been too many."""
        batches, most = selection.submitted // self.batch, self.config.max_over_sampling_batches
        if batches >= most:
            reasons = ", ".join(f"{reason} x{n}" for reason, n in selection.reasons.most_common(8))
            if remarks := selection.dropped_remarks:
                reasons += f" (remarks of their samples: {', '.join(f'{remark} x{n}' for remark, n in remarks.most_common(4))})"
            raise RuntimeError(
                f"rollout {rollout_id}: of {batches} batches of {self.batch} prompts the filter has kept {len(selection.kept)} groups, and "
                f"{selection.target} are needed; dropped: {reasons}. Relax --dynamic-sampling-filter-path, take prompts that suit the model, or "
                f"raise --max-over-sampling-batches ({most})")
        return self.prompts.next_groups(rollout_id, self.batch)


class _Rollout:
    """One rollout on its way. What is submitted is copied first: generate functions write into samples."""

    def __init__(self, collector: Collector, rollout_id: int, sampling: Sampling, advance: Callable[[], None]):
        self.collector, self.config, self.rollout_id = collector, collector.config, rollout_id
        self._sampling, self._advance, self._version = sampling, advance, weight_version(self.config, rollout_id)
        self._selection = Selection(self.config.rollout_batch_size, lambda g: judge(collector.filter, self.config, g), self.config.deterministic)
        self._before: dict[int, Group] = {}
        self._after: dict[int, Group] = {}
        self._running: dict[asyncio.Task[Group], int] = {}
        self._ended: asyncio.Queue[asyncio.Task[Group]] = asyncio.Queue()

    async def run(self) -> Collected:
        selection = self._selection
        try:
            while not selection.full:
                while selection.short:
                    self._submit(self.collector.next_groups(self.rollout_id, selection))
                kept = len(selection.kept)
                await self._one()
                for _ in range(len(selection.kept) - kept):
                    self._advance()
            await self._stop()
        finally:
            await cancel(self._running)
        return self._settle()

    def _submit(self, groups: list[Group]) -> None:
        self.collector.cluster.failures.plan(sum(map(len, groups)))
        for number, group in zip(self._selection.submit(len(groups)), groups, strict=True):
            self._before[number] = copy_prompt(group)
            task = asyncio.create_task(self.collector.cluster.run_group(group, self._sampling, evaluation=False))
            self._running[task] = number
            task.add_done_callback(self._ended.put_nowait)

    async def _one(self) -> None:
        """Wait for a group, and raise what it failed with."""
        task = await self._ended.get()
        number = self._running.pop(task)
        self._after[number] = task.result()
        self._selection.finish(number, self._after[number])

    async def _stop(self) -> None:
        """Enough: the rest ends with what it has. Bounded by the deadline of the phase."""
        if self._running and not self._cuts:
            await asyncio.sleep(0)          # what was submitted last is on its way only then
            self.collector.cluster.abort_groups()
        while self._running:
            await self._one()

    @property
    def _cuts(self) -> bool:
        return self.config.deterministic and self.config.partial_rollout

    def _settle(self) -> Collected:
        """Every group that was submitted counts, is dropped, or goes back to the buffer."""
        selection, surplus = self._selection, self._selection.surplus()
        values = self._counts(surplus)
        longest = max((new for n in (*selection.kept, *selection.dropped) for new in self._new(n)), default=0)
        self.collector.prompts.give_back([self._back(n, longest) for n in surplus])
        kept = [selection.kept[n] for n in sorted(selection.kept, key=lambda n: self._before[n][0].group_index)]
        if self.collector.selects:
            values |= self.collector.prompts.buffer.values() | self._ages(kept)
        if self.config.mask_offpolicy_in_partial_rollout:
            for sample in (s for g in kept for s in g):
                mask_old_tokens(sample, self._version)
        return Collected(kept, values)

    def _back(self, number: int, longest: int) -> Group:
        """What the buffer gets of an aborted group: its prompt, or, with --partial-rollout, its samples as far as they are."""
        before, after = self._before[number], self._after[number]
        if not self.config.partial_rollout or [s.index for s in before] != [s.index for s in after]:
            return before       # with a sample that failed, or several made of one, the group begins anew
        if self._cuts:
            after = [cut(s, b.response_length + longest) for s, b in zip(after, before, strict=True)]
        if self.config.group_rm and any(s.status == ABORTED for s in after):       # a reward of the group's is not one of its samples'
            after = [msgspec.structs.replace(s, reward=None, remarks=[]) for s in after]
        for sample in after:
            if sample.response_length:
                sample.metadata.setdefault("start_rollout_id", self.rollout_id)
        return after

    def _counts(self, surplus: Sequence[int]) -> dict[str, float]:
        selection = self._selection
        tokens = {n: _written(group) - _written(self._before[n]) for n, group in self._after.items()}
        values: dict[str, float] = {}
        if self.collector.selects:
            values |= {"rollout/submitted_groups": selection.submitted, "rollout/aborted_groups": len(surplus),
                       "rollout/dropped_tokens": sum(tokens[n] for n in selection.dropped), "rollout/aborted_tokens": sum(tokens[n] for n in surplus)}
        values |= {f"rollout/dynamic_filter/remarks/{remark}": n for remark, n in selection.dropped_remarks.items()}
        return values | {f"rollout/dynamic_filter/drop_{reason}": n for reason, n in selection.reasons.items()}

    def _ages(self, kept: Sequence[Group]) -> dict[str, float]:
        """Tokens of older weights among those that count, and how many versions old. The versions of a sample ascend."""
        versions = [v for g in kept for s in g if (v := Sample.weight_versions.view(s))]
        old, all_tokens = sum(bisect_left(v, self._version) for v in versions), sum(map(len, versions))
        age = max((self._version - v[0] for v in versions), default=0)
        return {"rollout/old_tokens_ratio": old / max(all_tokens, 1), "rollout/token_age_max": age}

    def _new(self, number: int) -> Iterator[int]:
        """How many tokens each sample of a group has got in this rollout."""
        for sample, before in zip(self._after[number], self._before[number], strict=False):
            yield sample.length - before.length


def _written(group: Group) -> int:
    """Tokens of a group that the model wrote."""
    return sum(s.trained_length for s in group)
