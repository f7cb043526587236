"""The pictures of the report: one function a figure, each of which draws only what the run has."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlmono.observe.progress import is_eval_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, TEAL, AMBER, RED, VIOLET, GREEN = "#2563eb", "#0d9488", "#d97706", "#dc2626", "#7c3aed", "#16a34a"
SET_COLORS = (TEAL, VIOLET, AMBER, BLUE, RED, GREEN)
PHASES = {
    "perf/rollout_time": ("generate", "#2563eb"),
    "perf/eval_time": ("evaluate", "#0d9488"),
    "perf/log_probs_time": ("old logprobs", "#c4b5fd"),
    "perf/ref_log_probs_time": ("reference logprobs", "#a78bfa"),
    "perf/train_time": ("train", "#7c3aed"),
    "perf/update_weights_time": ("update weights", "#d97706"),
    "perf/sleep_time": ("sleep", "#fbbf24"),
    "perf/wake_up_time": ("wake up", "#fde68a"),
    "perf/save_time": ("save", "#dc2626"),
}
"""Metric -> name and colour, disjoint parts of perf/step_time (evaluation and save too); what they leave of it is drawn as the rest."""

_SIZE, _DPI = (6.6, 3.5), 170
_SMOOTH_FROM, _MARKERS_TO, _MAX_BARS = 60, 40, 80

STYLE: Any = {
    "font.size": 10, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 2.0, "lines.solid_capstyle": "round", "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """One drawn figure."""

    name: str
    title: str
    note: str
    png: bytes


@dataclass(frozen=True)
class Plot:
    """One figure of the report: it is drawn if any of `needs` has data (`eval/*`: the mean of any evaluation set)."""

    name: str
    title: str
    note: str
    needs: tuple[str, ...]
    draw: Callable[[Rows], Figure]


def series(rows: Rows, name: str) -> Points:
    """x (rollouts) and y of a metric. Several values of one rollout, its steps, are spread between it and the next."""
    by_rollout: dict[int, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            by_rollout.setdefault(row["rollout_id"], []).append(float(row[name]))
    x = [rollout + i / len(values) for rollout, values in by_rollout.items() for i in range(len(values))]
    return x, [value for values in by_rollout.values() for value in values]


def eval_names(rows: Rows) -> list[str]:
    """The metrics that are the mean of an evaluation set, in the order of the run."""
    return list(dict.fromkeys(name for row in rows for name in row if is_eval_mean(name) and row[name] is not None))


def draw_all(rows: Rows) -> tuple[list[Picture], list[str]]:
    """All pictures that the rows have data for; and the titles, with metric names, of those that they have none for."""
    from matplotlib import rc_context

    present = {name for row in rows for name, value in row.items() if value is not None}
    present |= {"eval/*"} if eval_names(rows) else set()
    pictures, missing = [], []
    for plot in PLOTS:
        if present.isdisjoint(plot.needs):
            missing.append(f"{plot.title} ({', '.join(plot.needs)})")
            continue
        with rc_context(STYLE):
            figure = plot.draw(rows)
            figure.suptitle(plot.title, x=0.012, ha="left", fontsize=12, fontweight="bold")
            pictures.append(Picture(plot.name, plot.title, plot.note, _png(figure)))
    return pictures, missing


def _figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels one above the other, with one x axis of rollouts."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    axes[-1].set_xlabel("rollout")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    figure.align_ylabels(axes)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _line(axes: Axes, points: Points, color: str, label: str | None = None, smooth: bool = True, **style: Any) -> None:
    """A line; with many points a faint one, and its moving average in full colour."""
    x, y = points
    if smooth and len(y) >= _SMOOTH_FROM:
        axes.plot(x, y, color=color, alpha=0.28, linewidth=1.0, **style)
        axes.plot(x, _moving_average(y, len(y) // 40), color=color, label=label, **style)
    else:
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(y) <= _MARKERS_TO else {}
        axes.plot(x, y, color=color, label=label, **marker, **style)


def _moving_average(values: list[float], reach: int) -> list[float]:
    """Mean over each value and up to `reach` neighbours on either side: as many on both, so that a slope stays where it is."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - n: i + n + 1]) / (2 * n + 1) for i, n in enumerate(reaches)]


def _panels(*panels: tuple[str, str, str]) -> Callable[[Rows], Figure]:
    """A figure with one panel for each (metric, axis label, colour) that has data."""

    def draw(rows: Rows) -> Figure:
        found = [(points, label, color) for name, label, color in panels if (points := series(rows, name))[0]]
        figure, axes = _figure(len(found))
        for panel, (points, label, color) in zip(axes, found, strict=True):
            _line(panel, points, color, smooth=label != "learning rate")
            panel.set_ylabel(label)
            panel.yaxis.set_major_locator(_few_ticks(len(found)))
        return figure

    return draw


def _few_ticks(panels: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6 if panels == 1 else 4)


