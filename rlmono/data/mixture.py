"""Several prompt sources by weight: `Mixture` is read like one source, `MixedCursor` walks through it like a `DataCursor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

from rlmono.data.cursor import DataCursor
from rlmono.data.prompts import Source
from rlmono.data.rows import DataError, Prompt

Row = tuple[int, int]
"""(which source, row of it)."""
_SEED_STEP = 1_000_003
"""Between the seeds of sources, further than a run has epochs: files of one length are not permuted alike."""


class Mixture:
    """Sources and their shares of what is given out, which add up to 1. Without `weights` each has its share of the rows, so that all
    come to the end of an epoch together."""

    def __init__(self, sources: Sequence[Source], weights: Optional[Sequence[float]] = None) -> None:
        self.sources = list(sources)
        parts = [float(w) for w in (weights if weights is not None else map(len, sources))]
        self.weights = [part / sum(parts) for part in parts]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def row(self, row: Row) -> Prompt:
        return self.sources[row[0]].row(row[1])


class MixedCursor:
    """Takes the source whose share is furthest behind: after any number of prompts, each has given its share of them, but for one or two.

    Each source goes through epochs of its own.
    """

    def __init__(self, mixture: Mixture, *, seed: int, shuffle: bool, samples_per_prompt: int = 1) -> None:
        self._weights, self._samples_per_prompt = mixture.weights, samples_per_prompt
        self.cursors = [DataCursor(source, seed=seed + k * _SEED_STEP, shuffle=shuffle, samples_per_prompt=samples_per_prompt)
                        for k, source in enumerate(mixture.sources)]

    @property
    def groups(self) -> int:
        return sum(cursor.groups for cursor in self.cursors)

    @property
    def samples(self) -> int:
        return self.groups * self._samples_per_prompt

    @property
    def left_out(self) -> Counter[str]:
        return sum((cursor.left_out for cursor in self.cursors), Counter())

    def next(self, n: int) -> list[Row]:
        """The rows of the next n prompts."""
        rows: list[Row] = []
        while len(rows) < n:
            total = self.groups + 1
            behind = [weight * total - cursor.groups for weight, cursor in zip(self._weights, self.cursors, strict=True)]
            k = behind.index(max(behind))
            rows.append((k, self.cursors[k].next(1)[0]))
        return rows

    def state(self) -> dict[str, Any]:
        """Where each cursor is; JSON-able."""
        return {"weights": self._weights, "sources": [cursor.state() for cursor in self.cursors]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; DataError for the state of other data, shares or order."""
        there = state.get("sources", [state])
        if len(there) != len(self.cursors) or state.get("weights") != self._weights:
            shares = state.get("weights", [1.0])
            raise DataError(f"the checkpoint is in the middle of {len(there)} prompt file(s) with shares {shares}, and this run has "
                            f"{len(self.cursors)} with {self._weights}. Resume with the same --prompt-data and --prompt-data-weights, or "
                            "start over the data with --finetune")
        for cursor, part in zip(self.cursors, there, strict=True):
            cursor.restore(part)
