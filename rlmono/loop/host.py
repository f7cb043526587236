"""A host rank: the controller on the first node, a node's servant on the others. Nothing of sglang, megatron or CUDA here."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Optional

import zmq.asyncio

from rlmono.checkpoint.store import CheckpointStore, find_checkpoint
from rlmono.config.schema import Config
from rlmono.config.show import resolved
from rlmono.data.tokenizer import Tokenizer
from rlmono.loop.world import RunPlan, RunRefused, Source, World
from rlmono.observe.metrics import MetricsLog
from rlmono.observe.progress import Progress
from rlmono.observe.report import write_report
from rlmono.observe.trackers import make_trackers
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.controller import Controller
from rlmono.rollout.host import NodeHost, serve_node
from rlmono.rollout.prompts import Prompts
from rlmono.world.channel import HostMesh, PrivateFolder, open_mesh

log = logging.getLogger(__name__)


def run_host(world: World) -> None:
    """The whole life of a host rank."""
    folder = PrivateFolder(world.attempt)
    try:
        asyncio.run(_control(world, folder) if world.rank == world.grid.hosts[0] else _serve(world, folder))
    finally:
        folder.close()


async def _serve(world: World, folder: PrivateFolder) -> None:
    world.await_plan()
    context = zmq.asyncio.Context()
    mesh = open_mesh(context, world.store, world.rank, world.grid.hosts, world.launch.master_addr, world.config.start_timeout_s)
    host = NodeHost(world.config, world.grid, world.rank, folder, context, lambda *_: None)
    world.store.set(f"node/{world.launch.node}/address", folder.address)
    await host.start()
    try:
        await serve_node(host, mesh, world.config.heartbeat_timeout_s)
    finally:
        await host.close()
        mesh.close()


async def _control(world: World, folder: PrivateFolder) -> None:
    config = world.config
    try:
        prompts, plan = plan_run(config, world.attempt)
    except ValueError as e:             # the data, the checkpoint or the tokenizer; nothing has been built yet
        world.publish_plan(RunPlan(0, 0, 0, Source("", ""), Source("", ""), refused=str(e)))
        raise RunRefused(str(e)) from e
    world.publish_plan(plan)
    context = zmq.asyncio.Context()
    mesh: Optional[HostMesh] = None
    if world.grid.nodes > 1:
        mesh = open_mesh(context, world.store, world.rank, world.grid.hosts, world.launch.master_addr, config.start_timeout_s)
    host = NodeHost(config, world.grid, world.rank, folder, context, lambda *_: None)
    world.store.set(f"node/{world.launch.node}/address", folder.address)
    metrics = MetricsLog(world.run_dir, make_trackers(config, world.run_dir, resolved(config)))
    metrics.truncate_from(plan.start)
    progress = Progress(config.progress, plan.num_rollout, _title(config), world.log.out)
    cluster = Cluster(config, world.grid, host, mesh)
    progress.start()
    _tell_start(progress, world, plan)
    try:
        await cluster.start()
        store = CheckpointStore(config, world.attempt) if config.save else None
        await Controller(config, cluster, prompts, store, metrics, progress, world.run_dir, plan.start).run()
        progress.message(f"report: {write_report(world.run_dir)}")
    finally:
        progress.stop()
        metrics.close()
        await cluster.close()
        if mesh is not None:
            mesh.close()


def plan_run(config: Config, attempt: str) -> tuple[Prompts, RunPlan]:
    """Read the data and the checkpoint, and say where the run begins. Raises ValueError with the remedy."""
    prompts = Prompts(config, Tokenizer(config.hf_checkpoint or ""))
    if config.save:
        CheckpointStore(config, attempt).prepare()
    checkpoint = find_checkpoint(Path(config.load), config.model) if config.load and not _is_hf(config.load) else None
    start, actor = 0, _source(config.load if config.load and _is_hf(config.load) else config.ref_load or config.hf_checkpoint or "", config)
    if checkpoint is not None:
        fresh = config.finetune
        actor = Source(str(checkpoint.folder), "dist", with_optimizer=not (fresh or config.no_load_optim))
        if not fresh:
            start = checkpoint.rollout_id + 1
            prompts.restore(checkpoint.state["data"])
    reference = _source(config.ref_load or config.hf_checkpoint or "", config)
    return prompts, RunPlan(start, prompts.num_rollout, prompts.num_rollout * prompts.steps_per_rollout, actor, reference)


def _is_hf(folder: str) -> bool:
    return (Path(folder) / "config.json").exists()


def _source(folder: str, config: Config) -> Source:
    """An HF folder as it is, else the newest checkpoint under it, for its weights."""
    if _is_hf(folder):
        return Source(folder, "hf")
    checkpoint = find_checkpoint(Path(folder), config.model)
    if checkpoint is None:
        raise ValueError(f"{folder}: neither an HF folder (config.json) nor a folder with a checkpoint")
    return Source(str(checkpoint.folder), "dist")


def _title(config: Config) -> str:
    return "SFT" if config.loss_type == "sft" else config.advantage_estimator.upper()


def _tell_start(progress: Progress, world: World, plan: RunPlan) -> None:
    progress.message("\n".join(world.grid.lines()))
    for note in world.config.notes:
        progress.message(f"note: {note}")
    if plan.start:
        progress.message(f"resuming from {plan.actor.folder}: rollout {plan.start} of {plan.num_rollout}")
    progress.message(f"run directory {world.run_dir}; logs of ranks in {world.log.path.parent}")