def _accuracy(rows: Rows) -> Figure:
    figure, (axes,) = _figure()
    for name, color in zip(eval_names(rows), SET_COLORS * 9, strict=False):
        x, y = series(rows, name)
        _line(axes, (x, y), color, name.removeprefix("eval/"), smooth=False)
        axes.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", color=color, va="center",
                      fontweight="bold")
    values = [value for name in eval_names(rows) for value in series(rows, name)[1]]
    if min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(-0.02, 1.05)
    axes.set_ylabel("mean reward of the set")
    axes.margins(x=0.07)
    axes.legend(loc="lower right")
    return figure


def _logprob_difference(rows: Rows) -> Figure:
    x, y = series(rows, "train/train_rollout_logprob_abs_diff")
    figure, (axes,) = _figure()
    positive = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    if positive:
        axes.set_yscale("log")
        _line(axes, ([a for a, _ in positive], [b for _, b in positive]), AMBER)
    else:
        _line(axes, (x, y), AMBER)
    axes.set_ylabel("mean |Δ logprob| (nats)")
    return figure


def phase_seconds(rows: Rows) -> tuple[list[int], dict[str, list[float]]]:
    """Rollouts, and for each phase with any time its seconds in each of them; `rest` is what is left of perf/step_time."""
    names = (*PHASES, "perf/step_time")
    sums: dict[int, dict[str, float]] = {}
    for row in rows:
        for name in names:
            if row.get(name) is not None:
                of_rollout = sums.setdefault(row["rollout_id"], dict.fromkeys(names, 0.0))
                of_rollout[name] += row[name]
    rollouts = sorted(sums)
    seconds = {label: [sums[i][name] for i in rollouts] for name, (label, _) in PHASES.items()}
    seconds["rest"] = [max(0.0, sums[i]["perf/step_time"] - sum(sums[i][name] for name in PHASES)) for i in rollouts]
    return rollouts, {label: values for label, values in seconds.items() if any(values)}


def _time(rows: Rows) -> Figure:
    rollouts, seconds = phase_seconds(rows)
    every = -(-len(rollouts) // _MAX_BARS)
    starts = range(0, len(rollouts), every)
    x = [float(rollouts[i]) + (every - 1) / 2 for i in starts]
    colors = {**dict(PHASES.values()), "rest": "#d1d5db"}
    figure, (axes,) = _figure()
    axes.grid(False, axis="x")
    bottom = [0.0] * len(x)
    for label, values in seconds.items():
        means = [sum(values[i: i + every]) / len(values[i: i + every]) for i in starts]
        axes.bar(x, means, bottom=bottom, width=0.86 * every, color=colors[label], label=label)
        bottom = [low + mean for low, mean in zip(bottom, means, strict=True)]
    axes.set_ylabel("seconds" if every == 1 else f"seconds, mean of {every} rollouts")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, handlelength=1.0, handleheight=1.0)
    return figure


PLOTS = (
    Plot("reward", "Training reward", "Mean reward of the samples of each rollout.", ("rollout/raw_reward",),
         _panels(("rollout/raw_reward", "mean reward", BLUE))),
    Plot("accuracy", "Held-out accuracy", "Mean reward of each evaluation set.", ("eval/*",), _accuracy),
    Plot("loss", "Training loss", "SFT: mean negative logprob. GRPO: the policy loss, which says little.", ("train/loss",),
         _panels(("train/loss", "loss (nats)", BLUE))),
    Plot("length", "Response length", "Mean length, and the share that was cut at the limit.",
         ("rollout/response_len/mean", "rollout/truncated_ratio"),
         _panels(("rollout/response_len/mean", "tokens", BLUE), ("rollout/truncated_ratio", "share truncated", RED))),
    Plot("kl", "KL to the reference and to the old policy", "Mean over the sampled tokens; the old policy is the one that generated them.",
         ("train/kl_loss", "train/ppo_kl"),
         _panels(("train/kl_loss", "reference (nats)", VIOLET), ("train/ppo_kl", "old policy (nats)", AMBER))),
    Plot("entropy", "Entropy", "Mean entropy of the policy over the sampled tokens.", ("train/entropy_loss",),
         _panels(("train/entropy_loss", "nats a token", GREEN))),
    Plot("logprob_diff", "Train/rollout logprob difference", "How far the engine's logprobs are from the trainer's, on a log scale.",
         ("train/train_rollout_logprob_abs_diff",), _logprob_difference),
    Plot("optimizer", "Optimizer", "Global gradient norm before clipping, and the learning rate.", ("train/grad_norm", "train/lr"),
         _panels(("train/grad_norm", "gradient norm", RED), ("train/lr", "learning rate", BLUE))),
    Plot("time", "Where the time goes", "Seconds of each phase; the rest is what no phase accounts for.",
         (*PHASES, "perf/step_time"), _time),
    Plot("throughput", "Throughput", "Tokens generated a second, a device, and the share of the engines' time after they were last full.",
         ("perf/tokens_per_gpu_per_sec",),
         _panels(("perf/tokens_per_gpu_per_sec", "tokens/s a device", TEAL), ("perf/engine_slack_ratio", "share with slack", RED))),
)
