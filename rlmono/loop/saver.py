"""A device rank's part of every checkpoint: at once, or with --async-save behind the loop's back.

In the background a save is three things: the ranks agree on it and copy it to host memory (the loop waits for that alone);
a thread writes the copy and reports; the controller publishes what every rank has reported, and lets no rank come to its next
save before. What a kill leaves unpublished is swept away at the next start.
"""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rlmono.checkpoint import rng
from rlmono.checkpoint.store import CheckpointStore, fail
from rlmono.config.hf import changed_values
from rlmono.loop.world import RunPlan, World
from rlmono.memory.host import node_bytes
from rlmono.memory.plan import refuse_host_memory
from rlmono.world.channel import HostLink
from rlmono.world.messages import Failed

FAULTS = (OSError, RuntimeError, CheckpointException)
"""What a disk that can't be written ends in."""


class Saver:
    """Build it collectively over a pool."""

    def __init__(self, world: World, plan: RunPlan, link: HostLink, trainer: Any, engine: Any):
        self.world, self.plan, self.link, self.trainer, self.engine = world, plan, link, trainer, engine
        self.store = CheckpointStore(world.config, world.attempt) if world.config.save else None
        self._thread: Optional[threading.Thread] = None
        self._failed: Optional[BaseException] = None
        self._group: Optional[dist.ProcessGroup] = None
        self._copies: Any = None
        if world.config.async_save and trainer is not None:
            # Of its own: the trainer's groups are in use while the thread writes.
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=world.config.phase_timeout_s))
            self._refuse_host_memory()

    def _refuse_host_memory(self) -> None:
        """The copies of a checkpoint are as large as weights and optimizer, and stay for the whole run."""
        size, tensors = self.world.launch.local_world_size, self.trainer.tagged()
        needed = sum(t.nbytes for tag in ("params", "optimizer") for t in tensors[tag])
        ranks = sum(rank // size == self.world.rank // size for rank in self.world.grid.trainers)
        available = node_bytes(self.world.config.host_memory_gib)
        refuse_host_memory(needed, available, ranks, "--async-save", "copies of a checkpoint", "save at once (without --async-save)")

    def is_due(self, rollout_id: int) -> bool:
        return self.store is not None and self.store.due(rollout_id, self.plan.num_rollout)

    def save_if_due(self, rollout_id: int) -> None:
        """Write (or begin to) and report; the controller makes it visible when every rank has reported. Raises OSError that names the folder."""
        if self.store is None or not self.is_due(rollout_id):
            return
        self.wait()
        folder, behind = self.store.partial(rollout_id), self.world.config.async_save
        parts = self._stage(folder, behind)
        self._export(rollout_id)
        if behind:
            self.link.report("copied", rollout_id)
            self._thread = threading.Thread(target=self._write_behind, args=(parts, folder, rollout_id), name="saver", daemon=True)
            self._thread.start()
        else:
            self._write(parts, folder)
            self.link.report("saved", rollout_id)

    def wait(self) -> None:
        """Until what is being written is. Raises what it failed with, and TimeoutError."""
        if self._thread is not None:
            limit = self.world.config.phase_timeout_s
            self._thread.join(limit)
            if self._thread.is_alive():
                raise TimeoutError(f"rank {self.world.rank} waits for its last checkpoint to be written: not within {limit:g} s")
            self._thread = None
        if self._failed is not None:
            raise self._failed

    def _stage(self, folder: Path, behind: bool) -> list[Any]:
        """This rank's part, copied to host memory if it is written behind; its random states are small, and written."""
        parts: list[Any] = []
        try:
            if self.trainer is not None:
                from rlmono.checkpoint import torch_dist
                if behind and self._copies is None:
                    self._copies = torch_dist.HostCopies()
                parts = torch_dist.stage(self.trainer, folder, self._copies)
            rng.save(folder, self.world.rank, self.engine.rng if self.engine else None, self.trainer is not None)
        except FAULTS as e:
            fail(folder, e)
        return parts

    def _write(self, parts: list[Any], folder: Path) -> None:
        try:
            for part in parts:
                part.write(self._group)
        except FAULTS as e:
            fail(folder, e)

    def _write_behind(self, parts: list[Any], folder: Path, rollout_id: int) -> None:
        link = HostLink(self.world.host_address(), self.world.rank, "saver")        # sockets belong to a thread
        try:
            self._write(parts, folder)
            link.report("saved", rollout_id)
        except BaseException as e:
            self._failed = e
            link.send(Failed(f"{type(e).__name__}: {e}"))
        finally:
            link.close()

    def _export(self, rollout_id: int) -> None:
        """--save-hf: the weights as an HF folder, written by the first trainer."""
        template = self.world.config.save_hf
        if template is None or self.trainer is None:
            return
        from rlmono.weights.hf import save_hf
        named = ((name, tensor) for bucket in self.trainer.export() for name, tensor in bucket)
        if self.world.rank == self.world.grid.trainers[0]:
            folder = Path(template.format(rollout_id=rollout_id))
            source, config = str(self.world.config.hf_checkpoint), self.world.config
            save_hf(folder, named, Path(source), getattr(torch, self.world.dtype), changed_values(source, config.model))
        else:
            for _ in named:             # the export is collective
                pass
