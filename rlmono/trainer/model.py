"""Megatron's model, wrapped for training: GPTModel of a shape, DistributedDataParallel, optimizer and schedule."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from rlmono.config.schema import Config
from rlmono.trainer.attention import VarlenAttention


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's own wrapper of torch's norm refuses sequence parallel; its weight only has to be marked for the
    gradient sum over tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


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
    s, pp = config.model, config.pipeline_model_parallel_size
    values: dict[str, Any] = dict(
        num_layers=s["num_layers"], hidden_size=s["hidden_size"], ffn_hidden_size=s["ffn_hidden_size"],
        num_attention_heads=s["num_attention_heads"], num_query_groups=s["num_query_groups"], kv_channels=s["kv_channels"],
        normalization="RMSNorm", layernorm_epsilon=s["norm_epsilon"], qk_layernorm=s["qk_layernorm"], add_qkv_bias=s["add_qkv_bias"],
        init_method_std=s["init_method_std"], gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=config.tensor_model_parallel_size, pipeline_model_parallel_size=pp,
        context_parallel_size=config.context_parallel_size, sequence_parallel=config.sequence_parallel,
        recompute_granularity=config.recompute_granularity, recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, use_cpu_initialization=not torch.cuda.is_available(),
        # Packs differ in length; the default dispatcher refuses that even for dense models.
        variable_seq_lengths=pp > 1, moe_token_dispatcher_type="alltoall",
        # We weigh tokens ourselves (see losses.py): neither DDP nor the schedule may divide.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True, persist_layer_norm=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        apply_rope_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
    values.update(_named(config.megatron, TransformerConfig))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(**values)


def build_model(config: Config, tf_config: TransformerConfig) -> GPTModel:
    """This rank's part of the model, bare: float parameters on the device, nothing wrapped."""
    s = config.model
    spec = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=s["qk_layernorm"], normalization="RMSNorm"))
    spec.submodules.self_attention.submodules.core_attention = VarlenAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if s["qk_layernorm"]:
        spec.submodules.self_attention.submodules.q_layernorm = spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    block = TransformerBlockSubmodules(layer_specs=[spec] * tf_config.num_layers, layer_norm=RMSNorm)
    return GPTModel(
        config=tf_config, transformer_layer_spec=block, vocab_size=padded_vocab(config), max_sequence_length=s["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(), parallel_output=True,
        share_embeddings_and_output_weights=not s["untie_embeddings_and_output_weights"],
        position_embedding_type="rope", rotary_percent=s["rotary_percent"], rotary_base=s["rotary_base"])


def padded_vocab(config: Config) -> int:
    """The vocabulary, up to a multiple of the tensor-parallel ranks; the added tokens never get probability."""
    tp = config.tensor_model_parallel_size
    return -(-config.model["vocab_size"] // tp) * tp


def wrap(config: Config, tf_config: TransformerConfig, model: GPTModel) -> DistributedDataParallel:
    """bf16 wrapper where asked, and gradient buffers reduced over data-parallel ranks in fp32."""
    values: dict[str, Any] = dict(use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False)
    values.update(_named(config.megatron, DistributedDataParallelConfig))
    module = Float16Module(tf_config, model) if tf_config.bf16 else model
    ddp = DistributedDataParallel(tf_config, DistributedDataParallelConfig(**values), module)
    # The schedule would divide by a token count: our loss is already weighted, so there is nothing to pass on.
    tf_config.finalize_model_grads_func = lambda models, _num_tokens, **kw: finalize_model_grads(models, None, **kw)
    return ddp


def build_optimizer(config: Config, dtype: torch.dtype, ddp: DistributedDataParallel) -> Any:
    """Adam over the distributed optimizer (state and fp32 weights are sharded over data-parallel ranks)."""
    values: dict[str, Any] = dict(
        optimizer=config.optimizer, lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay, adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2, adam_eps=config.adam_eps, clip_grad=config.clip_grad, bf16=dtype == torch.bfloat16,
        params_dtype=dtype, use_distributed_optimizer=True)
    values.update(_named(config.megatron, OptimizerConfig))
    optimizer = get_megatron_optimizer(OptimizerConfig(**values), [ddp])
    ddp.config.grad_scale_func = optimizer.scale_loss
    _allocate_adam_state(optimizer)
    return optimizer


def _allocate_adam_state(optimizer: Any) -> None:
    """torch's Adam makes its state at the first step; checkpoints and the memory plan want it from the start."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in single.optimizer.param_groups:
            for p in group["params"]:
                single.optimizer.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), "exp_avg": torch.zeros_like(p.data),
                                             "exp_avg_sq": torch.zeros_like(p.data)}


def build_schedule(config: Config, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
    """Learning-rate schedule; step n (from 1) trains with its n-th value, so warm-up never begins with 0."""
    decay = max(config.lr_decay_iters or total_steps, config.lr_warmup_iters + 1)
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=config.lr, min_lr=config.min_lr, lr_warmup_steps=config.lr_warmup_iters, lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style, start_wd=config.weight_decay, end_wd=config.weight_decay, wd_incr_steps=decay,
        wd_incr_style="constant", use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True)


def _named(values: Any, cls: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in names}
