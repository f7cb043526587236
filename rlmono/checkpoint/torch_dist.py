"""The trainers' part of a checkpoint: model, optimizer and schedule, as torch_dist.

Megatron's writer forks, and keeps a manager process that outlives a killed rank; both are replaced by writing in this
process. All else is Megatron's own format: sharded over ranks, loadable on another layout.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import distrib_optimizer

from rlmono.trainer.trainer import Trainer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part under `folder`. Collective over trainers; nothing is visible until the controller has published it."""
    _install()
    if dist.get_rank() == 0:
        (folder / "trainer").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(trainer, loading=False), str(folder / "trainer"), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                            content_metadata=_METADATA)


def load(trainer: Trainer, folder: Path, with_optimizer: bool) -> None:
    """Read what `save` wrote, on any layout. Collective over trainers."""
    _install()
    state = _state(trainer, loading=True)
    if not with_optimizer:
        state = {_key(i): state[_key(i)] for i in range(len(trainer.chunks))}
    loaded = dist_checkpointing.load(state, str(folder / "trainer"))
    for i, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(loaded[_key(i)], strict=False)
    if not with_optimizer:
        trainer.weights_changed()
        return
    for i, optimizer in enumerate(trainer.optimizers):
        optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"][i])
        for adam in optimizer.optimizer.state.values():
            adam["step"] = torch.tensor(float(loaded["adam_steps"]))        # each its own: a shared one would run away
    trainer.schedule.load_state_dict(loaded["schedule"])
    trainer.skipped_steps = loaded["skipped_steps"]


def load_weights(chunks: list[Any], folder: Path) -> None:
    """Only weights, into bare chunks (the reference)."""
    state = dist_checkpointing.load(_chunks(chunks), str(folder / "trainer"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[_key(i)], strict=False)


def _key(chunk: int) -> str:
    """Each virtual pipeline stage has a name of its own in the state; tensors are named over the whole model."""
    return "model" if chunk == 0 else f"model{chunk}"


def _chunks(chunks: list[Any]) -> dict[str, Any]:
    return {_key(i): c.sharded_state_dict(metadata=_metadata()) for i, c in enumerate(chunks)}


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _state(trainer: Trainer, loading: bool) -> dict[str, Any]:
    """What is saved. Optimizer states are named by their parameter in the whole model, and not by the optimizer that has
    them here: Megatron keeps experts in one of their own, but only under expert parallelism."""
    models = _chunks(trainer.chunks)
    optimizer = {i: o.sharded_param_state_fully_reshardable(models, loading, _metadata()) for i, o in enumerate(trainer.optimizers)}
    steps = next((int(s["step"]) for o in trainer.optimizers for s in o.optimizer.state.values()), 0)
    return {**models, "optimizer": optimizer, "adam_steps": steps, "schedule": trainer.schedule.state_dict(), "skipped_steps": trainer.skipped_steps}


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
