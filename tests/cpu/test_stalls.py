"""A host's loop that stands still: where is said, the call that holds it up fails, and the rest goes on."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time

import pytest

from rlmono.loop import stalls
from rlmono.loop.stalls import Stalled, watched


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "LOOK_S", 0.02)
    monkeypatch.setattr(stalls, "WARN_S", 0.1)
    monkeypatch.setattr(stalls, "LEAST_S", 0.1)


def spins() -> None:
    while True:
        pass


def waits() -> None:
    time.sleep(100)


@pytest.mark.parametrize("blocks", [spins, waits])
def test_what_holds_up_the_loop_fails_and_the_rest_goes_on(blocks: object, caplog: pytest.LogCaptureFixture) -> None:
    async def call() -> None:
        blocks()        # type: ignore[operator]

    async def run() -> list[BaseException | int]:
        with watched(0.4, "the loop"):
            return await asyncio.gather(call(), asyncio.sleep(0.01, 7), return_exceptions=True)
    with caplog.at_level(logging.WARNING):
        failed, other = asyncio.run(run())
    assert other == 7 and isinstance(failed, Stalled), failed
    assert f"in {blocks.__name__}: what computes or waits belongs into asyncio.to_thread" in str(failed)        # type: ignore[attr-defined]
    assert "the loop has stood still for 0.1 s" in caplog.text and "test_stalls.py" in caplog.text


def test_a_loop_that_goes_round_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with watched(0.3, "the loop"):
            await asyncio.sleep(0.4)
        time.sleep(0.3)         # nobody looks any more
    asyncio.run(run())
    assert not caplog.records


def test_who_catches_the_exception_and_goes_on_ends_the_process() -> None:
    program = """
import asyncio, time
from rlmono.loop import stalls
stalls.LOOK_S, stalls.LAST_S, stalls.LEAST_S = 0.05, 0.2, 0.1
async def run():
    with stalls.watched(0.4, "the loop"):
        while True:
            try: time.sleep(100)
            except Exception: print("caught", flush=True)
asyncio.run(run())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (1, "caught\n") and "still stands at <string>:8 in run" in ended.stderr
