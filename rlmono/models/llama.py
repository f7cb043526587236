"""Llama 2 and 3, dense."""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, decoder, refuse_scaled_rope, rope, rope_kind

tensors = decoder


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling is Megatron's `rope_scaling`, whose other constants are Llama 3.1's own."""
    refuse_scaled_rope(hf, ("default", "llama3"))
    if hf.get("mlp_bias"):
        raise ValueError("config.json: mlp_bias is not supported")
    shape = base_shape(hf)
    if rope_kind(hf) == "llama3":
        r = rope(hf)
        wanted = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        for key, value in wanted.items():
            if r.get(key, value) != value:
                raise ValueError(f"config.json: RoPE {key} {r[key]} is not supported; known: {value}")
        shape["rope_scaling_factor"] = float(r["factor"])
    return shape
