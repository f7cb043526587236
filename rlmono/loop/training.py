"""A rank that only trains: disaggregated, or supervised fine-tuning, where nothing serves."""

from __future__ import annotations

from rlmono.loop.device import build_trainer, ready, receive_batch, restore_random
from rlmono.loop.saver import Saver
from rlmono.loop.world import RunPlan, World
from rlmono.memory.swap import Memory
from rlmono.weights.update import Sender
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build the trainer, then: train → save → send the weights, a rollout a turn."""
    config, grid = world.config, world.grid
    trainer = build_trainer(world, plan, Memory(None))
    saver = Saver(world, plan, link, trainer, None)
    weights = None
    if grid.engines:
        members = (grid.trainers[0], *grid.engine_ranks)
        weights = Sender(trainer, world.store, members, world.rank, world.device, config.phase_timeout_s, config.check_weight_update_equal)
        weights.update(version=plan.start)
    restore_random(world, plan, None, trains=True)
    ready(link, plan, trainer)

    for rollout_id in range(plan.start, plan.num_rollout):
        metrics = trainer.train(receive_batch(link, config, rollout_id))
        link.report("trained", rollout_id, metrics=metrics, reports=trainer.reports)
        saver.save_if_due(rollout_id)
        if weights is not None:
            weights.update(version=rollout_id + 1)
    saver.wait()
