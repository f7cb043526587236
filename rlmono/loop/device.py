"""A device rank: build its roles, then run the loop of the placement. The loops are the files beside this one."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any, Mapping, Optional

import torch

from rlmono.checkpoint import rng
from rlmono.config.hf import model_shape
from rlmono.config.schema import Config
from rlmono.loop.world import RunPlan, Source, World
from rlmono.world.channel import HostLink
from rlmono.world.devices import claim_gpu
from rlmono.world.groups import init_pool
from rlmono.world.messages import TrainBatch

log = logging.getLogger(__name__)


def run_device(world: World) -> None:
    """The whole life of a device rank."""
    device = _prepare_process(world)
    trains, serves = world.rank in world.grid.trainers, world.grid.engine_of(world.rank) is not None
    if trains:
        from rlmono.trainer import compat
        compat.prepare()                # megatron before sglang and before any process group
        from rlmono.trainer import te
        te.check(world.config)
    plan = world.await_plan()
    pool = world.grid.pool_of(world.rank)
    init_pool(world.store, pool, world.rank, device, world.config.start_timeout_s)
    link = HostLink(world.host_address(), world.rank)
    if trains and serves:
        from rlmono.loop.colocated import run
    elif trains:
        from rlmono.loop.training import run
    elif world.config.debug_rollout_only:
        from rlmono.loop.generating import run
    else:
        from rlmono.loop.serving import run
    run(world, plan, link)
    link.close()


def _prepare_process(world: World) -> str:
    """Threads, the device, and the environment that SGLang and Megatron would set in processes of their own."""
    if world.device == "cuda":
        claim_gpu(world.store, world.rank, world.launch.local_rank, socket.gethostname())
    else:
        devices = world.launch.local_world_size - 1
        torch.set_num_threads(1 if world.config.deterministic else max(1, (os.cpu_count() or 1) // devices))
    return world.device


def build_trainer(world: World, plan: RunPlan) -> Any:
    """The trainer with its weights (and, on resume, its optimizer), and the other models that the config asks for."""
    from rlmono.trainer.trainer import Trainer
    trainer = Trainer(world.config, getattr(torch, world.dtype), plan.total_steps)
    _load_actor(trainer, plan.actor)
    if trainer.needs_reference():
        _load_frozen(trainer, trainer.add_reference(), plan.reference, world.config.model)
    if plan.teacher is not None:
        shape = model_shape(plan.teacher.folder) if plan.teacher.kind == "hf" else world.config.model
        _load_frozen(trainer, trainer.add_teacher(shape), plan.teacher, shape)
    if plan.critic is not None:
        _load_critic(trainer.critic, plan.critic)
    return trainer


def _load_frozen(trainer: Any, chunks: list[Any], source: Source, shape: Mapping[str, Any]) -> None:
    if source.kind == "hf":
        trainer.load_hf(Path(source.folder), chunks, shape)
    else:
        from rlmono.checkpoint import torch_dist
        torch_dist.load_weights(chunks, Path(source.folder))


def _load_critic(critic: Any, source: Source) -> None:
    if source.kind == "hf":
        critic.load_hf(Path(source.folder))
    else:
        from rlmono.checkpoint import torch_dist
        torch_dist.load_critic(critic, Path(source.folder), source.with_optimizer)


def _load_actor(trainer: Any, source: Source) -> None:
    if source.kind == "hf":
        trainer.load_hf(Path(source.folder))
    else:
        from rlmono.checkpoint import torch_dist
        torch_dist.load(trainer, Path(source.folder), source.with_optimizer)


def build_engine(world: World, link: HostLink, memory_saver: bool) -> Any:
    """This rank's part of its engine; collective over the pool."""
    from rlmono.engine.engine import Engine
    pool = world.grid.pool_of(world.rank)
    engines = [[pool.index(r) for r in ranks] for ranks in world.grid.engines]
    return Engine(world.config, engines, world.launch.local_rank, world.device, world.dtype, link, memory_saver)


def restore_random(world: World, plan: RunPlan, engine: Any, trains: bool) -> None:
    """Random states from the checkpoint, after everything that draws has been built."""
    if plan.actor.with_optimizer and not rng.load(Path(plan.actor.folder), world.rank, engine.rng if engine else None, trains):
        log.warning("%s has no random states for rank %d: it was written by another number of ranks, so this run goes its own way",
                    plan.actor.folder, world.rank)


def receive_batch(link: HostLink, config: Config, rollout_id: int) -> TrainBatch:
    """The controller's batch for this rollout. While engines generate, a trainer waits here."""
    message = link.receive(config.phase_timeout_s, f"the batch of rollout {rollout_id}")
    if not isinstance(message, TrainBatch) or message.rollout_id != rollout_id:
        raise RuntimeError(f"expected the batch of rollout {rollout_id}, got {type(message).__name__}")
    return message


def ready(link: HostLink, plan: RunPlan, trainer: Optional[Any]) -> None:
    """Tell the controller that this rank is built."""
    link.report("ready", plan.start, dp_rank=trainer.data_parallel[0] if trainer is not None else None)
