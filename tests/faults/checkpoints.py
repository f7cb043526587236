"""Checkpoints and hashes read without rlmono: with torch and json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def load_all(checkpoint: Path) -> dict[str, Any]:
    """Everything that the trainers wrote, flat: each model and optimizer tensor, the steps and the schedule."""
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(checkpoint / "trainer"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    common = torch.load(checkpoint / "trainer" / "common.pt", weights_only=False)
    return dict([*_flat("", state), *_flat("common", common)])


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for k, v in value.items() for item in _flat(f"{name}.{k}", v)]
    if isinstance(value, (list, tuple)):
        return [item for i, v in enumerate(value) for item in _flat(f"{name}.{i}", v)]
    return [(name, value)]


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same, to the bit."""
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not _same(a[k], b[k]))


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bits(x), _bits(y))
    return type(x) is type(y) and (x == y or repr(x) == repr(y))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def lineage(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What each rollout sampled, and the data cursor after it; of a rollout that was done twice, the last."""
    return {row["rollout_id"]: row for row in map(json.loads, (run_dir / "hashes.jsonl").read_text().splitlines())}
