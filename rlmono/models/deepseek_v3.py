"""DeepSeek-V3 and R1, and the models of their architecture: Moonlight, Kimi-K2."""

from __future__ import annotations

from typing import Any

from rlmono.models.decoder import Shape, base_shape, embeddings, layer_mlp, norms, refuse_scaled_rope, rope, rope_kind
from rlmono.models.glm4_moe import sigmoid_experts
from rlmono.models.mapping import Columns, Replicated, Rows, Tensor

LATENT_NORM_EPSILON = 1e-6
"""Of the norms on the latents, whatever config.json says of the others: so the published code and transformers. For V3, R1 and Kimi-K2 that is
`rms_norm_eps` too; Moonlight's is 1e-5."""


def shape_from_hf(hf: Shape) -> dict[str, Any]:
    """Multi-head latent attention, YaRN, and the sigmoid router."""
    refuse_scaled_rope(hf, ("default", "yarn"))
    shape = {**base_shape(hf), "num_query_groups": hf["num_attention_heads"], "kv_channels": hf["v_head_dim"], "multi_latent_attention": True,
             "qk_layernorm": True, "q_lora_rank": hf.get("q_lora_rank"), "kv_lora_rank": hf["kv_lora_rank"], "qk_head_dim": hf["qk_nope_head_dim"],
             "qk_pos_emb_head_dim": hf["qk_rope_head_dim"], "v_head_dim": hf["v_head_dim"], "rope_type": "rope", "rotary_scaling_factor": 1.0,
             "latent_norm_epsilon": LATENT_NORM_EPSILON, **sigmoid_experts(hf)}
    if rope_kind(hf) == "yarn":
        r = rope(hf)
        shape |= {"rope_type": "yarn", "rotary_scaling_factor": float(r["factor"]), "beta_fast": float(r.get("beta_fast", 32)),
                  "beta_slow": float(r.get("beta_slow", 1)), "mscale": float(r.get("mscale", 1.0)),
                  "mscale_all_dim": float(r.get("mscale_all_dim", 1.0)),
                  "original_max_position_embeddings": r["original_max_position_embeddings"]}
    return shape


def tensors(shape: Shape) -> list[Tensor]:
    """Every weight. The down projections are the same on all tensor-parallel ranks (see trainer/specs.py for why)."""
    return [*embeddings(shape), *(t for i in range(shape["num_layers"]) for t in (*_attention(shape, i), *layer_mlp(shape, i)))]


def _attention(shape: Shape, i: int) -> list[Tensor]:
    m, h = f"decoder.layers.{i}.self_attention.", f"model.layers.{i}.self_attn."
    low_rank = shape["q_lora_rank"] is not None         # then engines make one projection of the two down projections
    down = [Replicated(f"{m}linear_kv_down_proj.weight", f"{h}kv_a_proj_with_mqa.weight", with_next=low_rank)]
    if low_rank:
        down.append(Replicated(f"{m}linear_q_down_proj.weight", f"{h}q_a_proj.weight"))
    out: list[Tensor] = [*norms(i), *down, Replicated(f"{m}kv_layernorm.weight", f"{h}kv_a_layernorm.weight"),
                         Rows(f"{m}linear_kv_up_proj.weight", f"{h}kv_b_proj.weight"), Columns(f"{m}linear_proj.weight", f"{h}o_proj.weight")]
    if not low_rank:
        return [*out, Rows(f"{m}linear_q_proj.weight", f"{h}q_proj.weight")]
    return [*out, Replicated(f"{m}q_layernorm.weight", f"{h}q_a_layernorm.weight"),
            Rows(f"{m}linear_q_up_proj.weight", f"{h}q_b_proj.weight")]
