"""Megatron's layer specs without Transformer Engine: our attention and norms in its own decoder block."""

from __future__ import annotations

import copy
from typing import Any, Mapping, Optional

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from rlmono.trainer.attention import VarlenAttention


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's own wrapper of torch's norm refuses sequence parallel; its weight only has to be marked for the
    gradient sum over tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LatentNorm(RMSNorm):
    """With an epsilon of its own: Megatron passes that of all norms to those on latents too."""

    def __init__(self, config: Any, hidden_size: int, own_eps: float, **_: Any):
        super().__init__(config, hidden_size, own_eps)


def block_spec(config: TransformerConfig, shape: Mapping[str, Any], vp_stage: Optional[int] = None) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage (and virtual stage)."""
    latent = shape.get("latent_norm_epsilon")
    norm: Any = RMSNorm if latent is None else ModuleSpec(module=LatentNorm, params={"own_eps": latent})
    block = copy.deepcopy(get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage))
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = VarlenAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if config.qk_layernorm and hasattr(attention, name):
                setattr(attention, name, norm)
        # Column-parallel down projections train with wrong gradients under tensor parallel: the part that carries RoPE
        # is gathered, and its gradient comes back once a rank. The same weight on all ranks is right, and small.
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            if hasattr(attention, name):
                setattr(attention, name, Linear)
    return block
