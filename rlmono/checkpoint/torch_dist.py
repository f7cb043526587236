"""The trainers' part of a checkpoint: model, optimizer and schedule, as torch_dist; in PPO the critic's too, beside it.

    parts = stage(trainer, folder, detached=True)       collective over trainers; then everything is in host memory
    for part in parts: part.write(group)                in any thread, while the trainer goes on

Megatron's writer forks, keeps a manager process that outlives a killed rank, and ends in collectives over the default group,
which the trainer uses meanwhile; writing here and a group of its own stand for that. All else is Megatron's own format:
sharded over ranks, loadable on another layout.
"""

from __future__ import annotations

import functools
import inspect
import math
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import distrib_optimizer

from rlmono.checkpoint.store import CheckpointError
from rlmono.trainer.critic import HEAD, Critic
from rlmono.trainer.layout import held_tensors
from rlmono.trainer.learner import Learner
from rlmono.trainer.trainer import Trainer
from rlmono.weights.hf import is_finite

ACTOR, CRITIC = "trainer", "critic"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How the names of the model's tensors begin; the optimizer's begin otherwise."""


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part under `folder`. Collective over trainers; nothing is visible until the controller has published it."""
    for part in stage(trainer, folder):
        part.write()


def save_weights(chunks: list[Any], folder: Path) -> None:
    """Only weights, from bare chunks; collective as `save` is."""
    _stage(_chunks(chunks), folder / ACTOR).write()


def stage(trainer: Trainer, folder: Path, detached: bool = False) -> list[Staged]:
    """What `save` writes, ready to be written: agreed upon by all ranks, and copied from the device. Collective over trainers.

    `detached`: also from the weights of a CPU, so that the trainer may go on before it is written.
    """
    learners = {ACTOR: trainer} if trainer.critic is None else {ACTOR: trainer, CRITIC: trainer.critic}
    return [_stage(_state(learner, loading=False), folder / name, _storages(learner) if detached else frozenset())
            for name, learner in learners.items()]


def _storages(learner: Learner) -> frozenset[int]:
    """Addresses of what training changes in place. The optimizer's part is a copy as it comes from Megatron."""
    return frozenset(t.untyped_storage().data_ptr() for c in learner.chunks for t in (*c.parameters(), *c.buffers()))


