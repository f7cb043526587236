"""A rank that only serves, in a run that trains nothing: --debug-rollout-only."""

from __future__ import annotations

from pathlib import Path

import torch

from rlmono.loop.device import build_engine, ready
from rlmono.loop.world import RunPlan, World
from rlmono.weights.hf import Folder
from rlmono.weights.update import Colocated
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build the engine, fill it from the HF folder as a trainer would, then serve, a rollout a turn."""
    engine = build_engine(world, link, memory_saver=False)
    weights = Colocated(Folder(Path(plan.actor.folder), getattr(torch, world.dtype)), engine, world.config.check_weight_update_equal)
    weights.update(version=plan.start)
    ready(link, plan, None)

    for _ in range(plan.start, plan.num_rollout):
        engine.serve()
        engine.drain()
    engine.serve()                      # the last evaluation
