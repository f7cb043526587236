"""`DataCursor`: which prompt comes next, over epochs; its state is part of a checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any, Optional

import numpy as np

from rlmono.data.prompts import Source
from rlmono.data.rows import DataError


class DataCursor:
    """Walks through a source epoch by epoch, in file order or in an order from `seed + epoch`.

    `groups` and `samples` count what was given out over the whole run, in submission order: before a call of
    `next`, they are the `group_index` and the first sample `index` of the group that comes next.
    """

    def __init__(self, source: Source, *, seed: int, shuffle: bool, samples_per_prompt: int = 1) -> None:
        self._source, self._seed, self._shuffle, self._samples_per_prompt = source, seed, shuffle, samples_per_prompt
        self._rows: tuple[tuple[int, int], Optional[np.ndarray]] = ((0, 0), None)
        self.epoch = 0
        self.window = 0
        self.position = 0
        """Rows of this window that were given out or left out."""
        self.groups = 0
        self.samples = 0
        self.left_out: Counter[str] = Counter()
        """Rows that were refused when their turn came, by reason."""

    def next(self, n: int) -> list[int]:
        """The rows of the next n prompts; goes on with the next epoch where one ends. DataError when all that comes is refused."""
        rows: list[int] = []
        barren = -1                     # epochs begun since a row was taken
        while len(rows) < n:
            window = self._window()
            if self.position == len(window):
                self._turn()
                barren += self.window == 0
                if barren > 0 and not rows:
                    raise DataError(f"{self._source.spec}: not one row of a whole epoch can be used ({dict(self.left_out)})")
                continue
            row = int(window[self.position])
            self.position += 1
            reason = self._source.refusal(row)
            if reason is None:
                rows.append(row)
            else:
                self.left_out[reason] += 1
        self.groups += n
        self.samples += n * self._samples_per_prompt
        return rows

    def _turn(self) -> None:
        self.window, self.position = self.window + 1, 0
        if self.window == self._source.windows:
            self.epoch, self.window = self.epoch + 1, 0

    def _window(self) -> np.ndarray:
        at, rows = self._rows
        if rows is None or at != (self.epoch, self.window):
            rows = self._source.window(self.window, self._seed + self.epoch if self._shuffle else None)
            self._rows = (self.epoch, self.window), rows
        return rows

    def state(self) -> dict[str, Any]:
        """Where the cursor is, and in what data; JSON-able."""
        return {"data": self._source.identity(), "order": self._order_identity(), "epoch": self.epoch, "window": self.window,
                "position": self.position, "groups": self.groups, "samples": self.samples, "left_out": dict(self.left_out)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; DataError for the state of other data or of another order."""
        if "sources" in state:
            raise DataError(f"the checkpoint is in the middle of several files, and this run reads only {self._source.spec}. Resume with the "
                            "same --prompt-data and --prompt-data-weights, or start over the data with --finetune")
        here, there = self._source.identity(), state["data"]
        if here["fingerprint"] != there["fingerprint"]:
            raise DataError(f"the checkpoint is in the middle of other prompt data: it read {_describe(there)}, and {self._source.spec} "
                            f"has {_describe(here)}. Resume with the same --prompt-data, --rollout-max-prompt-len and --lazy-data-above-mb, "
                            "or start over the data with --finetune")
        if state["order"] != self._order_identity():
            raise DataError(f"the checkpoint takes prompts in another order: it has {_order(state['order'])}, this run "
                            f"{_order(self._order_identity())}. Resume with the same, or start over the data with --finetune")
        self.epoch, self.window, self.position = (int(state[name]) for name in ("epoch", "window", "position"))
        self.groups, self.samples, self.left_out = int(state["groups"]), int(state["samples"]), Counter(state["left_out"])

    def _order_identity(self) -> dict[str, Any]:
        return {"shuffle": self._shuffle, "seed": self._seed if self._shuffle else None}


def _describe(data: dict[str, Any]) -> str:
    size = f"{data['rows']} rows" if "rows" in data else f"{data['bytes']} bytes"
    return f"{data['name']}, {size}, fingerprint {data['fingerprint'][:12]}"


def _order(order: dict[str, Any]) -> str:
    return f"--rollout-shuffle with --rollout-seed {order['seed']}" if order["shuffle"] else "file order"
