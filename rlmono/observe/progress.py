"""What the controller shows on its console while a run goes on: live (rich) on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO

_ETA_ROLLOUTS = 8
"""The time left is told from the mean of so many last rollouts: an evaluation now and then is averaged in."""

WATCHED = {
    "reward": "rollout/raw_reward",
    "loss": "train/loss",
    "response tokens": "rollout/response_len/mean",
    "tokens/s a device": "perf/tokens_per_gpu_per_sec",
    "|Δlogprob| train/rollout": "train/train_rollout_logprob_abs_diff",
}
"""Label on the console -> metric. Every evaluation set comes on top."""


@dataclass
class Status:
    """What is known of the run. Values are replaced, never changed in place: rich draws from a thread of its own."""

    title: str
    total_rollouts: int
    phase: str = "start"
    rollout_id: int = 0
    ended: bool = False
    done: int = 0
    total: int | None = None
    started: float = field(default_factory=time.monotonic)
    phase_started: float = field(default_factory=time.monotonic)
    history: dict[str, tuple[float, ...]] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    rollout_started: dict[int, float] = field(default_factory=dict)

    def where(self, rollout_id: int) -> str:
        """`rollout 3/40`, counted from 1; the last evaluation belongs to no rollout."""
        return "after the last rollout" if rollout_id >= self.total_rollouts else f"rollout {rollout_id + 1}/{self.total_rollouts}"

    def eta_s(self) -> float | None:
        """Seconds left, or None before a first rollout is over and after the last."""
        starts = list(self.rollout_started.values())[-_ETA_ROLLOUTS - 1:]
        if len(starts) < 2 or self.rollout_id >= self.total_rollouts:
            return None
        mean_s = (starts[-1] - starts[0]) / (len(starts) - 1)
        return max(0.0, mean_s * (self.total_rollouts - self.rollout_id) - (time.monotonic() - starts[-1]))

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Appends to the history of what is watched."""
        names = [name for name in metrics if name in WATCHED.values() or is_eval_mean(name)]
        self.history = {**self.history, **{name: (*self.history.get(name, ()), float(metrics[name])) for name in names}}

    def watched(self, among: Mapping[str, float] | None = None) -> dict[str, tuple[float, ...]]:
        """Label -> values so far, for what there is (and is `among` these metrics)."""
        names = {f"eval {name.removeprefix('eval/')}": name for name in self.history if is_eval_mean(name)} | WATCHED
        if WATCHED["reward"] in self.history:
            names.pop("loss")  # a policy loss says nothing
        return {label: self.history[name] for label, name in names.items() if name in self.history and (among is None or name in among)}


class Progress:
    """Phases, samples done and last values of a run. No method waits for the console, so it is fit for an event loop.

    `mode` is auto, rich, plain or none (messages only); auto is rich if `stream` is a terminal.
    """

    def __init__(self, mode: str, total_rollouts: int, title: str, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self.status = Status(title, total_rollouts)
        self.view = _view(mode, self.status, stream)

    def start(self) -> None:
        """Begins to show; the phase is `start` until the first call of `phase`."""
        self.view.start()

    def phase(self, name: str, rollout_id: int, total: int | None = None) -> None:
        """Ends the phase before and begins `name`, of `total` samples (None: not counted)."""
        self._end_phase()
        status = self.status
        if rollout_id not in status.rollout_started:
            status.rollout_started = {**status.rollout_started, rollout_id: time.monotonic()}
        status.phase, status.rollout_id, status.done, status.total = name, rollout_id, 0, total

    def advance(self, n: int = 1) -> None:
        """`n` more samples of this phase are done."""
        self.status.done += n

    def show(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Last values of a rollout; what is not watched is ignored."""
        self.status.remember(metrics)
        self.view.shown(rollout_id, metrics)

    def message(self, text: str) -> None:
        """One line that stays on the console, in every mode."""
        self.view.message(text)

    def stop(self) -> None:
        """Ends the last phase and leaves the console as it is."""
        self._end_phase()
        self.status.ended = True
        self.view.stop()

    def _end_phase(self) -> None:
        status = self.status
        now = time.monotonic()
        seconds = now - status.phase_started
        status.phase_seconds = {**status.phase_seconds, status.phase: seconds}
        self.view.phase_over(seconds)
        status.phase_started = now


class View:
    """Shows messages only; the other views build on it."""

    def __init__(self, status: Status, stream: TextIO) -> None:
        self.status, self.stream = status, stream

    def start(self) -> None:
        pass

    def phase_over(self, seconds: float) -> None:
        pass

    def shown(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def stop(self) -> None:
        pass


class Plain(View):
    """One line a phase and one a rollout, for logs and CI."""

    def phase_over(self, seconds: float) -> None:
        status = self.status
        if status.phase == "start":
            return self.message(f"{status.title}  started in {duration(seconds)}")
        count = "" if status.total is None else f"  {status.done}/{status.total} samples"
        self.message(f"{status.title}  {status.where(status.rollout_id)}  {status.phase}{count}  {duration(seconds)}")

    def shown(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        now = [f"{label} {number(values[-1])}" for label, values in self.status.watched(metrics).items()]
        eta = self.status.eta_s()
        if now:
            parts = [self.status.title, self.status.where(rollout_id), *now, *([] if eta is None else [f"ETA {duration(eta)}"])]
            self.message("  ".join(parts))


def _view(mode: str, status: Status, stream: TextIO) -> View:
    if mode == "auto":
        mode = "rich" if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" else "plain"
    if mode == "rich":
        from rlmono.observe.screen import Screen

        return Screen(status, stream)
    views = {"plain": Plain, "none": View}
    if mode not in views:
        raise ValueError(f"progress is {mode!r}; it can be auto, rich, plain or none")
    return views[mode](status, stream)


def is_eval_mean(name: str) -> bool:
    """Whether a metric is the mean of an evaluation set: `eval/<set>`, without anything after it."""
    return name.startswith("eval/") and name.count("/") == 1 and "@" not in name


def duration(seconds: float) -> str:
    """`0.84 s`, `3.1 s`, `12 s`, `3:05`, `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def number(value: float) -> str:
    """Three digits that count, without an exponent where a person would write none."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
