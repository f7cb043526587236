"""Samples that came to nothing: counted by name, and the end of the run when they are too many.

A rare failure of a tool or an agent costs its own sample; its group goes on with the others. What fails always, a mistake in
the function, ends the run within its first samples, since all of them fail at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlmono.data.sample import Sample
from rlmono.world.messages import Failure

REWARD_FAILURES = ("reward_", "remote_rm_")
"""How remarks begin that say a sample has no judgement. Others are names that a reward function gives itself."""
FEW = 8
"""So few samples can all have failed by chance."""


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


def unjudged(sample: Sample) -> str:
    """The remark that says a sample has no judgement; empty where it has one."""
    return next((r for r in sample.remarks if r.startswith(REWARD_FAILURES)), "")


def refuse_without_rewards(what: str, samples: Sequence[Sample]) -> None:
    """Raises RuntimeError where not one of many samples could be judged: a mistake in the reward, or its server is gone. One that fails costs its
    own sample; when all do, there is nothing to train on."""
    failed = Counter(map(unjudged, samples))
    if len(samples) >= FEW and not failed[""]:
        names = ", ".join(f"{n} x {name}" for name, n in failed.most_common())
        raise RuntimeError(f"{what}: none of {len(samples)} samples could be judged ({names}): nothing can be learned from it. The log of this "
                           "rank has the first of each cause")
