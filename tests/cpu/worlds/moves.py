"""A checkpoint that is saved on one layout and loaded on another: the tensors of both, and how training goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TRAINING = dict(lr=1e-3, adam_eps=1e-8, weight_decay=0.1, lr_decay_style="linear", lr_warmup_iters=2)
LOSS = (1e-6, 1e-5)
"""Relative, of the two steps after the load; what the second adds is an update on other ranks."""


def save(name: str, where: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Two steps on this layout, a checkpoint, and the metrics of the two steps after it. Collective."""
    import layouts

    from rlmono.checkpoint import torch_dist
    trainer = layouts.build(name, where, dtype=dtype, **TRAINING)
    for _ in range(2):
        step(trainer)
    torch_dist.save(trainer, folder)
    after = [step(trainer) for _ in LOSS]
    if dist.get_rank() == 0:
        (folder / "after.json").write_text(json.dumps(after))
    dist.barrier()


def load(name: str, where: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> list[float]:
    """Load on this layout, save again: every tensor has the same bits; then train on. Returns by how much its losses are off. Collective."""
    import layouts

    from rlmono.checkpoint import torch_dist
    trainer = layouts.build(name, where, dtype=dtype, **TRAINING)
    with torch.no_grad():
        for chunk in trainer.chunks:
            for p in chunk.parameters():
                p.fill_(7.0)            # so that what the checkpoint does not fill shows
    trainer.weights_changed()
    torch_dist.load(trainer, folder, with_optimizer=True)
    again = folder.with_name(folder.name + " again")
    torch_dist.save(trainer, again)
    after = [step(trainer) for _ in LOSS]
    problem = [differences(folder, again) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(problem)
    if dist.get_rank() == 0:
        shutil.rmtree(again)
    assert not problem[0], problem[0]
    expected = json.loads((folder / "after.json").read_text())
    off = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(after, expected, strict=True)]
    limits = LOSS if dtype == torch.float32 else (2e-2, 2e-2)
    assert all(a <= b for a, b in zip(off, limits, strict=True)), f"the loss after the load is off by {off}"
    assert [a["lr"] for a in after] == [b["lr"] for b in expected], "the schedule goes on elsewhere"
    return off


def step(trainer: Any) -> dict[str, float]:
    """One step on all samples: its loss and learning rate, on every rank."""
    import layouts
    metrics = trainer.train(layouts.share_of(trainer, layouts.samples()))
    values = {"loss": metrics["train/loss"], "lr": metrics["train/lr"]} if trainer.reports else None
    return next(v for v in layouts.everywhere(values) if v is not None)     # type: ignore[no-any-return]


def differences(folder: Path, other: Path) -> str:
    """The first tensor of a checkpoint's model or optimizer that is not, bit by bit, in the other; empty when all are.

    A vocabulary is padded to the tensor-parallel ranks: what is beyond the shorter one is nobody's.
    """
    a, b = stored(folder), stored(other)
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())[:4]}"
    assert any(k.startswith("optimizer.") for k in a) and any(k.startswith("decoder.") for k in a), sorted(a)[:4]
    for name, x in a.items():
        y, n = b[name], min(len(x), len(b[name]))
        if x.dtype != y.dtype or x.shape[1:] != y.shape[1:] or not torch.equal(x[:n], y[:n]):
            return f"{name} has other bits"
        if len(x) != len(y) and not ("embedding" in name or "output_layer" in name):
            return f"{name} is {tuple(x.shape)} and {tuple(y.shape)}"
    return ""


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the trainer's part, whole, by torch's own reader."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    path = str(folder / "trainer")
    about = FileSystemReader(path).read_metadata().state_dict_metadata
    out = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in about.items() if isinstance(v, TensorStorageMetadata)}
    dcp.load(out, storage_reader=FileSystemReader(path), no_dist=True)
    return out