class Staged:
    """A folder's tensors in host memory (`buckets`, as Megatron's `writer` deals them), and the plan of the whole (`metadata`, on the first rank)."""

    def __init__(self, folder: Path, writer: Any, metadata: Any, buckets: list[Any]):
        self.folder, self.writer, self.metadata, self.buckets = folder, writer, metadata, buckets

    def write(self, group: Optional[dist.ProcessGroup] = None) -> None:
        """Write this rank's files; the first rank then writes what says where everything is. Collective over `group`, all trainers; default: theirs.

        Raises on every rank when it fails on any, OSError or RuntimeError.
        """
        results: list[Any] = []
        failed: Optional[Exception] = None
        try:
            for number, bucket in enumerate(self.buckets):
                results += self._write(number, bucket)
        except Exception as e:          # told to the others first
            failed = e
        self.buckets = []               # the memory
        first = dist.get_rank(group) == 0
        everyone: Optional[list[Any]] = [None] * dist.get_world_size(group) if first else None
        dist.gather_object((results, f"{type(failed).__name__}: {failed}" if failed else ""), everyone, dst=0, group=group)
        told = [""]
        if everyone is not None:
            told = [next((f"trainer {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error), "")]
            try:
                if not told[0]:
                    self.writer.finish(self.metadata, [part for part, _ in everyone])
                    save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            except Exception as e:
                failed, told = e, [f"trainer 0: {type(e).__name__}: {e}"]
        dist.broadcast_object_list(told, src=0, group=group)
        if failed is not None:
            raise failed
        if told[0]:
            raise RuntimeError(f"{self.folder}: not written, because of {told[0]}")

    def _write(self, number: int, bucket: Any) -> list[Any]:
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        results = _Queue()
        write = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)      # its wrapper stops garbage collection, in the whole process
        write(transforms, number, bucket, results, _Queue([None]), use_fsync=True)
        (_, written), = results
        if isinstance(written, Exception):
            raise written
        return list(written)


class _Queue(list[Any]):
    """Between Megatron's writer and who has started it, which are one thread here."""

    put, get = list.append, list.pop

    def task_done(self) -> None: ...


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to where it would write."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def _stage(state: dict[str, Any], folder: Path, live: frozenset[int] = frozenset()) -> Staged:
    _install()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    plan = _Plan("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(folder), plan, async_sharded_save=True, content_metadata=_METADATA)
    copied = FileSystemWriterAsync.preload_tensors(plan.writer.write_buckets or [])
    buckets = [(file, key, (texts, [(item, _apart(t, live)) for item, t in tensors])) for file, key, (texts, tensors) in copied]
    plan.writer.write_buckets = None
    return Staged(folder, plan.writer, plan.metadata, buckets)


def _apart(tensor: torch.Tensor, live: frozenset[int]) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


def load(learner: Learner, folder: Path, with_optimizer: bool, part: str = ACTOR) -> None:
    """Read what `save` wrote, on any layout. Collective over trainers. Raises CheckpointError for a tensor that is missing, extra, of another shape,
    or not finite."""
    state = _state(learner, loading=True)
    if not with_optimizer:
        state = {_key(i): state[_key(i)] for i in range(len(learner.chunks))}
    _compare(state, folder / part)
    loaded = dist_checkpointing.load(state, str(folder / part))
    for i, chunk in enumerate(learner.chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    _require_finite(held_tensors(learner.chunks), folder / part)
    if not with_optimizer:
        learner.weights_changed()
        return
    for i, optimizer in enumerate(learner.optimizers):
        optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"][i])
        for adam in optimizer.optimizer.state.values():
            adam["step"] = torch.full_like(adam["step"], loaded["adam_steps"])      # each its own: a shared one would run away
    _require_finite(_adam(learner), folder / part)
    learner.schedule.load_state_dict(loaded["schedule"])
    learner.skipped_steps = loaded["skipped_steps"]


def _adam(learner: Learner) -> dict[str, torch.Tensor]:
    """This rank's parts of the optimizer's tensors, by the names that they have in a checkpoint."""
    names = {parameter: name for name, parameter in held_tensors(learner.chunks).items()}
    out = {}
    for single in learner.optimizers:
        for parameter, (group, place) in single.model_param_group_index_map.items():
            main = single.optimizer.param_groups[group]["params"][place]
            state = single.optimizer.state[main]
            tensors = {"fp32_param": state.get("master_param", main), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            out.update({f"optimizer.state.{key}.{names[parameter]}": tensor for key, tensor in tensors.items()})
    return out


def _require_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise CheckpointError(f"{folder}: tensor {bad[0]!r} holds values that are not finite"
                              + (f", and so do {len(bad) - 1} others" if len(bad) > 1 else ""))


def load_critic(critic: Critic, folder: Path, with_optimizer: bool) -> None:
    """The critic of a checkpoint; where it has none, the actor's weights in the critic's body. Collective."""
    if (folder / CRITIC).is_dir():
        load(critic, folder, with_optimizer, CRITIC)
        return
    body = {key: {name: x for name, x in state.items() if name != HEAD} for key, state in _chunks(critic.chunks).items()}
    loaded = dist_checkpointing.load(body, str(folder / ACTOR))
    for i, chunk in enumerate(critic.chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    _require_finite(held_tensors(critic.chunks), folder / ACTOR)
    critic.weights_changed()


def load_weights(chunks: list[Any], folder: Path) -> None:
    """Only weights, into bare chunks (the reference). Collective. Raises CheckpointError as `load` does."""
    state = _chunks(chunks)
    _compare(state, folder / ACTOR)
    loaded = dist_checkpointing.load(state, str(folder / ACTOR))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    _require_finite(held_tensors(chunks), folder / ACTOR)


def weights_dtype(folder: Path) -> torch.dtype:
    """What the weights in a checkpoint are stored as."""
    tensors = dist_checkpointing.load_tensors_metadata(str(folder / ACTOR))
    return next(t.dtype for name, t in tensors.items() if name.endswith("final_layernorm.weight"))   # type: ignore[no-any-return]


def weights_count(folder: Path) -> int:
    """How many numbers the weights in a checkpoint are."""
    tensors = dist_checkpointing.load_tensors_metadata(str(folder / ACTOR))
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
    _install()
    models = _chunks(learner.chunks)
    optimizer = {i: o.sharded_param_state_fully_reshardable(models, loading, _metadata()) for i, o in enumerate(learner.optimizers)}
    steps = next((int(s["step"]) for o in learner.optimizers for s in o.optimizer.state.values()), 0)
    return {**models, "optimizer": optimizer, "adam_steps": steps, "schedule": learner.schedule.state_dict(), "skipped_steps": learner.skipped_steps}


@functools.cache
def _install() -> None:
    """The overrides, each with its reason; once."""
    filesystem_async._get_write_results_queue = lambda *_: None         # else a manager process, an orphan after a kill
    optimizer = distrib_optimizer.DistributedOptimizer
    optimizer._set_main_param_and_optimizer_states = _set_states
    optimizer.get_parameter_state_dp_zero = _with_padding(optimizer.get_parameter_state_dp_zero)


def _with_padding(original: Any) -> Any:
    """Megatron joins a buffer's buckets without the padding between them, and then looks for each parameter where it is with the padding: of a
    buffer with several buckets (a tied embedding has one of its own on the last stage) it would save other numbers."""
    @functools.wraps(original)
    def get(self: Any, *args: Any, **options: Any) -> Any:
        state = original(self, *args, **options)
        for i, buffer in enumerate(self.buffers if state else ()):
            for tensors in state[i].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    if key in tensors:
                        tensors[key] = _padded(tensors[key], buffer.buckets)
        return state
    return get


def _padded(flat: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """[sum of the buckets' own numbers] -> [up to the end of the last], each bucket at its offset in the buffer."""
    if all(bucket.offset == sum(b.numel_unpadded for b in buckets[:i]) for i, bucket in enumerate(buckets)):
        return flat
    out = flat.new_zeros(buckets[-1].offset + buckets[-1].numel_unpadded)
    for bucket, part in zip(buckets, flat.split([b.numel_unpadded for b in buckets]), strict=True):
        out[bucket.offset:bucket.offset + bucket.numel_unpadded] = part
    return out


def _set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """torch's Adam keeps `step` in each parameter's state; Megatron looks for it among the loaded tensors. In host memory the state has the
    fp32 weight too."""
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    state = self.optimizer.state[main]
    for name, value in ({"param": state.get("master_param", main)} | state).items():
        if name in tensors:
            value.copy_(tensors[name])
