"""Random states of a rank in a checkpoint: torch's, python's, numpy's, Megatron's and the engine's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from rlmono.engine.rng import EngineRng


def save(folder: Path, rank: int, engine: Optional[EngineRng], trains: bool) -> None:
    """Write this rank's states under `folder`."""
    (folder / "rng").mkdir(parents=True, exist_ok=True)
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
              "python": random.getstate(), "numpy": np.random.get_state(), "engine": engine.state if engine is not None else None,
              "megatron": _megatron().get_states() if trains else None}
    torch.save(states, _path(folder, rank))


def load(folder: Path, rank: int, engine: Optional[EngineRng], trains: bool) -> bool:
    """Restore them; False where the checkpoint has none for this rank (it was written by another number of ranks)."""
    path = _path(folder, rank)
    if not path.exists():
        return False
    states: dict[str, Any] = torch.load(path, weights_only=False)       # its hash was checked
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if engine is not None and states["engine"] is not None:
        engine.state = states["engine"]
    if trains and states["megatron"] is not None:
        _megatron().set_states(states["megatron"])
    return True


def _path(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank:05d}.pt"


def _megatron() -> Any:
    from megatron.core import tensor_parallel
    return tensor_parallel.get_cuda_rng_tracker()
