"""`RewardPool`: scores samples in worker processes, so that no reward can hold up or end the loop that feeds the engines.

A reward that raises, hangs, returns no number or takes its process down is a counted outcome of one sample: reward 0 with a
remark (`reward_error`, `reward_timeout`, `reward_invalid`, `reward_crashed`). Its worker is replaced when need be; what else
was sent to it is scored again by the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections import Counter, deque
from typing import Any, NamedTuple

from rlmono.data.sample import Sample
from rlmono.rewards import RewardError, reward_path
from rlmono.rewards.protocol import Outcome, Setup, Task, frame
from rlmono.rewards.remote import Item, RemoteWorker

logger = logging.getLogger(__name__)

RESTARTS = 3
"""Attempts to replace a worker before the pool gives up."""


class RewardResult(NamedTuple):
    """`value` as the reward gave it (0.0, or {reward_key: 0.0}, after a failure), and the failure's remark."""

    value: float | dict[str, Any]
    remark: str | None = None


class RewardPool:
    """`args.reward_workers` processes with the reward of `args`; used on one event loop. `start` before `score`, `close` at the end.

    Functions are called as `function(args, sample)`, with the flat config and a copy of the sample: what they change in it stays in the
    worker. `memory_limit_bytes` bounds a worker's address space. `outcomes` counts remarks (and "ok"), for the metrics.
    """

    def __init__(self, args: Any, *, memory_limit_bytes: int | None = None) -> None:
        self.outcomes: Counter[str] = Counter()
        self._args = args
        self._memory_limit_bytes = memory_limit_bytes
        self._failed: float | dict[str, Any] = {args.reward_key: 0.0} if args.reward_key else 0.0
        self._queue: deque[Item] = deque()
        self._workers: list[RemoteWorker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ids = itertools.count()
        self._logged: set[tuple[str | None, str]] = set()
        self._broken: RewardError | None = None
        self._feeding = False

    async def start(self) -> None:
        """Starts the workers and loads the reward in them. RewardError when it cannot be loaded."""
        has_default = self._args.custom_rm_path or self._args.rm_type
        paths = [reward_path(self._args)] if has_default else []
        setup = Setup(_flat(self._args), paths, parent=0, memory_limit_bytes=self._memory_limit_bytes)
        self._workers = [RemoteWorker(setup, self._args.reward_timeout_s) for _ in range(self._args.reward_workers)]
        started = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
        problem = next((problem for problem in started if problem is not None), None)
        if problem is not None:
            await self.close()
            raise problem
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in self._workers]
        self._tasks.append(asyncio.create_task(self._watch()))

    async def score(self, sample: Sample) -> RewardResult:
        """The reward of a sample: its own, if a generate function has set it, else the function's of `reward_path`.

        RewardError only when there is no reward to call, or no worker comes up any more.
        """
        if sample.reward is not None:
            return RewardResult(sample.reward)
        if self._broken is not None or not self._tasks:
            raise self._broken or RewardError("the reward pool is not running: start() comes before score(), close() after")
        path = reward_path(self._args, sample.metadata)
        id = next(self._ids)
        item = Item(id, frame(Task(id, path, sample)), sample.index, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self._feed_soon()
        outcome = await item.future
        self.outcomes[outcome.remark or "ok"] += 1
        if outcome.value is not None:
            return RewardResult(outcome.value)
        self._log_once(outcome, item)
        return RewardResult(dict(self._failed) if isinstance(self._failed, dict) else self._failed, outcome.remark)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ends the workers; those that have not ended after `timeout_s` are killed. Waiting `score` calls get a RewardError."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self._workers))
        self._break(RewardError("the reward pool was closed before this sample was scored"))

    def _feed_soon(self) -> None:
        """Once for all samples that are queued in this turn of the loop."""
        if not self._feeding:
            self._feeding = True
            asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        """Hands queued samples to the workers, evenly, as far as they have room."""
        self._feeding = False
        shares: dict[RemoteWorker, list[Item]] = {worker: [] for worker in self._workers}
        rooms = {worker: worker.room for worker in self._workers}
        while self._queue:
            if self._queue[0].future.done():        # cancelled
                self._queue.popleft()
                continue
            if self._queue[0].suspect:
                idle = next((worker for worker in shares if worker.idle and not shares[worker]), None)
                if idle is None:
                    break
                idle.send([self._queue.popleft()])
                rooms[idle] = 0
                continue
            worker = max(rooms, key=rooms.__getitem__)
            if rooms[worker] <= 0:
                break
            shares[worker].append(self._queue.popleft())
            rooms[worker] -= 1
        for worker, items in shares.items():
            worker.send(items)

    async def _serve(self, worker: RemoteWorker) -> None:
        """Takes in a worker's outcomes; when it dies, settles what it was doing and replaces it."""
        try:
            while True:
                while outcomes := await worker.receive():
                    for item, outcome in outcomes:
                        _settle(item, outcome)
                    self._feed_soon()
                culprits, others, death = await worker.bury()
                for item in culprits:
                    _settle(item, Outcome(item.id, remark=death.remark, where=death.detail, detail=death.detail))
                self._queue.extendleft(reversed(others))
                await self._restart(worker)
                self._feed_soon()
        except Exception as error:
            if isinstance(error, RewardError):
                return self._break(error)
            self._break(RewardError(f"the reward pool failed: {type(error).__name__}: {error}"))
            raise

    async def _restart(self, worker: RemoteWorker) -> None:
        for attempt in range(1, RESTARTS + 1):
            try:
                return await worker.start()
            except RewardError as error:
                logger.warning("a reward worker did not come up again (attempt %d of %d): %s", attempt, RESTARTS, error)
                if attempt == RESTARTS:
                    raise
                await asyncio.sleep(attempt)

    async def _watch(self) -> None:
        """Kills workers whose reward is overdue at two looks in a row: after the first, the loop has read what had come in."""
        interval = min(0.25, self._args.reward_timeout_s / 4)
        suspects: set[int] = set()
        while True:
            await asyncio.sleep(interval)
            overdue = {worker: worker.overdue() for worker in self._workers}
            for worker, ids in overdue.items():
                if ids & suspects:
                    worker.kill_for(ids)
            suspects = set().union(*overdue.values())

    def _break(self, error: RewardError) -> None:
        self._broken = self._broken or error
        for item in [*self._queue, *(item for worker in self._workers for item in worker.in_flight.values())]:
            if not item.future.done():
                item.future.set_exception(error)
        self._queue.clear()

    def _log_once(self, outcome: Outcome, item: Item) -> None:
        key = (outcome.remark, outcome.where)
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("%s at sample %d (reward 0; counted, and not shown again for this cause): %s", outcome.remark, item.sample_index,
                           outcome.detail or f"no answer within --reward-timeout-s {self._args.reward_timeout_s:g}")


def _settle(item: Item, outcome: Outcome) -> None:
    if not item.future.done():
        item.future.set_result(outcome)


def _flat(args: Any) -> dict[str, Any]:
    """The config's flat names and values, of a dataclass or of any object with attributes."""
    names = [field.name for field in dataclasses.fields(args)] if dataclasses.is_dataclass(args) else list(vars(args))
    return {name: getattr(args, name) for name in names}
