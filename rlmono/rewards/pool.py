"""`RewardPool`: scores samples in worker processes, so that no reward can hold up or end the loop that feeds the engines.

A reward that raises, hangs, returns no number or takes its process down is a counted outcome of its sample (or group): reward 0
with a remark (`reward_error`, `reward_timeout`, `reward_out_of_memory`, `reward_invalid`, `reward_crashed`, or the name that a RewardFailure
has). Its worker is replaced when need be; what else was sent to it is scored again by the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from rlmono.config.rewards import REWARD_TYPES
from rlmono.data.sample import Sample
from rlmono.rewards import Judge, RewardError, default_judge, judge_of
from rlmono.rewards.lane import Lane
from rlmono.rewards.protocol import ELSEWHERE, Outcome, Setup, Task, frame
from rlmono.rewards.remote import Item

logger = logging.getLogger(__name__)


class RewardResult(NamedTuple):
    """`value` as the reward gave it (0.0, or {reward_key: 0.0}, after a failure), and the failure's remark."""

    value: float | dict[str, Any]
    remark: str | None = None


class RewardPool:
    """`args.reward_workers` processes (0: by the cores) with the reward of `args`, on one event loop. `start` before `score`, `close` at the end.

    Functions are called as `function(args, sample)`, or `function(args, samples)` of a group, with the flat config and copies of the samples:
    what they change in them stays in the worker. Sync and async functions have workers of their own, so that neither kind holds up the
    other; the kind that the options do not name starts when first needed. `outcomes` counts remarks (and "ok") by sample, for the metrics.
    """

    def __init__(self, args: Any) -> None:
        self.outcomes: Counter[str] = Counter()
        self._args = args
        self._lanes: dict[bool, Lane] = {}
        self._async_paths = {kind.path for kind in REWARD_TYPES.values() if kind.concurrent}
        self._starting: set[asyncio.Task[None]] = set()
        self._ids = itertools.count()
        self._logged: set[tuple[str | None, str]] = set()
        self._broken: RewardError | None = None

    async def start(self) -> None:
        """Starts the workers and loads the reward in them. RewardError when it cannot be loaded."""
        has_default = self._args.custom_rm_path or self._args.rm_type
        paths = [default_judge(self._args).path] if has_default else []
        lane = self._new_lane(paths, None if paths else False)
        await lane.start()
        self._lanes[lane.concurrent] = lane
        if lane.concurrent:
            self._async_paths.update(paths)

    async def score(self, sample: Sample) -> RewardResult:
        """The reward of a sample: its own, if a generate function has set it, else the function's of `judge_of`.

        RewardError only when there is no reward to call, or no worker comes up any more.
        """
        if sample.reward is not None:
            return RewardResult(sample.reward)
        return (await self._call(judge_of(self._args, sample), [sample], False))[0]

    async def score_group(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """The rewards of a group's samples, in order. A user's function is called once with all samples that it judges, a shipped one
        with each; samples with a reward of their own keep it, and are there to be compared with."""
        judges = [judge_of(self._args, sample) for sample in samples]
        results = {i: RewardResult(sample.reward) for i, sample in enumerate(samples) if sample.reward is not None}

        async def call(judge: Judge) -> None:
            mine = [i for i, other in enumerate(judges) if other == judge]
            if any(i not in results for i in mine):
                for i, result in zip(mine, await self._call(judge, [samples[i] for i in mine], True), strict=True):
                    results.setdefault(i, result)

        async def single(i: int) -> None:
            results[i] = await self.score(samples[i])
        await asyncio.gather(*(call(judge) for judge in dict.fromkeys(judges) if judge.custom),
                             *(single(i) for i, judge in enumerate(judges) if not judge.custom))
        return [results[i] for i in range(len(samples))]

    async def reward(self, samples: Sequence[Sample], group: bool = False) -> None:
        """Gives each sample its reward, and a remark where there is none to be had; with `group`, as `score_group` does."""
        if group:
            results = await self.score_group(samples)
        elif len(samples) == 1:
            results = [await self.score(samples[0])]
        else:
            results = await asyncio.gather(*(self.score(sample) for sample in samples))
        for sample, result in zip(samples, results, strict=True):
            sample.reward = result.value
            if result.remark:
                sample.remarks = [*sample.remarks, result.remark]

    def abandon(self) -> None:
        """Cancels all `score` and `reward` calls that wait for an outcome; what workers have already begun is not interrupted."""
        for lane in self._lanes.values():
            lane.abandon()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ends the workers; those that have not ended after `timeout_s` are killed. Waiting `score` calls get a RewardError."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(lane.close(timeout_s) for lane in self._lanes.values()))
        self._break(RewardError("the reward pool was closed before this sample was scored"))

    async def _call(self, judge: Judge, samples: list[Sample], group: bool) -> list[RewardResult]:
        if self._broken is not None or not self._lanes:
            raise self._broken or RewardError("the reward pool is not running: start() comes before score(), close() after")
        key = samples[0].reward_key or self._args.reward_key
        told = [s if judge.custom else _text_alone(s) for s in samples]
        task = Task(next(self._ids), judge.path, told, group, judge.boxed, key)
        outcome = await self._ask(task)
        if outcome.remark == ELSEWHERE:
            self._async_paths.add(judge.path)
            outcome = await self._ask(task)
        if outcome.remark:
            self._log_once(outcome, samples)
        values = outcome.values or [None] * len(samples)
        self.outcomes.update((outcome.remark or "ok") if value is None else "ok" for value in values)
        return [RewardResult(value) if value is not None else RewardResult({key: 0.0} if key else 0.0, outcome.remark) for value in values]

    async def _ask(self, task: Task) -> Outcome:
        item = Item(task.id, frame(task), asyncio.get_running_loop().create_future())
        self._lane(task.path in self._async_paths).submit(item)
        return await item.future

    def _lane(self, concurrent: bool) -> Lane:
        """The workers of that kind; they are started when they are first needed, and until then tasks wait in the queue."""
        if concurrent not in self._lanes:
            lane = self._lanes[concurrent] = self._new_lane([], concurrent)

            async def start() -> None:
                try:
                    await lane.start()
                except RewardError as error:
                    self._break(error)
            task = asyncio.create_task(start())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)
        return self._lanes[concurrent]

    def _new_lane(self, paths: list[str], concurrent: bool | None) -> Lane:
        args = self._args
        limit = int(args.reward_memory_limit_gb * (1 << 30)) or None
        setup = Setup(_flat(args), paths, memory_limit_bytes=limit, concurrent=concurrent)
        return Lane(setup, args.reward_timeout_s, args.reward_workers or by_cores(), args.reward_concurrency, self._break)

    def _break(self, error: RewardError) -> None:
        self._broken = self._broken or error
        for lane in self._lanes.values():
            lane.fail(error)

    def _log_once(self, outcome: Outcome, samples: list[Sample]) -> None:
        key = (outcome.remark, outcome.where)
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("%s at sample %d%s (reward 0; counted, and not shown again for this cause): %s", outcome.remark, samples[0].index,
                           f" and {len(samples) - 1} others of its group" if len(samples) > 1 else "",
                           outcome.detail or f"no answer within --reward-timeout-s {self._args.reward_timeout_s:g}")


def by_cores() -> int:
    """Workers where their number is not given: the host's loop, engines and data loading need cores too."""
    return min(max(len(os.sched_getaffinity(0)) // 4, 1), 8)


def _text_alone(sample: Sample) -> Sample:
    """What the shipped rewards look at: of long samples, most bytes are the tokens and what the engine told of each."""
    return msgspec.structs.replace(sample, tokens=[], response_length=0, rollout_log_probs=None, weight_versions=None, loss_mask=None)


def _flat(args: Any) -> dict[str, Any]:
    """The config's flat names and values, of a dataclass or of any object with attributes."""
    names = [field.name for field in dataclasses.fields(args)] if dataclasses.is_dataclass(args) else list(vars(args))
    return {name: getattr(args, name) for name in names}
