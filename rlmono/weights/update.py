"""Trainer to engine: colocated in the same process, or broadcast across pools. No file, no IPC.

    Colocated(trainer, engine).update(version)      each rank's engine takes its own cut: at first of full tensors, then directly (direct.py)
    Sender(trainer, …).update(version)              disaggregated, trainers: the first one broadcasts buckets
    Receiver(engine, …).update(version)             disaggregated, engines
"""

from __future__ import annotations

import json
import math
import time
from typing import Any, Iterator, Mapping, Optional, Protocol, Sequence

import torch
import torch.distributed as dist

from rlmono.weights import fp8
from rlmono.weights.direct import Direct, Pair, Places, Sources, plan
from rlmono.weights.export import Named
from rlmono.world.groups import broadcast, cross_pool_group
from rlmono.world.store import store_get


class Exporter(Protocol):
    """What an update asks of the trainer."""

    def export(self) -> Iterator[Named]: ...
    def sources(self) -> Optional[Sources]: ...


class Quantised:
    """A trainer whose export is in fp8, quantised on the way, as engines with block-quantised weights take it. `quantization_config` is of
    the engines' config.json."""

    def __init__(self, trainer: Exporter, quantization_config: Mapping[str, Any]):
        self._trainer, self._block = trainer, fp8.block_of(dict(quantization_config))
        self._left_out = quantization_config.get("modules_to_not_convert") or ()

    def export(self) -> Iterator[Named]:
        """Buckets as of the trainer; each projection with its scales."""
        for bucket in self._trainer.export():
            yield fp8.exported(bucket, self._left_out, self._block)

    def sources(self) -> None:
        """What engines take is nowhere before it is quantised."""


def as_engines_take_it(trainer: Exporter, shape: Mapping[str, Any]) -> Exporter:
    """The trainer, or what quantises its export where the engines' folder says so."""
    config = shape.get("quantization_config")
    return Quantised(trainer, config) if config else trainer


class Loader(Protocol):
    """What an update asks of the engine."""

    def load_weights(self, named_tensors: Named) -> None: ...
    def places(self) -> Optional[Places]: ...
    def fill(self, pairs: Sequence[Pair]) -> None: ...
    def finish_update(self, version: int) -> None: ...
    def compare_weights(self, buckets: Iterator[Named]) -> list[str]: ...


class Colocated:
    """Trainer and engine in one process. The first update goes through HF tensors; from what the engine did with them the others are planned."""

    def __init__(self, trainer: Exporter, engine: Loader, check: bool):
        self.trainer, self.engine, self.check = trainer, engine, check
        self.direct: Optional[Direct] = None
        self._planned = False

    def update(self, version: int) -> float:
        """Collective over all device ranks; afterwards the engine samples with, and marks, `version`. Returns the seconds that it took."""
        started = time.perf_counter()
        if self.direct is None:
            for bucket in self.trainer.export():
                self.engine.load_weights(bucket)
        else:
            if not self.direct.holds:
                raise RuntimeError("a parameter of the trainer has been replaced since the first update: its copies would come from the old one")
            self.direct.update(self.engine.fill)
        self.engine.finish_update(version)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()       # else the copies would be somebody else's time; a swap may go on beside
        took = time.perf_counter() - started
        if self.check:
            _refuse(self.engine.compare_weights(self.trainer.export()), version)
        if not self._planned:
            self.direct, self._planned = plan(self.trainer.sources(), self.engine.places()), True
        return took


class Sender:
    """The trainers' side. `members` are global ranks: the first trainer, then every engine rank."""

    def __init__(self, trainer: Exporter, store: dist.Store, members: Sequence[int], rank: int, device: str, timeout_s: float, check: bool):
        self.trainer, self.check = trainer, check
        self.group: Optional[dist.ProcessGroup] = None
        plan = [[(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in _aligned(bucket)] for bucket in trainer.export()]
        if rank == members[0]:
            store.set("weights/plan", json.dumps(plan))
            self.group = cross_pool_group(store, "weights", members, rank, device, timeout_s)

    def update(self, version: int) -> None:
        """Collective over trainers; the first of them sends. The next bucket is gathered while the last one travels."""
        for _ in range(2 if self.check else 1):
            pending: Optional[tuple[dist.Work, torch.Tensor]] = None
            for bucket in self.trainer.export():
                if self.group is None:
                    continue
                flat = torch.cat([_bytes(t) for _, t in _aligned(bucket)])
                if pending is not None:
                    pending[0].wait()
                pending = (broadcast(flat, self.group, 0), flat)
            if pending is not None:
                pending[0].wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()    # NCCL's wait is the device's: a rank that ended before would leave its receivers waiting


class Receiver:
    """The engines' side."""

    def __init__(self, engine: Loader, store: dist.Store, members: Sequence[int], rank: int, device: str, timeout_s: float, check: bool):
        self.engine, self.check = engine, check
        self.plan: list[list[tuple[str, list[int], str]]] = json.loads(store_get(store, "weights/plan", timeout_s, "the first trainer"))
        self.group = cross_pool_group(store, "weights", members, rank, device, timeout_s)
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")

    def update(self, version: int) -> float:
        """Collective over engines and the first trainer; returns the seconds from the first bucket on."""
        started = None
        for bucket in self._buckets():
            started = started or time.perf_counter()
            self.engine.load_weights(bucket)
        self.engine.finish_update(version)
        took = time.perf_counter() - (started or time.perf_counter())
        if self.check:
            _refuse(self.engine.compare_weights(self._buckets()), version)
        return took

    def _buckets(self) -> Iterator[Named]:
        """The buckets as they come; two broadcasts are under way, so that one travels while the other is loaded."""
        started: list[tuple[Any, torch.Tensor]] = []
        for i, shapes in enumerate(self.plan):
            while len(started) < min(i + 2, len(self.plan)):
                started.append(self._start(self.plan[len(started)]))
            work, flat = started[i]
            work.wait()
            parts = flat.split([_nbytes(shape, dtype) for _, shape, dtype in shapes])
            yield [(name, part.view(getattr(torch, dtype)).view(shape)) for (name, shape, dtype), part in zip(shapes, parts, strict=True)]
            started[i] = (None, flat[:0])       # let go of the bucket

    def _start(self, shapes: list[tuple[str, list[int], str]]) -> tuple[dist.Work, torch.Tensor]:
        flat = torch.empty(sum(_nbytes(shape, dtype) for _, shape, dtype in shapes), dtype=torch.uint8, device=self.device)
        return broadcast(flat, self.group, 0), flat


def _aligned(bucket: Named) -> Named:
    """Wide types first, so that each tensor begins at a multiple of its own width."""
    return sorted(bucket, key=lambda item: -item[1].dtype.itemsize)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize    # type: ignore[no-any-return]


def _refuse(differing: list[str], version: int) -> None:
    if differing:
        raise RuntimeError(f"--check-weight-update-equal: after update {version} {len(differing)} engine weight(s) differ from the trainer's export: "
                           f"{', '.join(differing[:8])}")
