"""A rank that only serves: disaggregated."""

from __future__ import annotations

from rlmono.loop.device import build_engine, ready, restore_random
from rlmono.loop.profiling import RankPhases
from rlmono.loop.saver import Saver
from rlmono.loop.world import RunPlan, World
from rlmono.weights.update import Receiver
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build the engine, then: serve → receive the weights, a rollout a turn."""
    config, grid = world.config, world.grid
    engine = build_engine(world, link, memory_saver=False)
    members = (grid.trainers[0], *grid.engine_ranks)
    weights = Receiver(engine, world.store, members, world.rank, world.device, config.phase_timeout_s, config.check_weight_update_equal)
    saver = Saver(world, plan, link, None, engine)
    weights.update(version=plan.start)
    restore_random(world, plan, engine, trains=False)
    ready(link, plan, None)

    phases = RankPhases(world)
    for rollout_id in range(plan.start, plan.num_rollout):
        with phases.rollout(rollout_id, link):
            with phases("generate"):
                engine.serve(phases.tick)
                engine.drain()
            saver.save_if_due(rollout_id)   # its random state
            with phases("update"):
                update_s = weights.update(version=rollout_id + 1)
        link.report("updated", rollout_id, **{"perf/update_weights_time": update_s})
    engine.serve()                      # the last evaluation
    saver.wait()
