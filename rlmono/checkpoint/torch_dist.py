"""The trainers' part of a checkpoint: model, optimizer and schedule, as torch_dist; in PPO the critic's too, beside it.

    parts = stage(trainer, folder, HostCopies())        collective over trainers; then everything is in host memory
    for part in parts: part.write(group)                in any thread, while the trainer goes on

What is written is Megatron's own format: sharded over ranks, loadable on another layout.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from rlmono.checkpoint import adam
from rlmono.checkpoint.staging import HostCopies, Staged, copy, plan
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
    plan(_chunks(chunks), folder / ACTOR, _METADATA).write()


def stage(trainer: Trainer, folder: Path, host: Optional[HostCopies] = None) -> list[Staged]:
    """What `save` writes, ready to be written: agreed upon by all ranks. Collective over trainers.

    With `host` it is copied there, and the trainer may go on before it is written; the copies last until the next call.
    """
    learners = {ACTOR: trainer} if trainer.critic is None else {ACTOR: trainer, CRITIC: trainer.critic}
    parts = [plan(_state(learner, adam.to_save), folder / name, _METADATA) for name, learner in learners.items()]
    if host is not None:
        copy(parts, host)
    return parts


def load(learner: Learner, folder: Path, with_optimizer: bool, part: str = ACTOR) -> None:
    """Read what `save` wrote, on any layout. Collective over trainers. Raises CheckpointError for a tensor that is missing, extra, of another shape,
    or not finite."""
    state = _state(learner, adam.to_load)
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
        adam.restore(optimizer, loaded.get("optimizer", {}).get(i, {}), loaded["adam_steps"])
    _require_finite(adam_tensors(learner), folder / part)
    learner.schedule.load_state_dict(loaded["schedule"])
    learner.skipped_steps = loaded["skipped_steps"]


def adam_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """This rank's parts of the optimizer's tensors, by the names that they have in a checkpoint."""
    names = {parameter: name for name, parameter in held_tensors(learner.chunks).items()}
    return {f"optimizer.state.{key}.{names[parameter]}": tensor for single in learner.optimizers for parameter in single.model_param_group_index_map
            for key, tensor in adam.live(single, parameter).items()}


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


def _state(learner: Learner, sharded: Callable[[Any, Mapping[str, Any]], adam.Sharded]) -> dict[str, Any]:
    """What is saved, or is to be loaded. Optimizer states are named by their parameter in the whole model, and not by the optimizer that has
    them here: Megatron keeps experts in one of their own, but only under expert parallelism."""
    models = _chunks(learner.chunks)
    states = {i: x for i, single in enumerate(learner.optimizers) if (x := sharded(single, models))}
    steps = next((int(s["step"]) for o in learner.optimizers for s in o.optimizer.state.values()), 0)
    common = {"adam_steps": steps, "schedule": learner.schedule.state_dict(), "skipped_steps": learner.skipped_steps}
    return {**models, **common, **({"optimizer": states} if states else {})}       # nothing may be left of it where all is sharded
