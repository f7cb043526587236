"""An engine's own random state.

The sampler draws from torch's global generators, and the ranks of one engine must draw in step; after training they
don't, and then wrong tokens come back without an error. So an engine has a state of its own, swapped in for a phase.
"""

from __future__ import annotations

from typing import Any

import torch

State = tuple[torch.Tensor, torch.Tensor | None]


class EngineRng:
    """`with rng:` the generators hold the engine's state; outside, the trainer's. The same seed on all ranks of an engine."""

    def __init__(self, seed: int):
        outer = _get()
        torch.manual_seed(seed)
        self.state: State = _get()
        _set(outer)

    def __enter__(self) -> None:
        self._outer = _get()
        _set(self.state)

    def __exit__(self, *_: Any) -> None:
        self.state = _get()
        _set(self._outer)


def _get() -> State:
    return torch.get_rng_state(), (torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def _set(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
