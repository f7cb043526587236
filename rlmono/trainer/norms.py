"""RMSNorm without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's own wrapper of torch's norm refuses sequence parallel; its weight only has to be marked for the
    gradient sum over tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LatentNorm(RMSNorm):
    """With an epsilon of its own: Megatron passes that of all norms to those on latents too."""

    def __init__(self, config: Any, hidden_size: int, own_eps: float, **_: Any):
        super().__init__(config, hidden_size, own_eps)
