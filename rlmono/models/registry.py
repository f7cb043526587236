"""The model families that rlmono knows, by the architecture that config.json names."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Mapping

from rlmono.models.decoder import free_values

FAMILIES = {
    "Qwen2ForCausalLM": "rlmono.models.qwen2",
    "Qwen3ForCausalLM": "rlmono.models.qwen3",
    "Qwen3MoeForCausalLM": "rlmono.models.qwen3_moe",
    "LlamaForCausalLM": "rlmono.models.llama",
    "Glm4MoeForCausalLM": "rlmono.models.glm4_moe",
    "DeepseekV3ForCausalLM": "rlmono.models.deepseek_v3",
}

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
         "qk_rope_head_dim", "v_head_dim")
"""Of config.json: whole numbers above 0, where they are given."""


def family(architecture: str) -> ModuleType:
    """The family's module; raises ValueError that lists the known ones."""
    import importlib
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[architecture])


def shape_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of the model that an HF config.json describes, by Megatron's names, with its `architecture`.

    Raises ValueError for an unknown architecture, a config that lacks a value, and a size that is none.
    """
    names = hf.get("architectures") or []
    if len(names) != 1:
        raise ValueError(f"config.json: `architectures` must name one architecture, but is {names!r}")
    for name in SIZES:
        value = hf.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"config.json: {name!r} must be a whole number above 0, but is {value!r}")
    try:
        return {"architecture": names[0], **family(names[0]).shape_from_hf(hf)}
    except KeyError as e:
        raise ValueError(f"config.json: {e.args[0]!r} is missing ({names[0]})") from None


def changed_values(hf: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json would have to say for `shape`, where that differs from what it says: --rotary-base, --norm-epsilon and the like.

    The engine's model and exported folders are told by these.
    """
    said = shape_from_hf(hf)
    return free_values(hf, {k: v for k, v in shape.items() if k in said and v != said[k]})
