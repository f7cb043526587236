"""Block quantisation in one kernel: each weight is read once. For GPUs with e4m3 (Hopper, Ada); see fp8.py for what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlmono.weights.fp8 import FP8

BLOCK = 128


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> (e4m3 of that shape, fp32 [⌈rows / 128⌉, ⌈columns / 128⌉])."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    q = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    _quantise[grid](weight, q, scale, rows, columns, grid[1], BLOCK=BLOCK, num_warps=8)
    return q, scale


@triton.jit
def _quantise(x_ptr, q_ptr, scale_ptr, rows, columns, scale_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i, j = tl.program_id(0), tl.program_id(1)
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    at = r[:, None].to(tl.int64) * columns + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.div_rn(tl.maximum(top, 1e-10), 448.0)
    y = tl.div_rn(x, tl.broadcast_to(scale, (BLOCK, BLOCK)))
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    tl.store(q_ptr + at, y.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + i * scale_columns + j, scale)
