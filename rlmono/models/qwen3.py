"""Qwen3, dense: the worked example of a model family.

A family is a file with `shape_from_hf` (the HF config's shape, by Megatron's names) and `tensors` (the weight names both
ways), and a line in registry.py.
"""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, decoder, refuse_scaled_rope

tensors = decoder


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Norms on queries and keys, no bias."""
    refuse_scaled_rope(hf)
    return {**base_shape(hf), "qk_layernorm": True}
