"""The picture of one rollout over ranks: generate, swap, train, update, idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlmono.observe.phases import Event, idle_share, span, typical
from rlmono.observe.plots import MUTED, STYLE, Picture, _png

COLORS = {"generate": "#2563eb", "swap": "#fbbf24", "old logprobs": "#c4b5fd", "reference logprobs": "#a78bfa", "train": "#7c3aed", "save": "#dc2626",
          "update": "#0d9488"}
_OTHER, _IDLE = "#9ca3af", "#f1f5f9"
_MAX_RANKS = 64


def draw_timeline(timeline: Mapping[int, Mapping[int, Sequence[Event]]]) -> Picture:
    """A bar a rank, of the rollout that is typical."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch
    rollout_id = typical(timeline)
    ranks = dict(sorted(timeline[rollout_id].items())[:_MAX_RANKS])
    begin, end = span(ranks)
    title = f"Rollout {rollout_id} over ranks"
    with rc_context(STYLE):
        figure = Figure(figsize=(6.6, max(1.9, 1.2 + 0.3 * len(ranks))), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        axes = figure.subplots()
        names: dict[str, str] = {}
        for row, events in enumerate(ranks.values()):
            axes.broken_barh([(0, end - begin)], (row - 0.4, 0.8), facecolors=_IDLE)
            for name, a, b in events:
                names[name] = COLORS.get(name, _OTHER)
                axes.broken_barh([(a - begin, b - a)], (row - 0.4, 0.8), facecolors=names[name])
        axes.set_yticks(range(len(ranks)), [f"rank {r}" for r in ranks])
        axes.invert_yaxis()
        axes.set_xlim(0, end - begin)
        axes.set_xlabel("seconds")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", colors=MUTED)
        handles = [Patch(color=c, label=n) for n, c in names.items()] + [Patch(facecolor=_IDLE, edgecolor="#cbd5e1", label="idle")]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handlelength=1.0, handleheight=1.0)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        note = f"What each rank does when; {100 * idle_share(ranks):.1f} % of the ranks' time they wait."
        return Picture("timeline", title, note, _png(figure))
