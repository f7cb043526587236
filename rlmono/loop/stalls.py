"""What a host does when its event loop stands still: a generate function, a filter or a tracker that computes or waits without `await`.

Nothing on the loop can notice that, and every deadline is on the loop. So a thread looks whether the loop goes round. When it does not, the log says
where it stands; then an exception is raised there, so that a generate function's call is a counted outcome of its sample as if it had failed by
itself, and anything else ends the run with its place; and when that is caught and nothing changes, the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Optional

log = logging.getLogger(__name__)
LOOK_S = 1.0
WARN_S = 10.0
LAST_S = 10.0
"""From the exception to the end of the process."""
LEAST_S = 5.0
"""No shorter limit, whatever the heartbeat's: a busy machine is none that stands still."""
ASIDE = "what computes or waits belongs into asyncio.to_thread or a process of its own"
INTERRUPT = signal.SIGUSR2


class Stalled(RuntimeError):
    """Raised where the loop stands still."""


class _Watch:
    def __init__(self, limit_s: float, what: str):
        self.limit_s, self.what = limit_s, what
        self.ended = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.beats = 0
        self.meant: Optional[int] = None
        """The beat after which the loop has stood still for too long."""

    def beat(self) -> None:
        self.beats += 1
        if not self.ended.is_set():
            self.loop.call_later(LOOK_S, self.beat)

    def look(self) -> None:
        """In a thread. Looks are counted, and not seconds: a process that was stopped as a whole is none that stands still."""
        seen, looks = -1, 0
        while not self.ended.wait(LOOK_S):
            seen, looks = self.beats, looks + 1 if self.beats == seen else 0
            if looks == max(round(WARN_S / LOOK_S), 1):
                log.warning("%s has stood still for %g s: %s. It is at\n%s", self.what, looks * LOOK_S, ASIDE,
                            "".join(traceback.format_stack(_main_frame())))
            if looks == max(round(self.limit_s / LOOK_S), 1):
                self.meant = seen
                signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
            if looks * LOOK_S >= self.limit_s + LAST_S:
                log.critical("%s still stands at %s after an exception there: the process ends", self.what, _place(_main_frame()))
                os._exit(1)

    def interrupt(self, signum: int, frame: Optional[FrameType]) -> None:
        if self.meant == self.beats:
            self.meant = None
            raise Stalled(f"{self.what} has stood still for {self.limit_s:g} s at {_place(frame)}: {ASIDE} "
                          "(three quarters of --heartbeat-timeout-s is the limit)")


@contextlib.contextmanager
def watched(heartbeat_timeout_s: float, what: str) -> Iterator[None]:
    """For the main thread's running loop, as long as the block lasts. `what` stands still, in messages. Other hosts take this one for dead after
    `heartbeat_timeout_s`; it acts before."""
    watch = _Watch(max(0.75 * heartbeat_timeout_s, LEAST_S), what)
    before = signal.signal(INTERRUPT, watch.interrupt)
    thread = threading.Thread(target=watch.look, name="stalls", daemon=True)
    watch.beat()
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join()
        signal.signal(INTERRUPT, before)


def _main_frame() -> Optional[FrameType]:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _place(frame: Optional[FrameType]) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame is not None else "an unknown place"
