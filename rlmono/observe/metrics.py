"""`metrics.jsonl`: one JSON object a line, and what is forwarded to the trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmono.observe.trackers import Tracker

logger = logging.getLogger(__name__)

METRICS, SUPERSEDED = "metrics.jsonl", "metrics.superseded.jsonl"


class MetricsError(ValueError):
    """A metrics file that is missing or cannot be read."""


class MetricsLog:
    """Appends to `<run_dir>/metrics.jsonl`, and forwards to trackers.

    Nothing that was written is ever lost: what a crash tore, or a resumed run does again, is moved to
    `metrics.superseded.jsonl`.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path = Path(run_dir) / METRICS
        self.superseded = Path(run_dir) / SUPERSEDED
        self.trackers = list(trackers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(keep=lambda row: True)

    def log(self, rollout_id: int, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one line. A value that is not finite is written as null, and `nonfinite` counts those of the line."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        row: dict[str, Any] = {"time": time.time(), "rollout_id": rollout_id, "step": step}
        if len(finite) < len(metrics):
            row["nonfinite"] = len(metrics) - len(finite)
        row.update((name, finite.get(name)) for name in metrics)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._forward("log", rollout_id, finite)

    def truncate_from(self, rollout_id: int) -> None:
        """For a run that goes on at `rollout_id`: moves the lines from there on to `metrics.superseded.jsonl`."""
        self._rewrite(keep=lambda row: row["rollout_id"] < rollout_id)
        self._forward("truncate_from", rollout_id)

    def close(self) -> None:
        """Lets the trackers write what they still hold."""
        self._forward("close")

    def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Moves the torn lines and those that `keep` does not want; a line is in at least one of the files at any time."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept: list[str] = []
        moved: list[str] = []
        for line in text.splitlines():
            row = _parse(line)
            (kept if row is not None and keep(row) else moved).append(line + "\n")
        if "".join(kept) == text:
            return
        _append_durably(self.superseded, moved)
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.unlink(missing_ok=True)
        _append_durably(temporary, kept)
        os.replace(temporary, self.path)
        logger.info("moved %d of %d lines of %s to %s", len(moved), len(moved) + len(kept), self.path, self.superseded.name)

    def _forward(self, method: str, *arguments: Any) -> None:
        """Calls every tracker; one that fails is switched off, for training matters more than a tracker."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self.trackers.remove(tracker)
                logger.warning("tracker %s failed and is off from here on; %s has everything: %r", tracker.name, self.path, error)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `<run_dir>/metrics.jsonl`. A last line that a crash tore is left out; any other bad line is an error."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        raise MetricsError(f"{path} does not exist: {run_dir} is not the folder of a run that has logged metrics (--run-dir)")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise MetricsError(f"{path}:{number} is not a line of metrics: {line[:80]!r}; remove that line")
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    """The object on a line, or None where it is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("rollout_id"), int) else None


def _append_durably(path: Path, lines: Sequence[str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
