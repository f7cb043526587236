"""A host rank: the controller on the first node, a node's servant on the others. Nothing of sglang, megatron or CUDA here."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Any, Callable, Coroutine, Optional

import zmq.asyncio

from rlmono.checkpoint.store import Checkpoint, CheckpointStore, find_checkpoint
from rlmono.config.evals import eval_sets
from rlmono.config.schema import Config
from rlmono.config.show import resolved
from rlmono.data.tokenizer import Tokenizer
from rlmono.loop.stalls import watched
from rlmono.loop.world import RunPlan, RunRefused, Source, World
from rlmono.observe.metrics import MetricsLog
from rlmono.observe.progress import Progress
from rlmono.observe.report import write_report
from rlmono.observe.trackers import make_trackers
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.controller import Controller
from rlmono.rollout.debug import SavedRollouts
from rlmono.rollout.filters import load_filter
from rlmono.rollout.functions import function_at, generate_function
from rlmono.rollout.host import NodeHost, serve_node
from rlmono.rollout.prompts import Prompts
from rlmono.world.channel import HostMesh, PrivateFolder, open_mesh
from rlmono.world.devices import refuse_shared

log = logging.getLogger(__name__)


class Terminated(Exception):
    """SIGTERM has come."""


def run_host(world: World) -> None:
    """The whole life of a host rank."""
    if world.rank == world.grid.hosts[0]:
        prompts, plan = _check(world)
        asyncio.run(_until_terminated(lambda folder: _control(world, folder, prompts, plan), world))
    else:
        world.await_plan()
        asyncio.run(_until_terminated(lambda folder: _serve(world, folder), world))


async def _until_terminated(program: Callable[[PrivateFolder], Coroutine[Any, Any, None]], world: World) -> None:
    """Run a host's program in its private folder; on SIGTERM cancel it, so that it says goodbye and leaves nothing behind."""
    folder = PrivateFolder(world.attempt)
    task = asyncio.create_task(program(folder))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        raise Terminated("ended by SIGTERM: a rank of this node failed (see above, or its log), or the job was cancelled") from None
    finally:
        folder.close()


async def _serve(world: World, folder: PrivateFolder) -> None:
    context = zmq.asyncio.Context()
    mesh = open_mesh(context, world.store, world.rank, world.grid.hosts, world.launch.master_addr, world.config.start_timeout_s)
    host = NodeHost(world.config, world.grid, world.rank, folder, context, lambda *_: None)
    world.store.set(f"node/{world.launch.node}/address", folder.address)
    await host.start()
    try:
        with watched(world.config.heartbeat_timeout_s, f"the loop of host rank {world.rank}"):
            await serve_node(host, mesh, world.config.heartbeat_timeout_s)
    finally:
        await host.close()
        mesh.close()
        context.term()                  # after what is still to be sent, or the sockets' linger


def _check(world: World) -> tuple[Prompts | SavedRollouts, RunPlan]:
    """Before anything is built: the devices, the data, the checkpoint and the tokenizer. Raises RunRefused, here and on every rank."""
    try:
        if world.device == "cuda":
            refuse_shared(world.store, world.grid.devices, world.config.start_timeout_s)
        prompts, plan = plan_run(world.config, world.attempt)
    except ValueError as e:
        print(f"rlmono: {e}", file=world.log.err, flush=True)       # before the others know and end
        world.publish_plan(RunPlan(0, 0, 0, Source("", ""), Source("", ""), refused=str(e)))
        raise RunRefused(str(e)) from e
    world.publish_plan(plan)
    return prompts, plan


