"""Qwen3, dense (Qwen3ForCausalLM): the worked example of a model family.

A family is a file with `shape_from_hf` (HF config -> the shape, by Megatron's names) and `tensors` (the weight names both
ways), and a line in registry.py.
"""

from __future__ import annotations

from typing import Any, Mapping

from rlmono.models.mapping import Columns, GatedRows, QkvRows, Replicated, Rows, Tensor

ARCHITECTURE = "Qwen3ForCausalLM"


def shape_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The model's shape from its HF config.json."""
    heads = hf["num_attention_heads"]
    return dict(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads, num_query_groups=hf.get("num_key_value_heads", heads),
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"], rotary_base=rotary_base(hf), rotary_percent=1.0, norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        qk_layernorm=True, add_qkv_bias=bool(hf.get("attention_bias", False)),
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        max_position_embeddings=hf.get("max_position_embeddings", 32768), init_method_std=hf.get("initializer_range", 0.02))


def rotary_base(hf: Mapping[str, Any]) -> float:
    """transformers 5 writes rope_parameters, earlier ones rope_theta; scaled RoPE is refused."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not supported for {ARCHITECTURE}; known: default")
    return float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))


def tensors(shape: Mapping[str, Any]) -> list[Tensor]:
    """Every weight: its Megatron name, its HF names, and how the one is made of the others."""
    out: list[Tensor] = [
        Rows("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Replicated("decoder.final_layernorm.weight", "model.norm.weight"),
    ]
    if shape["untie_embeddings_and_output_weights"]:
        out.append(Rows("output_layer.weight", "lm_head.weight"))
    for i in range(shape["num_layers"]):
        m, h = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = [f"{h}self_attn.{x}_proj" for x in "qkv"]
        out += [
            QkvRows(f"{m}self_attention.linear_qkv.weight", *(f"{x}.weight" for x in qkv), shape=shape),
            Columns(f"{m}self_attention.linear_proj.weight", f"{h}self_attn.o_proj.weight"),
            Replicated(f"{m}self_attention.q_layernorm.weight", f"{h}self_attn.q_norm.weight"),
            Replicated(f"{m}self_attention.k_layernorm.weight", f"{h}self_attn.k_norm.weight"),
            Replicated(f"{m}input_layernorm.weight", f"{h}input_layernorm.weight"),
            Replicated(f"{m}pre_mlp_layernorm.weight", f"{h}post_attention_layernorm.weight"),
            GatedRows(f"{m}mlp.linear_fc1.weight", f"{h}mlp.gate_proj.weight", f"{h}mlp.up_proj.weight"),
            Columns(f"{m}mlp.linear_fc2.weight", f"{h}mlp.down_proj.weight"),
        ]
        if shape["add_qkv_bias"]:
            out.append(QkvRows(f"{m}self_attention.linear_qkv.bias", *(f"{x}.bias" for x in qkv), shape=shape))
    return out
