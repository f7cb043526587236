"""Colocated: every device rank trains and serves, in turn."""

from __future__ import annotations

from rlmono.loop.device import build_engine, build_trainer, ready, receive_batch, restore_random
from rlmono.loop.saver import Saver
from rlmono.loop.world import RunPlan, World
from rlmono.memory.saver import open_saver
from rlmono.memory.swap import Memory
from rlmono.weights.update import Colocated
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build both roles, then: serve → train → save → update, a rollout a turn."""
    config = world.config
    memory = Memory(open_saver(world.device))
    trainer = build_trainer(world, plan, memory)
    engine = build_engine(world, link, memory_saver=memory.saver is not None)
    memory.engine = engine
    weights = Colocated(trainer, engine, config.check_weight_update_equal)
    saver = Saver(world, plan, link, trainer, engine)
    weights.update(version=plan.start)
    restore_random(world, plan, engine, trains=True)
    memory.to("rollout")
    ready(link, plan, trainer)

    for rollout_id in range(plan.start, plan.num_rollout):
        engine.serve()                  # evaluation and rollout, until the controller ends the phase
        engine.drain()
        wake_up_s = memory.to("train")
        metrics = trainer.train(receive_batch(link, config, rollout_id))
        link.report("trained", rollout_id, metrics=metrics, reports=trainer.reports)
        saver.save_if_due(rollout_id)   # every rank writes its part, the controller makes it visible
        memory.to("sync")
        update_s = weights.update(version=rollout_id + 1)
        sleep_s = memory.to("rollout")
        link.report("updated", rollout_id, **{"perf/update_weights_time": update_s, "perf/sleep_time": sleep_s, "perf/wake_up_time": wake_up_s})
    engine.serve()                      # the last evaluation
    saver.wait()
