"""`Selection`: which of a rollout's groups count. Bookkeeping alone, on numbers of submission; nothing here waits.

Without `in_order` a group is judged when it finishes, so that which groups count depends on what is fast. In order, a group is judged
when all that were submitted before it have been: then nothing depends on timing, neither which groups count nor how many are submitted.
"""

from __future__ import annotations

from collections import Counter
from typing import Callable

from rlmono.data.sample import Group
from rlmono.rollout.filters import Verdict


class Selection:
    """Collects `target` groups that `judge` keeps."""

    def __init__(self, target: int, judge: Callable[[Group], Verdict], in_order: bool):
        self.target, self.in_order, self._judge = target, in_order, judge
        self.kept: dict[int, Group] = {}
        self.dropped: dict[int, Group] = {}
        self.reasons: Counter[str] = Counter()
        self.submitted = 0
        self._finished: dict[int, Group] = {}

    @property
    def full(self) -> bool:
        return len(self.kept) == self.target

    @property
    def dropped_remarks(self) -> Counter[str]:
        """Remarks of the samples of dropped groups: rewards that fail are all 0, so that filters drop just those groups."""
        return Counter(remark for group in self.dropped.values() for sample in group for remark in sample.remarks)

    @property
    def short(self) -> int:
        """How many groups are missing even if all that are in flight are kept."""
        return max(self.target - (self.submitted - len(self.dropped)), 0)

    def submit(self, n: int) -> range:
        """The numbers of n more groups."""
        self.submitted += n
        return range(self.submitted - n, self.submitted)

    def finish(self, number: int, group: Group) -> None:
        """A group has its rewards. Once the selection is full, nothing is judged any more."""
        self._finished[number] = group
        while not self.full and (following := self._next()) is not None:
            self._count(following, self._finished.pop(following))

    def surplus(self) -> list[int]:
        """The numbers of what was submitted and has not been judged."""
        return [n for n in range(self.submitted) if n not in self.kept and n not in self.dropped]

    def _next(self) -> int | None:
        following = len(self.kept) + len(self.dropped) if self.in_order else next(iter(self._finished), None)
        return following if following in self._finished else None

    def _count(self, number: int, group: Group) -> None:
        verdict = self._judge(group)
        (self.kept if verdict.keep else self.dropped)[number] = group
        if not verdict.keep:
            self.reasons[verdict.reason or "filter"] += 1