async def _control(world: World, folder: PrivateFolder, prompts: Prompts | SavedRollouts, plan: RunPlan) -> None:
    config, context = world.config, zmq.asyncio.Context()
    # Trackers may wait for a network: before other hosts wait for this one.
    metrics = MetricsLog(world.run_dir, make_trackers(config, world.run_dir, resolved(config)))
    metrics.truncate_from(plan.start)
    mesh: Optional[HostMesh] = None
    if world.grid.nodes > 1:
        mesh = open_mesh(context, world.store, world.rank, world.grid.hosts, world.launch.master_addr, config.start_timeout_s)
    host = NodeHost(config, world.grid, world.rank, folder, context, lambda *_: None)
    world.store.set(f"node/{world.launch.node}/address", folder.address)
    progress = Progress(config.progress, plan.num_rollout, _title(config), world.log.out)
    cluster = Cluster(config, world.grid, host, mesh)
    progress.start()
    _tell_start(progress, world, plan)
    error = ""
    try:
        await cluster.start()
        store = CheckpointStore(config, world.attempt) if config.save else None
        with watched(config.heartbeat_timeout_s, f"the loop of host rank {world.rank}, the controller,"):
            await Controller(config, cluster, prompts, store, metrics, progress, world.run_dir, plan.start).run()
    except BaseException as e:
        error = f"{type(e).__name__}: {e}"
        raise
    finally:
        progress.stop()
        metrics.close()
        await cluster.close(error)
        if mesh is not None:
            mesh.close()
        context.term()
    progress.message(f"report: {write_report(world.run_dir)}")


def plan_run(config: Config, attempt: str) -> tuple[Prompts | SavedRollouts, RunPlan]:
    """Read the data and the checkpoint, and say where the run begins. Raises ValueError with the remedy."""
    generate_function(config)       # refused here where it cannot be called
    load_filter(config)
    for s in eval_sets(config):
        if s.custom_generate_function_path:
            function_at(s.custom_generate_function_path)
    prompts = (SavedRollouts if config.debug_train_only else Prompts)(config, Tokenizer(config.hf_checkpoint or ""))
    store = CheckpointStore(config, attempt) if config.save else None
    if store:
        store.prepare()
    checkpoint = find_checkpoint(Path(config.load), config.model) if config.load and not _is_hf(config.load) else None
    if config.debug_rollout_only:
        steps = prompts.num_rollout * prompts.steps_per_rollout
        weights = Source(config.hf_checkpoint or "", "hf")
        return prompts, RunPlan(0, prompts.num_rollout, steps, weights, weights)
    start, actor = 0, _source(config.load if config.load and _is_hf(config.load) else config.ref_load or config.hf_checkpoint or "", config)
    if checkpoint is not None:
        fresh = config.finetune or checkpoint.weights_only
        actor = Source(str(checkpoint.folder), "dist", with_optimizer=not (fresh or config.no_load_optim))
        if not fresh:
            start = checkpoint.rollout_id + 1
            prompts.restore(checkpoint.state["data"], checkpoint.folder)
    goes_on = checkpoint is not None and not fresh and config.save == config.load
    if isinstance(prompts, SavedRollouts):
        prompts.refuse_missing(start)
    if store and not goes_on:           # else what is newer than `start` was found torn
        store.refuse_other_runs(start)
    reference = _source(config.ref_load or config.hf_checkpoint or "", config)
    return prompts, RunPlan(start, prompts.num_rollout, prompts.num_rollout * prompts.steps_per_rollout, actor, reference, "",
                            _notes(config, checkpoint, actor), *_other_models(config, actor))


def _notes(config: Config, checkpoint: Optional[Checkpoint], actor: Source) -> tuple[str, ...]:
    """What a person should know of where the run begins: a --load of its own that has nothing may be a slip of the pen."""
    if checkpoint is not None:
        return tuple(f"refused: {text}" for text in checkpoint.refused)
    if config.load and config.load != config.save and not _is_hf(config.load):
        return (f"note: --load {config.load} has no checkpoint: the run begins with {actor.folder}",)
    return ()


def _other_models(config: Config, actor: Source) -> tuple[Optional[Source], Optional[Source]]:
    """(critic, teacher), where the algorithm has them. A critic goes on from the actor's checkpoint, or else begins where it is told to,
    or with the actor's weights."""
    critic = teacher = None
    if config.loss_type != "sft" and config.advantage_estimator == "ppo":
        goes_on = actor.kind == "dist" and (Path(actor.folder) / "critic").is_dir()
        critic = _source(config.critic_load, config) if config.critic_load and not goes_on else actor
    if config.loss_type != "sft" and config.opd_teacher_load:
        teacher = _source(config.opd_teacher_load, config)
    return critic, teacher


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
    for note in plan.notes:
        progress.message(note)
    if plan.start:
        progress.message(f"resuming from {plan.actor.folder}: rollout {plan.start} of {plan.num_rollout}")
    progress.message(f"run directory {world.run_dir}; logs of ranks in {world.log.path.parent}")
