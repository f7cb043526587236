"""Colocated: every device rank trains and serves, in turn."""

from __future__ import annotations

import rlmono.trainer.trainer  # noqa: F401 - Megatron's modules are imported before the thread begins with SGLang's
from rlmono.engine.compat import import_early
from rlmono.loop.device import build_engine, build_trainer, ready, receive_batch, restore_random
from rlmono.loop.profiling import RankPhases
from rlmono.loop.saver import Saver
from rlmono.loop.swapping import open_memory, settle
from rlmono.loop.world import RunPlan, World
from rlmono.weights.update import Colocated, as_engines_take_it
from rlmono.world.channel import HostLink


def run(world: World, plan: RunPlan, link: HostLink) -> None:
    """Build both roles, then: serve → train → save → update, a rollout a turn."""
    config = world.config
    memory = open_memory(world, plan)
    with memory.explained():
        import_early(config.model["architecture"])
        trainer = build_trainer(world, plan)
        settle(memory, world, trainer)
        engine = build_engine(world, link, memory_saver=memory.saver is not None)
        engine.drain()
        memory.add_engine(engine)
        weights = Colocated(as_engines_take_it(trainer, config.model), engine, config.check_weight_update_equal)
        saver = Saver(world, plan, link, trainer, engine)
        memory.to("sync")
        weights.update(version=plan.start)
        restore_random(world, plan, engine, trains=True)
        memory.to("rollout")
        ready(link, plan, trainer)

        phases = RankPhases(world)
        phases.watch(trainer)
        for rollout_id in range(plan.start, plan.num_rollout):
            with phases.rollout(rollout_id, link):
                with phases("generate"):
                    engine.serve(phases.tick)   # evaluation and rollout, until the controller ends the phase
                    engine.drain()
                with phases("swap"):
                    wake_up_s = memory.to("train")
                batch = receive_batch(link, config, rollout_id)
                with phases("train"):
                    metrics = trainer.train(batch)
                link.report("trained", rollout_id, metrics=metrics, reports=trainer.reports)
                memory.wait()                   # a rollout without a step of the optimizer has not waited for its state
                with phases.of(saver.is_due(rollout_id), "save"):
                    saver.save_if_due(rollout_id)       # every rank writes its part, the controller makes it visible
                with phases("swap"):
                    move_s = memory.to("sync")
                with phases("update"):
                    update_s = weights.update(version=rollout_id + 1)
                with phases("swap"):
                    sleep_s = move_s + memory.to("rollout")
            times = {"perf/update_weights_time": update_s, "perf/sleep_time": sleep_s, "perf/wake_up_time": wake_up_s}
            link.report("updated", rollout_id, **times, **memory.report())
        engine.serve()                      # the last evaluation
        saver.wait()
