"""The trainers' part of a checkpoint: model, optimizer and schedule, as torch_dist; in PPO the critic's too, beside it.

Megatron's writer forks, and keeps a manager process that outlives a killed rank; both are replaced by writing in this
process. All else is Megatron's own format: sharded over ranks, loadable on another layout.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import distrib_optimizer

from rlmono.checkpoint.store import CheckpointError
from rlmono.trainer.critic import HEAD, Critic
from rlmono.trainer.learner import Learner
from rlmono.trainer.trainer import Trainer

ACTOR, CRITIC = "trainer", "critic"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How the names of the model's tensors begin; the optimizer's begin otherwise."""


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part under `folder`. Collective over trainers; nothing is visible until the controller has published it."""
    _save(_state(trainer, loading=False), folder / ACTOR)
    if trainer.critic is not None:
        _save(_state(trainer.critic, loading=False), folder / CRITIC)


def save_weights(chunks: list[Any], folder: Path) -> None:
    """Only weights, from bare chunks; collective as `save` is."""
    _save(_chunks(chunks), folder / ACTOR)


def _save(state: dict[str, Any], folder: Path) -> None:
    _install()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                            content_metadata=_METADATA)


def load(learner: Learner, folder: Path, with_optimizer: bool, part: str = ACTOR) -> None:
    """Read what `save` wrote, on any layout. Collective over trainers."""
    _install()
    state = _state(learner, loading=True)
    if not with_optimizer:
        state = {_key(i): state[_key(i)] for i in range(len(learner.chunks))}
    loaded = dist_checkpointing.load(state, str(folder / part))
    for i, chunk in enumerate(learner.chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    if not with_optimizer:
        learner.weights_changed()
        return
    for i, optimizer in enumerate(learner.optimizers):
        optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"][i])
        for adam in optimizer.optimizer.state.values():
            adam["step"] = torch.tensor(float(loaded["adam_steps"]))        # each its own: a shared one would run away
    learner.schedule.load_state_dict(loaded["schedule"])
    learner.skipped_steps = loaded["skipped_steps"]


def load_critic(critic: Critic, folder: Path, with_optimizer: bool) -> None:
    """The critic of a checkpoint; where it has none, the actor's weights in the critic's body. Collective."""
    if (folder / CRITIC).is_dir():
        load(critic, folder, with_optimizer, CRITIC)
        return
    body = {key: {name: x for name, x in state.items() if name != HEAD} for key, state in _chunks(critic.chunks).items()}
    loaded = dist_checkpointing.load(body, str(folder / ACTOR))
    for i, chunk in enumerate(critic.chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    critic.weights_changed()


def load_weights(chunks: list[Any], folder: Path) -> None:
    """Only weights, into bare chunks (the reference). Collective. Raises CheckpointError for a tensor that is missing, extra or of another shape."""
    state = _chunks(chunks)
    _compare(state, folder / "trainer")
    loaded = dist_checkpointing.load(state, str(folder / "trainer"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)


def weights_dtype(folder: Path) -> torch.dtype:
    """What the weights in a checkpoint are stored as."""
    tensors = dist_checkpointing.load_tensors_metadata(str(folder / "trainer"))
    return next(t.dtype for name, t in tensors.items() if name.endswith("final_layernorm.weight"))   # type: ignore[no-any-return]


def weights_count(folder: Path) -> int:
    """How many numbers the weights in a checkpoint are."""
    tensors = dist_checkpointing.load_tensors_metadata(str(folder / "trainer"))
    return sum(math.prod(t.global_shape) for name, t in tensors.items() if name.startswith(_MODEL))


def _compare(state: dict[str, Any], folder: Path) -> None:
    """The names and shapes of the model's tensors, here and there."""
    mine = {t.key: t for t in nested_values(state) if isinstance(t, (ShardedTensor, ShardedTensorFactory))}
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for name, tensor in mine.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name!r} is missing")
        # A vocabulary is padded as the layout wants it.
        if isinstance(tensor, ShardedTensor) and not tensor.allow_shape_mismatch and tensor.global_shape != stored[name].global_shape:
            raise CheckpointError(f"{folder}: tensor {name!r} is {tuple(stored[name].global_shape)}, but the model's is {tuple(tensor.global_shape)}")
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(mine))
    extra = sorted(n for n in stored.keys() - set().union(*names) if n.startswith(_MODEL))
    if extra:
        raise CheckpointError(f"{folder}: {len(extra)} tensor(s) have no place in the model: {', '.join(extra[:4])}")


def _key(chunk: int) -> str:
    """Each virtual pipeline stage has a name of its own in the state; tensors are named over the whole model."""
    return "model" if chunk == 0 else f"model{chunk}"


def _chunks(chunks: list[Any]) -> dict[str, Any]:
    return {_key(i): c.sharded_state_dict(metadata=_metadata()) for i, c in enumerate(chunks)}


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _state(learner: Learner, loading: bool) -> dict[str, Any]:
    """What is saved. Optimizer states are named by their parameter in the whole model, and not by the optimizer that has
    them here: Megatron keeps experts in one of their own, but only under expert parallelism."""
    models = _chunks(learner.chunks)
    optimizer = {i: o.sharded_param_state_fully_reshardable(models, loading, _metadata()) for i, o in enumerate(learner.optimizers)}
    steps = next((int(s["step"]) for o in learner.optimizers for s in o.optimizer.state.values()), 0)
    return {**models, "optimizer": optimizer, "adam_steps": steps, "schedule": learner.schedule.state_dict(), "skipped_steps": learner.skipped_steps}


def _install() -> None:
    """The overrides, each with its reason."""
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_here)
    filesystem_async._get_write_results_queue = _Results.instance       # else a manager process, an orphan after a kill
    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = _set_states


class _Results(list[Any]):
    """The queue between writer and reader, which are one process here."""

    _one: Any = None

    @classmethod
    def instance(cls) -> _Results:
        cls._one = cls._one or cls()
        return cls._one     # type: ignore[no-any-return]

    put = list.append

    def get(self, *_: Any, **__: Any) -> Any:
        return self.pop(0)

    get_nowait = get


def _write_here(transform_list: Any, use_msc: bool, rank: int, write_buckets: Any, global_results_queue: Any) -> None:
    """Stands for write_preloaded_data_multiproc: threads instead of forks, which are unsafe beside gloo's and ZMQ's threads."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def one(item: tuple[int, Any]) -> tuple[int, Any]:
        results = _Results()
        write(transform_list, local_proc_idx=item[0], write_bucket=item[1], results_queue=results, count_queue=_Count(), use_fsync=True)
        return results.pop()    # type: ignore[no-any-return]

    with ThreadPoolExecutor(max(1, len(write_buckets))) as pool:
        done = dict(pool.map(one, enumerate(write_buckets)))
    failed = next((r for r in done.values() if isinstance(r, Exception)), None)
    global_results_queue.put(failed or done)


class _Count:
    def get(self) -> None: ...
    def task_done(self) -> None: ...


def _set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """torch's Adam keeps `step` in each parameter's state; Megatron looks for it among the loaded tensors."""
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    for name, value in ({"param": main} | self.optimizer.state[main]).items():
        if name in tensors:
            value.copy_(tensors[name])
