"""8-bit floats (e4m3) with scales: what is quantised, how, and back. Pure functions on torch tensors of any device.

    q, scale = quantise_block(weight)       one fp32 scale a block of 128 x 128, stored as `<name>_scale_inv`
    q, scale = quantise_channel(weight)     one a row, stored as `<name>_scale`
    q, scale = quantise_tensor(weight)      one in all, stored as `<name>_scale`

    scale = max(absmax, 1e-10) / 448        q = clamp(weight / scale, ±448), rounded to nearest even

448 is e4m3's largest number. It has three bits after the point, and steps of 2^-9 below 2^-6, so that
|q · scale - weight| <= max(|weight| · 2^-4, scale · 2^-10).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable, Iterable, Optional, Sequence

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

FP8, LARGEST, SMALLEST_ABSMAX = torch.float8_e4m3fn, 448.0, 1e-10
BLOCK = (128, 128)
STRATEGIES = ("block", "channel", "tensor")
SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What the name of a scale has more than the name of its weight: of blocks, and of rows or the whole tensor."""

QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention, of multi-head latent attention and of MLPs, dense, shared or an expert's, by the last word of their names.
All else stays as it is: embeddings, lm_head, norms, routers and their bias."""

Quantised = tuple[torch.Tensor, torch.Tensor]


def is_quantised(name: str, left_out: Sequence[str] = ()) -> bool:
    """Is the weight of this name quantised? `left_out` is the config's modules_to_not_convert: modules, or consecutive words of their names."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] not in QUANTISED:
        return False
    return not any(f".{words}." in f".{module}." for words in left_out)


def quantise(weight: torch.Tensor, strategy: str, block: Sequence[int] = BLOCK) -> Quantised:
    """[rows, columns] -> (e4m3 of that shape, fp32 scales of the strategy's shape)."""
    if strategy == "block":
        return quantise_block(weight, block)
    return quantise_channel(weight) if strategy == "channel" else quantise_tensor(weight)


def quantise_block(weight: torch.Tensor, block: Sequence[int] = BLOCK) -> Quantised:
    """[rows, columns] -> (e4m3 of that shape, fp32 [⌈rows / b0⌉, ⌈columns / b1⌉]); blocks at the edges may be smaller."""
    if weight.is_cuda and tuple(block) == BLOCK and (kernel := _kernel()) is not None:
        return kernel(weight)       # type: ignore[no-any-return]
    return quantise_block_plainly(weight, block)


def quantise_block_plainly(weight: torch.Tensor, block: Sequence[int] = BLOCK) -> Quantised:
    """As `quantise_block`, step by step: what the fused kernel is held against."""
    blocks = _blocks(weight.float(), block)
    scale = _scale(blocks.abs().amax((1, 3)))
    return _joined(_divided(blocks, scale[:, None, :, None]), weight.shape), scale


@functools.cache
def _kernel() -> Optional[Callable[[torch.Tensor], Quantised]]:
    """The fused kernel, if there is triton and it gives the same bits here."""
    try:
        from rlmono.weights.fp8_kernel import quantise
        x = torch.randn(200, 300, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(torch.bfloat16)
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(quantise(x), quantise_block_plainly(x), strict=True))
    except Exception as e:
        log.warning("fp8 weights are quantised without the fused kernel: %s: %s", type(e).__name__, e)
        return None
    if not same:
        log.warning("fp8 weights are quantised without the fused kernel: it differs from torch here")
    return quantise if same else None


def exported(named: Iterable[tuple[str, torch.Tensor]], left_out: Sequence[str], block: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
    """HF tensors as a block-quantised folder has them: the projections in e4m3, each with its scales."""
    out: list[tuple[str, torch.Tensor]] = []
    for name, tensor in named:
        if not is_quantised(name, left_out):
            out.append((name, tensor))
            continue
        q, scale = quantise_block(tensor, block)
        out += [(name, q), (name + SCALE_SUFFIXES[0], scale)]
    return out


def quantise_channel(weight: torch.Tensor) -> Quantised:
    """[rows, columns] -> (e4m3 of that shape, fp32 [rows, 1])."""
    x = weight.float()
    scale = _scale(x.abs().amax(1, keepdim=True))
    return _divided(x, scale), scale


def quantise_tensor(weight: torch.Tensor) -> Quantised:
    """[rows, columns] -> (e4m3 of that shape, fp32 [1])."""
    x = weight.float()
    scale = _scale(x.abs().amax().reshape(1))
    return _divided(x, scale), scale


def dequantise(q: torch.Tensor, scale: torch.Tensor, block: Sequence[int] = BLOCK, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The numbers that an e4m3 tensor and its scales stand for; the scales' shape says which kind they are. Raises ValueError when it fits none."""
    if scale.numel() == 1 or scale.shape == (q.shape[0], 1):
        return (q.float() * scale.float().reshape(-1, 1)).to(dtype)
    return dequantise_block(q, scale, block, dtype)


def dequantise_block(q: torch.Tensor, scale: torch.Tensor, block: Sequence[int] = BLOCK, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Inverse of `quantise_block`, up to rounding. Raises ValueError when there is not one scale a block."""
    blocks = _blocks(q.float(), block)
    if scale.shape != (blocks.shape[0], blocks.shape[2]):
        raise ValueError(f"scales of shape {list(scale.shape)} for a tensor of {list(q.shape)} in blocks of {list(block)}")
    return _joined((blocks * scale.float()[:, None, :, None]).to(dtype), q.shape)


def quantization_config(strategy: str, block: Sequence[int], left_out: Sequence[str]) -> dict[str, Any]:
    """config.json's `quantization_config`: for blocks in DeepSeek's format, else in compressed-tensors'; activations get scales as they come."""
    if strategy == "block":
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
                "modules_to_not_convert": list(left_out)}
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**number, "strategy": strategy, "dynamic": False},
             "input_activations": {**number, "strategy": "token", "dynamic": True}, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(left_out), "kv_cache_scheme": None}


def block_of(config: Optional[dict[str, Any]]) -> Sequence[int]:
    """The block size that a `quantization_config` names."""
    return tuple((config or {}).get("weight_block_size") or BLOCK)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    largest = largest.clamp(min=SMALLEST_ABSMAX)
    return largest / torch.full_like(largest, LARGEST)      # by a plain number, GPUs multiply by its inverse: other bits


def _divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp_(-LARGEST, LARGEST).to(FP8)


def _blocks(x: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """[rows, columns] -> [row of blocks, row in it, column of blocks, column in it], padded with zeros."""
    (b0, b1), (rows, columns) = block, x.shape
    if rows % b0 or columns % b1:
        x = F.pad(x, (0, -columns % b1, 0, -rows % b0))
    return x.view(x.shape[0] // b0, b0, x.shape[1] // b1, b1)


def _joined(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocks.flatten(2, 3).flatten(0, 1)[:shape[0], :shape[1]].contiguous()
