"""`DataCursor`: which prompt comes next, over epochs; its state is part of a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlmono.data.prompts import DataError, PromptSource


class DataCursor:
    """Walks through a source epoch by epoch, in file order or in a permutation from `seed + epoch`.

    `groups` and `samples` count what was given out over the whole run, in submission order: before a call of
    `next`, they are the `group_index` and the first sample `index` of the group that comes next.
    """

    def __init__(self, source: PromptSource, *, seed: int, shuffle: bool, samples_per_prompt: int = 1) -> None:
        self._source, self._seed, self._shuffle, self._samples_per_prompt = source, seed, shuffle, samples_per_prompt
        self._order: tuple[int, np.ndarray | None] = (-1, None)
        self.epoch = 0
        self.position = 0
        """Rows of this epoch that were given out."""
        self.groups = 0
        self.samples = 0

    def next(self, n: int) -> list[int]:
        """The rows of the next n prompts; goes on with the next epoch where one ends."""
        rows: list[int] = []
        while len(rows) < n:
            if self.position == len(self._source):
                self.epoch, self.position = self.epoch + 1, 0
            taken = self._epoch_order()[self.position:self.position + n - len(rows)].tolist()
            self.position += len(taken)
            rows += taken
        self.groups += n
        self.samples += n * self._samples_per_prompt
        return rows

    def _epoch_order(self) -> np.ndarray:
        epoch, order = self._order
        if order is None or epoch != self.epoch:
            rows = len(self._source)
            order = np.random.default_rng(self._seed + self.epoch).permutation(rows) if self._shuffle else np.arange(rows)
            self._order = (self.epoch, order)
        return order

    def state(self) -> dict[str, Any]:
        """Where the cursor is, and in what data; JSON-able."""
        return {"data": self._source.identity(), "order": self._order_identity(),
                "epoch": self.epoch, "position": self.position, "groups": self.groups, "samples": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; DataError for the state of other data or of another order."""
        here, there = self._source.identity(), state["data"]
        if here["fingerprint"] != there["fingerprint"]:
            raise DataError(f"the checkpoint is in the middle of other prompt data: it read {_describe(there)}, and {self._source.spec} "
                            f"has {_describe(here)}. Resume with the same --prompt-data and --rollout-max-prompt-len, or start over the "
                            "data with --finetune")
        if state["order"] != self._order_identity():
            raise DataError(f"the checkpoint takes prompts in another order: it has {_order(state['order'])}, this run "
                            f"{_order(self._order_identity())}. Resume with the same, or start over the data with --finetune")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.groups, self.samples = int(state["groups"]), int(state["samples"])

    def _order_identity(self) -> dict[str, Any]:
        return {"shuffle": self._shuffle, "seed": self._seed if self._shuffle else None}


def _describe(data: dict[str, Any]) -> str:
    return f"{data['name']}, {data['rows']} rows, fingerprint {data['fingerprint'][:12]}"


def _order(order: dict[str, Any]) -> str:
    return f"--rollout-shuffle with --rollout-seed {order['seed']}" if order["shuffle"] else "file order"
