"""Phases of a device rank, and `--profile`: a trace of each rank that chrome://tracing or ui.perfetto.dev opens, with the phases named."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from rlmono.loop.world import World
from rlmono.observe.phases import Phases
from rlmono.world.channel import HostLink

log = logging.getLogger(__name__)


class RankPhases(Phases):
    """Phases that the profiler knows too."""

    def __init__(self, world: World):
        super().__init__()
        self._world = world
        self._rollouts = set(world.config.profile_rollouts) if world.config.profile else set()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with super().__call__(name), torch.profiler.record_function(f"phase: {name}"):
            yield

    @contextlib.contextmanager
    def rollout(self, rollout_id: int, link: HostLink) -> Iterator[None]:
        """One rollout: traced if it is asked for; its phases are sent to the controller at the end."""
        with self._trace(rollout_id) if rollout_id in self._rollouts else contextlib.nullcontext():
            yield
        link.report("phases", rollout_id, events=self.take())

    @contextlib.contextmanager
    def _trace(self, rollout_id: int) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._world.device == "cuda" else [])]
        with profile(activities=activities) as profiler:
            yield
        _write(profiler, self._world, rollout_id)


def _write(profiler: Any, world: World, rollout_id: int) -> None:
    folder = world.run_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollout-{rollout_id}-rank-{world.rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    log.info("trace of rollout %d: %s (%.1f MiB); open it in ui.perfetto.dev", rollout_id, path, path.stat().st_size / 2**20)
