"""A rank that only trains: disaggregated, or supervised fine-tuning, where nothing serves."""

from __future__ import annotations

from rlmono.loop.device import build_trainer, ready, receive_batch, restore_random
from rlmono.loop.profiling import RankPhases
from rlmono.loop.saver import Saver
from rlmono.loop.world import RunPlan, World
from rlmono.weights.update import Sender, as_engines_take_it
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build the trainer, then: train → save → send the weights, a rollout a turn."""
    config, grid = world.config, world.grid
    trainer = build_trainer(world, plan)
    saver = Saver(world, plan, link, trainer, None)
    weights = None
    if grid.engines:
        members = (grid.trainers[0], *grid.engine_ranks)
        exporter = as_engines_take_it(trainer, config.model)
        weights = Sender(exporter, world.store, members, world.rank, world.device, config.phase_timeout_s, config.check_weight_update_equal)
        weights.update(version=plan.start)
    restore_random(world, plan, None, trains=True)
    ready(link, plan, trainer)

    phases = RankPhases(world)
    phases.watch(trainer)
    for rollout_id in range(plan.start, plan.num_rollout):
        batch = receive_batch(link, config, rollout_id)
        with phases.rollout(rollout_id, link):
            with phases("train"):
                metrics = trainer.train(batch)
            link.report("trained", rollout_id, metrics=metrics, reports=trainer.reports)
            with phases.of(saver.is_due(rollout_id), "save"):
                saver.save_if_due(rollout_id)
            if weights is not None:
                with phases("update"):
                    weights.update(version=rollout_id + 1)
    saver.wait()
