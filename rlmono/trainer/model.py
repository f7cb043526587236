"""Megatron's model, wrapped for training: GPTModel of a shape, and DistributedDataParallel."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import warnings
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from rlmono.config.schema import Config
from rlmono.trainer import te
from rlmono.trainer.specs import block_spec

log = logging.getLogger(__name__)


def init_parallel(config: Config) -> None:
    """Megatron's groups inside the pool's default group, and its random state."""
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size, expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size)
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's TransformerConfig from the model's shape, the layout and the pass-through names."""
    s, vpp = config.model, config.virtual_pipeline_model_parallel_size
    cls = MLATransformerConfig if s.get("multi_latent_attention") else TransformerConfig
    values: dict[str, Any] = dict(
        num_layers=s["num_layers"], hidden_size=s["hidden_size"], ffn_hidden_size=s["ffn_hidden_size"],
        num_attention_heads=s["num_attention_heads"], num_query_groups=s["num_query_groups"], kv_channels=s["kv_channels"],
        normalization="RMSNorm", layernorm_epsilon=s["norm_epsilon"], qk_layernorm=s["qk_layernorm"], add_qkv_bias=s["add_qkv_bias"],
        init_method_std=s["init_method_std"], gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, use_cpu_initialization=not torch.cuda.is_available(),
        # Packs differ in length; the default dispatcher refuses that even for dense models.
        variable_seq_lengths=config.pipeline_model_parallel_size > 1, moe_token_dispatcher_type="alltoall",
        # We weigh tokens ourselves (see losses.py): neither DDP nor the schedule may divide.
        calculate_per_token_loss=True,
        overlap_p2p_comm=vpp is not None, batch_p2p_comm=vpp is None, persist_layer_norm=False,
        # A virtual pipeline would let go of outputs while they are being sent, and gloo send what came to lie there. They are small: one more
        # layer's input a pack in flight.
        deallocate_pipeline_outputs=vpp is None,
        # SwiGLU in one kernel, of which the backward pass keeps the input alone; experts are left as they are.
        bias_activation_fusion=torch.cuda.is_available() and not s.get("num_moe_experts"),
        bias_dropout_fusion=False, apply_rope_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False)
    values.update(_layout(config))
    if s.get("num_moe_experts"):
        values.update(_experts(s))
    if cls is MLATransformerConfig:
        values.update(_latent_attention(s))
    values.update(_named(_available(config.megatron), cls))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**values)


def _layout(config: Config) -> dict[str, Any]:
    same = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
            "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel", "recompute_granularity", "recompute_method",
            "recompute_num_layers")
    stages = {f"num_layers_in_{end}_pipeline_stage": getattr(config, f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")}
    values = {name: getattr(config, name) for name in same} | stages
    if config.recompute_granularity == "auto":
        values["recompute_granularity"] = None          # until recompute.settle knows what is free
    return values


def _experts(s: Any) -> dict[str, Any]:
    same = ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq", "moe_router_score_function",
            "moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_router_topk_scaling_factor",
            "moe_router_num_groups", "moe_router_group_topk")
    return {name: s[name] for name in same if name in s} | dict(
        num_moe_experts=s["num_moe_experts"], moe_router_dtype="fp32", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=False, moe_permute_fusion=False)


def _latent_attention(s: Any) -> dict[str, Any]:
    same = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_base", "rotary_percent",
            "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {"multi_latent_attention": True} | {name: s[name] for name in same if name in s}


def _available(values: Any) -> dict[str, Any]:
    """DeepEP's dispatcher needs its package and a GPU; elsewhere the same exchange is done by alltoall."""
    out = dict(values)
    if out.get("moe_token_dispatcher_type") == "flex" and (importlib.util.find_spec("deep_ep") is None or not torch.cuda.is_available()):
        log.warning("moe_token_dispatcher_type flex needs deep_ep and a GPU: using alltoall")
        out.update(moe_token_dispatcher_type="alltoall", moe_enable_deepep=False)
    return out


def build_chunks(config: Config, tf_config: TransformerConfig, value_head: bool = False) -> list[GPTModel]:
    """This rank's part of the model, bare: one chunk, or one a virtual pipeline stage. With `value_head` its output is one number a token."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(config, tf_config, stage, value_head) for stage in (range(virtual) if virtual else [None])]


class ValueHead(torch.nn.Module):
    """Stands for GPTModel's output layer: [s, 1, hidden] -> [s, 1, 1], fp32, the same on every tensor-parallel rank."""

    def __init__(self, tf_config: TransformerConfig, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)         # whatever the layout
        start = torch.randn(1, tf_config.hidden_size, generator=generator) / (tf_config.hidden_size + 1)
        self.weight = torch.nn.Parameter(start.to(tf_config.params_dtype))
        self.sequence_parallel = tf_config.sequence_parallel
        # Each rank then has its part of the tokens, so Megatron must sum the head's gradients.
        setattr(self.weight, "sequence_parallel", self.sequence_parallel)  # noqa: B010 - no attribute that mypy knows

    def forward(self, hidden: torch.Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[torch.Tensor, None]:
        values = F.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            values = tensor_parallel.gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def _build_chunk(config: Config, tf_config: TransformerConfig, vp_stage: Optional[int], value_head: bool) -> GPTModel:
    s = config.model
    where: dict[str, Any] = dict(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    scaled = s.get("rope_scaling_factor")
    chunk = GPTModel(
        config=tf_config, transformer_layer_spec=block_spec(tf_config, s, vp_stage, te.usable(config, tf_config)),
        vocab_size=padded_vocab(config),
        max_sequence_length=s["max_position_embeddings"], parallel_output=True, vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(**where), post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=not (s["untie_embeddings_and_output_weights"] or value_head),
        position_embedding_type="rope", rotary_percent=s["rotary_percent"], rotary_base=s["rotary_base"],
        rope_scaling=scaled is not None, rope_scaling_factor=scaled or 8.0)
    if value_head and chunk.post_process:
        chunk.output_layer = ValueHead(tf_config, config.seed)
    return chunk


def padded_vocab(config: Config) -> int:
    """The vocabulary, up to a multiple of the tensor-parallel ranks; the added tokens never get probability."""
    tp = config.tensor_model_parallel_size
    return -(-config.model["vocab_size"] // tp) * tp


class _InBf16(Float16Module):
    """Megatron's wrapper would make an fp32 copy of all logits, which the loss reads a chunk at a time."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **named)


def wrap(config: Config, tf_config: TransformerConfig, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """bf16 wrapper where asked, and gradient buffers reduced over data-parallel ranks in fp32."""
    values: dict[str, Any] = dict(use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False)
    values.update(_named(config.megatron, DistributedDataParallelConfig))
    wrapped = [DistributedDataParallel(tf_config, DistributedDataParallelConfig(**values), _InBf16(tf_config, c) if tf_config.bf16 else c,
                                       disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    # The schedule would divide by a token count: our loss is already weighted, so there is nothing to pass on.
    tf_config.finalize_model_grads_func = lambda models, _num_tokens, **kw: finalize_model_grads(models, None, **kw)
    # With --overlap-grad-reduce, gradients of all packs but the last must wait.
    tf_config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [w.no_sync for w in wrapped]
    return wrapped


def _named(values: Any, cls: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in names}
