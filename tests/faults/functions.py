"""A generate function that can be held, and a reward that misbehaves: given to runs by path."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from rlmono.rollout.generate import generate as plain_generate

HOLD, HELD = "hold-at-sample", "held"
RAISES, RETURNS_NAN, HANGS = 3, 10, 17
"""Samples of the first rollout whose reward fails, each in its way."""


async def generate(args: Any, sample: Any, sampling: Any, state: Any) -> Any:
    """The usual one. Where `<run_dir>/hold-at-sample` names this sample, it says so in `<run_dir>/held` and waits until the file is gone."""
    hold = Path(args.run_dir) / HOLD
    if hold.exists() and int(hold.read_text()) == sample.index:
        (hold.parent / HELD).touch()
        end = time.monotonic() + 300
        while hold.exists():
            if time.monotonic() > end:
                raise TimeoutError("nobody let go of the held sample")
            await asyncio.sleep(0.01)
    return await plain_generate(args, sample, sampling, state)


def reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """More different characters are better; three samples fail."""
    if sample.index == RAISES:
        raise RuntimeError("a reward with a fault")
    if sample.index == RETURNS_NAN:
        return math.nan
    if sample.index == HANGS:
        time.sleep(3600)
    return len(set(sample.response)) / 10


def keep(args: Any, samples: Any, **kwargs: Any) -> bool:
    """Drops about a third of the groups."""
    return sum(s.response_length for s in samples) % 3 != 0


CRASHES = 5
"""The group whose reward takes its worker down."""


def share(args: Any, samples: Any, **kwargs: Any) -> list[float]:
    """Each response's share of the group's characters: nothing that one sample alone could be given."""
    if samples[0].group_index == CRASHES:
        os.kill(os.getpid(), signal.SIGKILL)
    total = sum(len(s.response) for s in samples)
    return [len(s.response) / max(total, 1) for s in samples]
