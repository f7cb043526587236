"""`Loads`: what every engine has to do, which one is next, and how long engines rest at the end of a phase."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterator, Sequence

from rlmono.data.sample import FINISHED, Sample
from rlmono.world.messages import GroupDone, Sampling


class Loads:
    """One entry an engine, by the controller's own books: other nodes are not asked."""

    def __init__(self, engines: int, concurrency: int):
        self._concurrency = concurrency
        self._requests, self._tokens = [0] * engines, [0] * engines
        self.tokens = 0
        """Tokens that all engines have generated in this phase."""
        self._typical: float | None = None      # response tokens, over the last finished samples
        self._began = time.monotonic()
        self._idle_from, self._slack_from = [self._began] * engines, [self._began] * engines

    @contextmanager
    def carried(self, samples: Sequence[Sample], sampling: Sampling) -> Iterator[int]:
        """The engine for a group: of those with room for all of its samples the one with the fewest tokens outstanding, of prompts and of
        responses that are expected to be as long as the last ones were. Counted there until the block ends."""
        waiting = [s for s in samples if s.status not in FINISHED]
        tokens = sum(self._expected(s, sampling.max_new_tokens) for s in waiting)
        requests = len(waiting)

        def order(i: int) -> tuple[bool, int, int, int]:
            full = self._requests[i] > 0 and self._requests[i] + requests > self._concurrency
            return full, self._tokens[i], self._requests[i], i
        engine = min(range(len(self._tokens)), key=order)
        self._requests[engine] += requests
        self._tokens[engine] += tokens
        try:
            yield engine
        finally:
            self._requests[engine] -= requests
            self._tokens[engine] -= tokens

    def _expected(self, sample: Sample, most: int) -> int:
        typical = most if self._typical is None else min(round(self._typical), most)
        return sample.length + max(typical - sample.response_length, 1)

    def begin(self) -> None:
        """A phase begins: nothing has been sent."""
        self._began, self.tokens = time.monotonic(), 0
        self._idle_from, self._slack_from = [self._began] * len(self._tokens), [self._began] * len(self._tokens)

    def heard(self, engine: int, done: GroupDone) -> None:
        """A group has come back from an engine."""
        now = time.monotonic()
        self.tokens += done.tokens
        self._idle_from[engine], self._slack_from[engine] = now - done.idle_s, now - done.slack_s
        for s in done.samples:
            if s.status in FINISHED:
                self._typical = s.response_length if self._typical is None else 0.98 * self._typical + 0.02 * s.response_length

    def end(self) -> dict[str, float]:
        """A phase is over: the share of all engines' time after their last answer, and the share after the last time on that they were as
        full as they had been. The second is what a few long responses cost."""
        now = time.monotonic()
        total = max(now - self._began, 1e-9) * len(self._tokens)
        return {"perf/engine_idle_ratio": sum(now - max(t, self._began) for t in self._idle_from) / total,
                "perf/engine_slack_ratio": sum(now - max(t, self._began) for t in self._slack_from) / total}
