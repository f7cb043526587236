"""Phases of a device rank, and `--profile`: a trace of each rank that chrome://tracing or ui.perfetto.dev opens, with the phases named."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, profile

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
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device == "cuda" else [])]
        self._profiler: Optional[profile] = None
        self._on, self._until = True, 0.0       # operators are traced; and until when

    def watch(self, trainer: Any) -> None:
        """Let the trainer's passes, too, end what is traced of their phase."""
        if self._rollouts:
            trainer.before_pack(self.tick)
            trainer.before_update(self._trace_on)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with super().__call__(name), torch.profiler.record_function(f"phase: {name}"):
            self._trace_on()
            yield
            self._trace_on()

    def tick(self) -> None:
        """Called before every step of the engine and every pass of the trainer: the first seconds of a phase say it all, and thousands of
        steps take minutes to write."""
        if self._profiler is not None and self._on and time.monotonic() > self._until:
            self._profiler.toggle_collection_dynamic(False, self._activities)
            self._on = False

    def _trace_on(self) -> None:
        self._until = time.monotonic() + self._world.config.profile_phase_s
        if self._profiler is not None and not self._on:
            self._profiler.toggle_collection_dynamic(True, self._activities)
            self._on = True

    @contextlib.contextmanager
    def rollout(self, rollout_id: int, link: HostLink) -> Iterator[None]:
        """One rollout: traced if it is asked for; its phases are sent to the controller at the end."""
        with self._trace(rollout_id) if rollout_id in self._rollouts else contextlib.nullcontext():
            yield
        link.report("phases", rollout_id, events=self.take())

    @contextlib.contextmanager
    def _trace(self, rollout_id: int) -> Iterator[None]:
        with profile(activities=self._activities) as self._profiler:
            yield
        profiler, self._profiler = self._profiler, None
        _write(profiler, self._world, rollout_id)


def _write(profiler: Any, world: World, rollout_id: int) -> None:
    folder = world.run_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollout-{rollout_id}-rank-{world.rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    log.info("trace of rollout %d: %s (%.1f MiB); open it in ui.perfetto.dev", rollout_id, path, path.stat().st_size / 2**20)
