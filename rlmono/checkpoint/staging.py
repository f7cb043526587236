"""A checkpoint's tensors on their way to the disk: planned by all ranks, copied to host memory if the loop is not to wait, written.

Megatron's writer forks, keeps a manager process that outlives a killed rank, and ends in collectives over the default group,
which the trainer uses meanwhile; writing here and a group of its own stand for that. The files are Megatron's.
"""

from __future__ import annotations

import ctypes
import inspect
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import WriteItemType

from rlmono.memory.host import HostMemory, aligned


class HostCopies:
    """Host memory for the tensors of a save. It is kept for the next one: its pages are made (and for a GPU pinned) once."""

    def __init__(self) -> None:
        self._memory: Optional[HostMemory] = None

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, each with a storage of its own. They last until the next call."""
        needed = sum(aligned(t.nbytes) for t in tensors)
        if self._memory is None or self._memory.nbytes < needed:
            self._memory = HostMemory(needed, pin=torch.cuda.is_available())
        self._memory.rewind()
        copies = [self._copy(t.detach(), self._memory) for t in tensors]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy(self, tensor: torch.Tensor, memory: HostMemory) -> torch.Tensor:
        if not tensor.nbytes:
            return tensor.cpu()
        place, source = memory.take(tensor.nbytes), tensor.contiguous().view(-1).view(torch.uint8)
        for a, b in memory.pieces(place):
            place[a:b].copy_(source[a:b], non_blocking=True)
        # torch.save writes a whole storage, and a view's is all of the memory.
        return torch.frombuffer((ctypes.c_char * tensor.nbytes).from_address(place.data_ptr()), dtype=tensor.dtype).view(tensor.shape)


class Staged:
    """A folder's part of this rank: its file's name, texts and tensors, which are where they were unless `copied`."""

    def __init__(self, folder: Path, writer: _Writer, metadata: Any):
        self.folder, self.path, self.metadata = folder, folder / writer.file, metadata
        self.texts, self.tensors = writer.texts, writer.tensors
        self._writer = writer
        self._host: Optional[HostCopies] = None         # while the tensors are there

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for _, t in self.tensors)

    def write(self, group: Optional[dist.ProcessGroup] = None) -> None:
        """Write this rank's file; the first rank then writes what says where everything is. Collective over `group`, all trainers; default: theirs.

        Raises on every rank when it fails on any, OSError or RuntimeError.
        """
        results: list[Any] = []
        failed: Optional[Exception] = None
        try:
            results = self._write()
        except Exception as e:          # told to the others first
            failed = e
        self.texts, self.tensors = [], []               # the memory
        first = dist.get_rank(group) == 0
        everyone: Optional[list[Any]] = [None] * dist.get_world_size(group) if first else None
        dist.gather_object((results, f"{type(failed).__name__}: {failed}" if failed else ""), everyone, dst=0, group=group)
        told = [""]
        if everyone is not None:
            told = [next((f"trainer {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error), "")]
            try:
                if not told[0]:
                    self._writer.finish(self.metadata, [part for part, _ in everyone])
                    save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            except Exception as e:
                failed, told = e, [f"trainer 0: {type(e).__name__}: {e}"]
        dist.broadcast_object_list(told, src=0, group=group)
        if failed is not None:
            raise failed
        if told[0]:
            raise RuntimeError(f"{self.folder}: not written, because of {told[0]}")

    def _write(self) -> list[Any]:
        if not self.texts and not self.tensors:
            return []
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        results = _Queue()
        write = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)      # its wrapper stops garbage collection, in the whole process
        write(transforms, 0, (self.path, self.path.name, (self.texts, _alone(self.tensors))), results, _Queue([None]), use_fsync=True)
        (_, written), = results
        if isinstance(written, Exception):
            raise written
        return list(written)


def plan(state: dict[str, Any], folder: Path, about: dict[str, Any]) -> Staged:
    """Agree with all ranks on who writes what of a sharded state; `about` is for Megatron's loader. Collective over trainers."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    strategy = _Plan("torch_dist", 1)
    dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, content_metadata=about)
    return Staged(folder, strategy.writer, strategy.metadata)


def copy(parts: Sequence[Staged], host: HostCopies) -> None:
    """From now on the trainer may go on before the parts are written."""
    copies = iter(host.take([t for part in parts for _, t in part.tensors]))
    for part in parts:
        part.tensors = [(item, next(copies)) for item, _ in part.tensors]
        part._host = host


class _Queue(list[Any]):
    """Between Megatron's writer and who has started it, which are one thread here."""

    put, get = list.append, list.pop

    def task_done(self) -> None: ...


class _Writer(FileSystemWriterAsync):
    """Megatron's, up to where it would copy."""

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        self.file = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        found = [(item, planner.resolve_data(item)) for item in plan.items]
        self.texts = [x for x in found if x[0].type == WriteItemType.BYTE_IO]
        self.tensors = [x for x in found if x[0].type != WriteItemType.BYTE_IO]


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to where it would write, with the writer above."""

    def async_save(self, state: Any, folder: Path) -> AsyncRequest:
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
        self.writer = _Writer(folder, thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (_, self.metadata, _), *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(named, False), self.writer, None, 0, planner=planner)
        return AsyncRequest(None, (), [])


def _alone(tensors: Sequence[tuple[Any, torch.Tensor]]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each in host memory when its turn comes, in a storage of its own: torch.save writes whole storages."""
    for item, tensor in tensors:
        there = tensor.detach().cpu()
        yield item, there if there.untyped_storage().nbytes() == there.nbytes else there.clone()
