"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, decoder, refuse_scaled_rope

tensors = decoder


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Bias on queries, keys and values, always."""
    refuse_scaled_rope(hf)
    return {**base_shape(hf), "add_qkv_bias": True}
