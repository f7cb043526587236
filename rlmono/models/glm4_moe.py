"""GLM-4.5 (Glm4MoeForCausalLM)."""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, decoder, refuse_scaled_rope, rope

tensors = decoder


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Partial rotary, bias on qkv, norms on queries and keys, first layers dense, then experts with a shared one."""
    refuse_scaled_rope(hf)
    return {**base_shape(hf), "rotary_percent": float({**hf, **rope(hf)}.get("partial_rotary_factor", 0.5)),
            "qk_layernorm": bool(hf.get("use_qk_norm", False)), **sigmoid_experts(hf)}


def sigmoid_experts(hf: Shape) -> dict[str, Any]:
    """The router of GLM-4.5 and DeepSeek-V3: sigmoid scores, a bias that only chooses, group-limited choice, shared experts.

    The bias is not updated in training (rate 0): it is data, as the checkpoint has it.
    """
    topk, groups, chosen = hf["num_experts_per_tok"], hf.get("n_group") or 1, hf.get("topk_group") or 1
    if groups > 1 and topk // chosen != 2:
        raise ValueError(f"config.json: num_experts_per_tok {topk} over topk_group {chosen} is not supported: a group is scored by its best "
                         "two experts, and Megatron takes their number from this ratio")
    if not hf.get("norm_topk_prob", True):
        raise ValueError("config.json: norm_topk_prob false is not supported with sigmoid scores")
    shared = (hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"]
    return {"num_moe_experts": hf["n_routed_experts"], "moe_router_topk": topk, "moe_ffn_hidden_size": hf["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": shared or None, "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False,
            "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0,
            "moe_router_topk_scaling_factor": float(hf.get("routed_scaling_factor", 1.0)),
            "moe_router_num_groups": groups if groups > 1 else None, "moe_router_group_topk": chosen if groups > 1 else None,
            "moe_layer_freq": [int(i >= hf.get("first_k_dense_replace", 0)) for i in range(hf["num_hidden_layers"])]}
