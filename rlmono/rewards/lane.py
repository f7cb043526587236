"""`Lane`: worker processes of one kind, for rewards that compute or for async ones that wait, and the queue before them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from rlmono.rewards import RewardError
from rlmono.rewards.protocol import Outcome, Setup
from rlmono.rewards.remote import Item, RemoteWorker

logger = logging.getLogger(__name__)

RESTARTS = 3
"""Attempts to replace a worker before the lane gives up."""


class Lane:
    """`workers` processes; async rewards have at most `concurrency` tasks at work in all of them together.

    `start`, then `submit`, then `close`. `broken(error)` is called once when no worker comes up any more; every task then gets the error.
    """

    def __init__(self, setup: Setup, timeout_s: float, workers: int, concurrency: int, broken: Callable[[RewardError], None]) -> None:
        self._timeout_s, self._broken = timeout_s, broken
        self._queue: deque[Item] = deque()
        shares = [concurrency // workers + (i < concurrency % workers) for i in range(workers)]
        self._workers = [RemoteWorker(setup, timeout_s, share, self._settled) for share in shares]
        self._tasks: list[asyncio.Task[None]] = []
        self._feeding = False

    async def start(self) -> None:
        """Starts the workers and loads the rewards of the setup in them. RewardError when they cannot be loaded."""
        started = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
        problem = next((problem for problem in started if problem is not None), None)
        if problem is not None:
            await self.close(0.0)
            raise problem
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in self._workers]
        self._tasks.append(asyncio.create_task(self._watch()))
        self._feed_soon()

    @property
    def concurrent(self) -> bool:
        """The workers are for async rewards."""
        return self._workers[0].concurrent

    def submit(self, item: Item) -> None:
        """Queues a task; `item.future` gets its outcome. May come before `start` has ended."""
        self._queue.append(item)
        if any(worker.idle for worker in self._workers):
            self._feed()
        else:
            self._feed_soon()

    async def close(self, timeout_s: float) -> None:
        """Ends the workers; those that have not ended after `timeout_s` are killed."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self._workers))

    def fail(self, error: RewardError) -> None:
        """Every task that waits gets the error."""
        for item in self._unsettled():
            if not item.future.done():
                item.future.set_exception(error)
        self._queue.clear()

    def abandon(self) -> None:
        """Nobody wants the outcomes any more of what is queued or at work."""
        for item in self._unsettled():
            item.future.cancel()
        self._queue.clear()

    def _unsettled(self) -> list[Item]:
        return [*self._queue, *(item for worker in self._workers for item in worker.in_flight.values())]

    def _feed_soon(self) -> None:
        """Once for all tasks that are queued in this turn of the loop."""
        if not self._feeding:
            self._feeding = True
            asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        """Hands queued tasks to the workers, evenly, as far as they have room."""
        self._feeding = False
        if not self._queue:
            return
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

    def _settled(self, outcomes: list[tuple[Item, Outcome]]) -> None:
        for item, outcome in outcomes:
            _settle(item, outcome)
        self._feed_soon()

    async def _serve(self, worker: RemoteWorker) -> None:
        """When a worker dies, settles what it was doing and replaces it."""
        try:
            while True:
                await worker.end()
                culprits, others, death = await worker.bury()
                for item in culprits:
                    _settle(item, Outcome(item.id, remark=death.remark, where=death.detail, detail=death.detail))
                self._queue.extendleft(reversed(others))
                await self._restart(worker)
                self._feed_soon()
        except Exception as error:
            if isinstance(error, RewardError):
                return self._broken(error)
            self._broken(RewardError(f"the reward pool failed: {type(error).__name__}: {error}"))
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
        interval = min(0.25, self._timeout_s / 4)
        suspects: set[int] = set()
        while True:
            await asyncio.sleep(interval)
            overdue = {worker: worker.overdue() for worker in self._workers}
            for worker, ids in overdue.items():
                if ids & suspects:
                    worker.kill_for(ids)
            suspects = set().union(*overdue.values())


def _settle(item: Item, outcome: Outcome) -> None:
    if not item.future.done():
        item.future.set_result(outcome)
