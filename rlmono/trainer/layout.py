"""What this rank holds of the whole model: parameters by their names in the whole model, and the groups that hold the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """The groups that a full tensor is gathered over: tensor parallel (experts have their own), expert parallel, pipeline."""

    tp: dist.ProcessGroup
    expert_tp: dist.ProcessGroup
    ep: dist.ProcessGroup
    pp: dist.ProcessGroup

    @staticmethod
    def current() -> Layout:
        return Layout(parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group(),
                      parallel_state.get_expert_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group())


def held_tensors(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """This rank's parameters (and router biases, which are buffers), by their names in the whole model.

    The biases are kept in fp32 here, as checkpoints have them: bf16 wrappers cast them, and they choose experts by small differences.
    """
    experts_before = parallel_state.get_expert_model_parallel_rank()
    out: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        layers_before = get_transformer_layer_offset(chunk.config, vp_stage=getattr(chunk, "vp_stage", None))
        experts = (chunk.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
        biases = [(n, b) for n, b in chunk.named_buffers() if n.endswith("expert_bias")]
        for _, bias in biases:
            bias.data = bias.data.float()
        for name, tensor in [*chunk.named_parameters(), *biases]:
            name = _LAYER.sub(lambda m: f"decoder.layers.{int(m[1]) + layers_before}.", name)                   # noqa: B023 - used at once
            name = _EXPERT.sub(lambda m: f".local_experts.{int(m[1]) + experts_before * experts}.", name)       # noqa: B023
            out[name] = tensor
    return out
