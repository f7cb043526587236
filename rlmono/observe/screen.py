"""The live view of `Progress`, drawn by rich in place on a terminal."""

from __future__ import annotations

import math
import os
import time
from typing import TextIO

from rich.console import Console, ConsoleDimensions, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlmono.observe.progress import Status, View, duration, number

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH, _WIDE, _NARROW = 24, 76, 44


class _StreamConsole(Console):
    """A console as wide as the terminal behind its stream; rich looks at the standard streams, which are log files here."""

    @property  # type: ignore[override,misc]
    def size(self) -> ConsoleDimensions:
        try:
            return ConsoleDimensions(*os.get_terminal_size(self.file.fileno()))
        except (OSError, ValueError):  # not a terminal: --progress rich into a file, or into a buffer
            return super().size


class Screen(View):
    """Header, bar and table of a Status; rich's thread draws, so no caller waits for the terminal."""

    def __init__(self, status: Status, stream: TextIO) -> None:
        super().__init__(status, stream)
        self.console = _StreamConsole(file=stream, highlight=False)
        self.live = Live(self, console=self.console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)

    def start(self) -> None:
        self.live.start()
        # rich hides the cursor; a run that is killed could not bring it back.
        self.console.show_cursor(True)

    def message(self, text: str) -> None:
        self.console.print(Text(text))

    def stop(self) -> None:
        self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        bar = [] if self.status.ended else [self._bar()]
        body = Group(self._header(), *bar, *self._values(console, width), self._times())
        title = Text(self.status.title, style="bold")
        yield body if width < _NARROW else Panel(body, title=title, title_align="left", border_style="bright_black")

    def _header(self) -> Table:
        status = self.status
        eta = status.eta_s()
        left = Text.assemble(("ended" if status.ended else status.phase, "bold cyan"), "  ", status.where(status.rollout_id))
        left_over = "" if status.ended else f" · ETA {'–' if eta is None else duration(eta)}"
        right = Text(duration(time.monotonic() - status.started) + left_over, style="dim")
        return _sides(left, right)

    def _bar(self) -> Table:
        status = self.status
        count = duration(time.monotonic() - status.phase_started) if status.total is None else f"{status.done}/{status.total}"
        bar = ProgressBar(total=status.total, completed=min(status.done, status.total or 0), pulse=status.total is None,
                          complete_style="cyan", finished_style="green")
        return _sides(bar, Text(count))

    def _values(self, console: Console, width: int) -> list[Table]:
        """The watched metrics: last and first value, and their course where there is room."""
        rows = self.status.watched()
        if not rows:
            return []
        table = Table(box=None, padding=(0, 2, 0, 0), expand=False, header_style="dim")
        table.add_column("", max_width=None if width >= _NARROW else max(4, width - 12), overflow="ellipsis")
        table.add_column("now", justify="right")
        if width >= _NARROW:
            table.add_column("first", justify="right", style="dim")
        sparks = width >= _WIDE and console.encoding.startswith("utf")
        if sparks:
            table.add_column("course", style="cyan")
        for column in table.columns:
            column.no_wrap = True
        for label, values in rows.items():
            now = Text(number(values[-1]), style="bold")
            cells: list[RenderableType] = [label, now, number(values[0]), spark(values) if sparks else ""]
            table.add_row(*cells[: len(table.columns)])
        return [table]

    def _times(self) -> Text:
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.status.phase_seconds.items() if name != "start"]
        return Text("last: " + " · ".join(parts) if parts else "", style="dim", no_wrap=True, overflow="ellipsis")


def spark(values: tuple[float, ...], width: int = _SPARK_WIDTH) -> str:
    """The course of the values as one line of block characters; more than `width` values are thinned out."""
    values = tuple(value for value in values if math.isfinite(value))
    if not values:
        return ""
    if len(values) > width:
        values = tuple(values[round(i * (len(values) - 1) / (width - 1))] for i in range(width))
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def _sides(left: RenderableType, right: Text) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(left, right)
    return grid
