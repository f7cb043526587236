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


def family(architecture: str) -> ModuleType:
    """The family's module; raises ValueError that lists the known ones."""
    import importlib
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[architecture])


def shape_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of the model that an HF config.json describes, by Megatron's names, with its `architecture`.

    Raises ValueError for an unknown architecture or a config that lacks a value.
    """
    names = hf.get("architectures") or []
    if len(names) != 1:
        raise ValueError(f"config.json: `architectures` must name one architecture, but is {names!r}")
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
