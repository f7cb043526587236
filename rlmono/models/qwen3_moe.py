"""Qwen3 with a mixture of experts."""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, decoder, refuse_scaled_rope

tensors = decoder


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Softmax router, no shared expert. With `norm_topk_prob` the softmax is over the chosen experts, else over all."""
    refuse_scaled_rope(hf)
    layers, step, dense = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    return {**base_shape(hf), "qk_layernorm": True, "num_moe_experts": hf.get("num_experts") or hf["num_local_experts"],
            "moe_router_topk": hf["num_experts_per_tok"], "moe_ffn_hidden_size": hf["moe_intermediate_size"],
            "moe_router_score_function": "softmax", "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
            "moe_layer_freq": [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]}
