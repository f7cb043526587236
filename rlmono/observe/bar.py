"""How far a long job over bytes is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Iterator, Optional, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

GIB = 2**30
LINE_EVERY_S = 5.0


class Bar:
    """`with Bar("load", total_bytes) as bar: bar.advance(n)`, from any thread. Shows nothing where `show` is False."""

    def __init__(self, title: str, total_bytes: int, show: bool = True, stream: Optional[TextIO] = None):
        self.title, self.total, self.show, self.stream = title, max(1, total_bytes), show, stream or sys.stderr
        self.done, self.lock, self.started = 0, threading.Lock(), time.monotonic()
        self.said = self.started
        self.rich: Optional[Progress] = None
        if show and self.stream.isatty():
            self.rich = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                                 TimeRemainingColumn(), console=Console(file=self.stream))
            self.task = self.rich.add_task(title, total=self.total)

    def __enter__(self) -> Bar:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich:
            self.rich.stop()
        elif self.show:
            self._say()

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        with self.lock:
            self.done += nbytes
            if self.rich:
                self.rich.update(self.task, completed=self.done)
            elif self.show and time.monotonic() > self.said + LINE_EVERY_S:
                self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        speed = self.done / GIB / max(1e-9, self.said - self.started)
        percent = min(100, 100 * self.done // self.total)
        print(f"{self.title}: {percent} % of {self.total / GIB:.3g} GiB, {speed:.2g} GiB/s", file=self.stream, flush=True)

    @contextlib.contextmanager
    def following(self, folder: Path) -> Iterator[None]:
        """While the block runs, what is done is the size of a folder's files."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(0.5):
                self.advance(size_of(folder) - self.done)
        thread = threading.Thread(target=follow, daemon=True)
        if self.show:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self.show:
                thread.join()
                self.advance(size_of(folder) - self.done)


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
