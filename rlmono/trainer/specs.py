"""Megatron's layer specs: our attention and norms, or Transformer Engine's, in Megatron's own decoder block."""

from __future__ import annotations

import copy
from typing import Any, Mapping, Optional

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from rlmono.trainer import te
from rlmono.trainer.attention import VarlenAttention
from rlmono.trainer.norms import LatentNorm, RMSNorm


def block_spec(config: TransformerConfig, shape: Mapping[str, Any], vp_stage: Optional[int] = None,
               by_te: bool = False) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage (and virtual stage); `by_te`: with Transformer Engine's kernels (see te.usable)."""
    latent = shape.get("latent_norm_epsilon")
    plain: Any = te.Norm if by_te else RMSNorm
    norm: Any = plain if latent is None else ModuleSpec(module=LatentNorm, params={"own_eps": latent})
    block = copy.deepcopy(get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage))
    block.layer_norm = plain
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = plain
        attention = parts.self_attention.submodules
        attention.core_attention = te.Attention if by_te and te.attends(config) else VarlenAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if config.qk_layernorm and hasattr(attention, name):
                setattr(attention, name, norm)
        # Column-parallel down projections train with wrong gradients under tensor parallel: the part that carries RoPE
        # is gathered, and its gradient comes back once a rank. The same weight on all ranks is right, and small.
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            if hasattr(attention, name):
                setattr(attention, name, Linear)
    return block
