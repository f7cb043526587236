"""Pieces that families share: the shape of an HF config, and the weight names of embeddings, attention and MLPs."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

from rlmono.models.mapping import Columns, ExpertColumns, ExpertGatedRows, GatedRows, QkvRows, Replicated, Rows, Tensor

Shape = Mapping[str, Any]


def base_shape(hf: Shape) -> dict[str, Any]:
    """What all decoders say alike, by Megatron's names. Raises ValueError for sliding windows, which attention here does not have."""
    if hf.get("sliding_window") is not None and hf.get("use_sliding_window", True):
        raise ValueError(f"config.json: sliding_window {hf['sliding_window']} is not supported; known: full attention")
    heads = hf["num_attention_heads"]
    return dict(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], ffn_hidden_size=hf["intermediate_size"], num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads, kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"], rotary_base=rotary_base(hf), rotary_percent=1.0, norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        qk_layernorm=False, add_qkv_bias=bool(hf.get("attention_bias", False)),
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        max_position_embeddings=hf.get("max_position_embeddings", 32768), init_method_std=hf.get("initializer_range", 0.02))


def rope(hf: Shape) -> dict[str, Any]:
    """RoPE parameters: transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` and `rope_theta`."""
    return dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})


def rope_kind(hf: Shape) -> str:
    parameters = rope(hf)
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def rotary_base(hf: Shape) -> float:
    return float({**hf, **rope(hf)}.get("rope_theta", 10000.0))


def free_values(hf: Shape, given: Shape) -> dict[str, Any]:
    """Values of the shape that may differ from the HF config's, as config.json says them, by transformers 5's names and by earlier ones."""
    out = {name: given[key] for key, name in FREE.items() if key in given}
    if "rotary_base" in given or "rotary_percent" in given:
        # Whole: who reads `rope_parameters` reads nothing beside it.
        kept = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if k in hf}
        changed = {k: out[k] for k in ("rope_theta", "partial_rotary_factor") if k in out}
        out["rope_parameters"] = {"rope_type": rope_kind(hf), "rope_theta": rotary_base(hf)} | kept | rope(hf) | changed
    return out


FREE = {"rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor", "norm_epsilon": "rms_norm_eps",
        "max_position_embeddings": "max_position_embeddings", "init_method_std": "initializer_range"}
"""Of a shape, what is no weight's size: with another value the HF folder's weights still fit."""


def refuse_scaled_rope(hf: Shape, known: Iterable[str] = ("default",)) -> None:
    """Raises ValueError for a RoPE scaling that the family's code does not compute."""
    if rope_kind(hf) not in known:
        raise ValueError(f"config.json: RoPE scaling {rope_kind(hf)!r} is not supported for {hf['architectures'][0]}; known: {', '.join(known)}")


# ---------------------------------------------------------------- weight names

def embeddings(shape: Shape) -> list[Tensor]:
    out: list[Tensor] = [Rows("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary=True),
                         Replicated("decoder.final_layernorm.weight", "model.norm.weight")]
    if shape["untie_embeddings_and_output_weights"]:
        out.append(Rows("output_layer.weight", "lm_head.weight", vocabulary=True))
    return out


def attention(shape: Shape, i: int) -> list[Tensor]:
    """Grouped-query attention and the layer's two norms."""
    m, h = f"decoder.layers.{i}.", f"model.layers.{i}."
    qkv = [f"{h}self_attn.{x}_proj" for x in "qkv"]
    out: list[Tensor] = [*norms(i), QkvRows(f"{m}self_attention.linear_qkv.weight", *(f"{x}.weight" for x in qkv), shape=shape),
                         Columns(f"{m}self_attention.linear_proj.weight", f"{h}self_attn.o_proj.weight")]
    if shape["add_qkv_bias"]:
        out.append(QkvRows(f"{m}self_attention.linear_qkv.bias", *(f"{x}.bias" for x in qkv), shape=shape))
    if shape["qk_layernorm"]:
        out += [Replicated(f"{m}self_attention.{x}_layernorm.weight", f"{h}self_attn.{x}_norm.weight") for x in "qk"]
    return out


def norms(i: int) -> list[Tensor]:
    return [Replicated(f"decoder.layers.{i}.input_layernorm.weight", f"model.layers.{i}.input_layernorm.weight"),
            Replicated(f"decoder.layers.{i}.pre_mlp_layernorm.weight", f"model.layers.{i}.post_attention_layernorm.weight")]


def mlp(megatron: str, hf: str) -> list[Tensor]:
    """A gated MLP, whole or shared expert."""
    return [GatedRows(f"{megatron}.linear_fc1.weight", f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            Columns(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight")]


def experts(shape: Shape, i: int) -> list[Tensor]:
    """Router and experts of layer i; experts by their number in the whole model."""
    m, h = f"decoder.layers.{i}.mlp", f"model.layers.{i}.mlp"
    out: list[Tensor] = [Replicated(f"{m}.router.weight", f"{h}.gate.weight")]
    if shape.get("moe_router_enable_expert_bias"):
        out.append(Replicated(f"{m}.router.expert_bias", f"{h}.gate.e_score_correction_bias"))
    if shape.get("moe_shared_expert_intermediate_size"):
        out += mlp(f"{m}.shared_experts", f"{h}.shared_experts")
    for e in range(shape["num_moe_experts"]):
        me, he = f"{m}.experts.local_experts.{e}", f"{h}.experts.{e}"
        out += [ExpertGatedRows(f"{me}.linear_fc1.weight", f"{he}.gate_proj.weight", f"{he}.up_proj.weight"),
                ExpertColumns(f"{me}.linear_fc2.weight", f"{he}.down_proj.weight")]
    return out


def layer_mlp(shape: Shape, i: int) -> list[Tensor]:
    """Layer i's MLP, dense or of experts, as `moe_layer_freq` says."""
    if shape.get("num_moe_experts") and shape["moe_layer_freq"][i]:
        return experts(shape, i)
    return mlp(f"decoder.layers.{i}.mlp", f"model.layers.{i}.mlp")


def decoder(shape: Shape) -> list[Tensor]:
    """Every weight of a decoder with grouped-query attention."""
    return [*embeddings(shape), *(t for i in range(shape["num_layers"]) for t in (*attention(shape, i), *layer_mlp(shape, i)))]
