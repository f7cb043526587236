"""Matrix products whose rows don't depend on how many rows there are (CPU, `--deterministic`).

A BLAS takes another kernel for few rows than for many, and the last bits of a row change with it. What shares a batch
with a request depends on timing, so in a deterministic run every product is made of blocks of one fixed number of rows.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROWS = 32


class BatchInvariant(TorchFunctionMode):
    """`with BatchInvariant():` every F.linear, and every torch.matmul of two matrices, goes through blocks of ROWS rows."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _blocks(lambda x: func(x, *args[1:], **kwargs), args[0])
        if func in (torch.matmul, torch.Tensor.matmul, torch.mm) and args[0].dim() == 2 and args[1].dim() == 2 and not kwargs:
            return _blocks(lambda x: func(x, args[1]), args[0])
        return func(*args, **kwargs)


def _blocks(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    padded = F.pad(rows, (0, 0, 0, -n % ROWS))
    out = torch.cat([product(block) for block in padded.split(ROWS)])[:n]
    return out.reshape(*x.shape[:-1], out.shape[-1])
