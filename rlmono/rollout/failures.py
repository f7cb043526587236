"""Samples that came to nothing: counted by name, and the end of the run when they are too many.

A rare failure of a tool or an agent costs its own sample; its group goes on with the others. What fails always, a mistake in
the function, ends the run within its first samples, since all of them fail at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlmono.world.messages import Failure


class Failures:
    """Of one phase at a time: a rollout, or an evaluation. `share` is the part of its samples that may fail (one always may)."""

    def __init__(self, share: float):
        self._share, self._planned, self._what = share, 0, ""
        self._counts: Counter[str] = Counter()

    def begin(self, what: str, planned: int) -> None:
        """A phase that plans so many samples."""
        self._what, self._planned = what, planned
        self._counts.clear()

    def plan(self, samples: int) -> None:
        """More of them in the same phase."""
        self._planned += samples

    def add(self, failures: Sequence[Failure]) -> None:
        """Raises RuntimeError with the last one's text when they have become too many."""
        self._counts.update(f.outcome for f in failures)
        failed = self._counts.total()
        if failures and failed > max(1.0, self._share * self._planned):
            names = ", ".join(f"{n} x {name}" for name, n in self._counts.most_common())
            raise RuntimeError(f"{self._what}: {failed} of {self._planned} samples have failed ({names}), more than --rollout-max-failed-share "
                               f"{self._share:g} allows. The last: sample {failures[-1].index}: {failures[-1].detail}")

    def counts(self, prefix: str) -> dict[str, float]:
        """The phase's so far, as metrics."""
        return {f"{prefix}{name}": float(n) for name, n in self._counts.items()}
