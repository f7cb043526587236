"""One name, one place: where the value of an option goes, by the names that users know from several systems."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Mapping, Optional

from rlmono.config.foreign import Names, NotInstalled, megatron_names, sglang_names
from rlmono.config.kinds import Kind, kind_of
from rlmono.config.option import Option, options
from rlmono.config.schema import Config

SHAPE = {
    "num_layers": "int", "hidden_size": "int", "ffn_hidden_size": "int", "num_attention_heads": "int", "num_query_groups": "int",
    "kv_channels": "int", "vocab_size": "int", "rotary_base": "float", "rotary_percent": "float", "norm_epsilon": "float",
    "qk_layernorm": "bool", "add_qkv_bias": "bool", "untie_embeddings_and_output_weights": "bool",
    "max_position_embeddings": "int", "init_method_std": "float",
    "num_moe_experts": "int", "moe_router_topk": "int", "moe_ffn_hidden_size": "int", "moe_shared_expert_intermediate_size": "int",
    "moe_layer_freq": "list", "moe_router_score_function": "str", "moe_router_pre_softmax": "bool", "moe_router_enable_expert_bias": "bool",
    "moe_router_bias_update_rate": "float", "moe_router_topk_scaling_factor": "float", "moe_router_num_groups": "int",
    "moe_router_group_topk": "int", "multi_latent_attention": "bool", "q_lora_rank": "int", "kv_lora_rank": "int", "qk_head_dim": "int",
    "qk_pos_emb_head_dim": "int", "v_head_dim": "int", "rotary_scaling_factor": "float", "mscale": "float", "mscale_all_dim": "float",
}
"""Model shape by Megatron's command-line names: the HF config says it, and flags may say it again."""

FREE_SHAPE = ("rotary_base", "rotary_percent", "norm_epsilon", "max_position_embeddings", "init_method_std")
"""What may differ from the HF config; with any other difference its weights would not fit."""

ENGINE_SIZE = "<rollout_num_gpus_per_engine>"
"""Stands for the engine's size, which is known only when all sources are read."""

SGLANG_RENAMED = {
    "cuda_graph_bs": "cuda_graph_bs_decode", "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "stream_output": "incremental_streaming_output",
    "nsa_prefill_backend": "dsa_prefill_backend", "nsa_decode_backend": "dsa_decode_backend",
    "mamba_scheduler_strategy": "mamba_radix_cache_strategy",
}
SGLANG_SWITCHES = {"enable_deepep_moe": ("moe_a2a_backend", "deepep"), "enable_ep_moe": ("ep_size", ENGINE_SIZE)}
"""Switches of earlier SGLang versions, as the argument and value that they stand for today."""

SGLANG_OURS = {
    "model_path": "--hf-checkpoint", "tp_size": "--rollout-num-gpus-per-engine", "random_seed": "--rollout-seed", "device": "--device",
    "dtype": "--dtype", "load_format": None, "skip_tokenizer_init": None, "enable_memory_saver": None, "nnodes": None, "node_rank": None,
    "dist_init_addr": None, "base_gpu_id": None, "gpu_id_step": None, "host": None, "port": None,
}
"""Arguments that rlmono gives SGLang itself, and the option to use instead."""

MEGATRON_RENAMED = {
    "layernorm_epsilon": "norm_epsilon", "num_experts": "num_moe_experts", "accumulate_allreduce_grads_in_fp32": "grad_reduce_in_fp32",
    "fp8_format": "fp8", "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
MEGATRON_SWITCHES = {
    "bf16": ("dtype", "bfloat16"), "no_bias_swiglu_fusion": ("bias_activation_fusion", False),
    "no_check_for_nan_in_loss_and_grad": ("check_for_nan_in_grad", False),
}
MEGATRON_OURS = {"fp16": "--dtype", "deterministic_mode": "--deterministic"}

ANY = object()
ALWAYS: dict[str, tuple[str, Any, str]] = {
    "swiglu": ("bool", True, "the architecture says it"),
    "gated_linear_unit": ("bool", True, "the architecture says it"),
    "disable_bias_linear": ("bool", True, "the architecture says it"),
    "add_bias_linear": ("bool", False, "the architecture says it"),
    "normalization": ("str", "RMSNorm", "the architecture says it"),
    "group_query_attention": ("bool", True, "the architecture says it"),
    "use_rotary_position_embeddings": ("bool", True, "the architecture says it"),
    "position_embedding_type": ("str", "rope", "the architecture says it"),
    "attention_softmax_in_fp32": ("bool", True, "always so"),
    "attention_dropout": ("float", 0.0, "always 0, or the ratio of two passes would be wrong"),
    "hidden_dropout": ("float", 0.0, "always 0, or the ratio of two passes would be wrong"),
    "use_distributed_optimizer": ("bool", True, "always so"),
    "overlap_param_gather": ("bool", ANY, "weights are gathered as a step ends, since engines get them next"),
    "align_param_gather": ("bool", ANY, "weights are gathered as a step ends, since engines get them next"),
    "overlap_param_gather_with_optimizer_step": ("bool", ANY, "weights are gathered as a step ends, since engines get them next"),
    "variable_seq_lengths": ("bool", True, "always so: samples are packed"),
    "no_rope_fusion": ("bool", True, "always so: the fused one needs Transformer Engine"),
    "apply_rope_fusion": ("bool", False, "the fused one needs Transformer Engine"),
    "use_mcore_models": ("bool", True, "always so"),
    "ckpt_format": ("str", "torch_dist", "always so"),
    "seq_length": ("int", ANY, "samples are packed at their own lengths"),
    "attention_backend": ("str", ANY, "attention is rlmono's own, over packed samples"),
    "use_flash_attn": ("bool", ANY, "attention is rlmono's own, over packed samples"),
    "masked_softmax_fusion": ("bool", ANY, "attention is rlmono's own, over packed samples"),
    "cross_entropy_loss_fusion": ("bool", ANY, "the loss is rlmono's own, over parts of the vocabulary and chunks of tokens"),
    "cross_entropy_fusion_impl": ("str", ANY, "the loss is rlmono's own, over parts of the vocabulary and chunks of tokens"),
    "make_vocab_size_divisible_by": ("int", ANY, "the vocabulary is padded to a multiple of the tensor-parallel size"),
    "moe_grouped_gemm": ("bool", ANY, "experts are computed one after another; a product over all of them needs Transformer Engine"),
    "moe_permute_fusion": ("bool", ANY, "the fused one needs Transformer Engine"),
}
"""Megatron names for what rlmono does anyway: kind, the value that it has, and why it is not an option."""

ANOTHER_MODEL = frozenset(
    "softmax_scale softmax_type apply_residual_connection_post_layernorm layernorm_zero_centered_gamma apply_query_key_layer_scaling activation_func "
    "glu_linear_offset activation_func_clamp_value rotary_interleaved window_size window_attn_skip_freq no_rope_freq mrope_section qk_clip "
    "qk_l2_norm attention_output_gate experimental_attention_variant linear_attention_freq is_hybrid_model heterogeneous_block_specs mtp_num_layers "
    "moe_shared_expert_gate moe_router_topk_limited_devices moe_router_force_load_balancing moe_input_jitter_eps moe_token_dropping moe_latent_size "
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_apply_probs_on_input rope_type original_max_position_embeddings beta_fast "
    "beta_slow".split())
"""Megatron's names that would make the trainer compute another function than the engine and config.json."""

UNUSABLE = {
    "needs Transformer Engine, which rlmono does without: leave it out":
        "fp8* fp4* first_last_layers_bf16 num_layers_at_*_in_bf16 keep_fp8_transpose_cache activation_func_fp8_input_store quant_recipe "
        "tp_comm_* tp_only_amax_red use_te_* use_kitchen* kitchen_* cpu_offloading* fine_grained_activation_offloading offload_modules "
        "min_offloaded_tensor_size delay_wgrad_compute overlap_moe_expert_parallel_comm ep_overlap_* symmetric_ar_type "
        "disable_parameter_transpose_cache fused_single_qkv_rope reuse_grad_buf_for_mxfp8_param_ag moe_router_padding_for_* moe_router_fusion "
        "use_fused_weighted_squared_relu store_param_remainders exp_avg*_dtype main_*_dtype",
    "has nothing here that it could change: leave it out":
        "mamba_* use_mamba_* linear_* dsa_* mtp_* muon_* sgd_momentum *cuda_graph* inference_* flash_decode use_inference_optimized_layers "
        "mlp_chunks_for_prefill cache_mla_latents *fsdp* *sharding_strategy num_distributed_optimizer_instances cp_comm_type "
        "hybrid_context_parallel hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank barrier_with_L1_time test_mode config_logger_dir "
        "log_* loss_scale* *_loss_scale hysteresis moe_per_layer_logging moe_enable_routing_replay decoupled_* hetereogenous_dist_checkpoint "
        "qk_clip_* moe_extended_tp moe_use_legacy_grouped_gemm",
    "is set by rlmono itself: leave it out":
        "*autocast* perform_initialization use_cpu_initialization init_model_with_meta_device overlap_p2p_comm* batch_p2p_* "
        "deallocate_pipeline_outputs pipeline_model_parallel_layout microbatch_group_size_per_vp_stage account_for_*_in_pipeline_split "
        "average_in_collective",
}
"""Megatron's names, with * for any part, that would be taken and do nothing, or fail much later; and why."""

FUNCTIONS = {
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": "rlmono.rollout.filters.check_reward_nonzero_std",
    "slime.rollout.data_source.pop_first": "rlmono.rollout.filters.pop_first",
    "slime.ray.rollout_data_source.pop_first": "rlmono.rollout.filters.pop_first",
}
"""Shipped functions of the system that users come from, and ours."""


def unused_shape(shape: Mapping[str, Any]) -> frozenset[str]:
    """Names of the shape that say nothing for a model of this shape, though argument lists for Megatron give them."""
    out: set[str] = set()
    if shape.get("multi_latent_attention"):
        out |= {"kv_channels", "num_query_groups"}
        if shape.get("rope_type") == "rope":
            out |= {"rotary_scaling_factor", "mscale", "mscale_all_dim"}
    if shape.get("moe_router_score_function") == "sigmoid":
        out.add("moe_router_pre_softmax")
    if shape.get("num_moe_experts") and shape.get("moe_router_num_groups") is None:
        out |= {"moe_router_num_groups", "moe_router_group_topk"}
    return frozenset(out)


@dataclass(frozen=True)
class Target:
    """Where a value goes. `room` is field, model, sglang, megatron, or ignored; `means` is what a bare switch stands for."""

    room: str
    key: str
    kind: Kind
    option: Optional[Option] = None
    note: str = ""
    means: Any = None
    expect: Any = ANY
    negated: bool = False


class UnknownName(ValueError):
    """No option has this name; `nearest` is one that is spelt alike."""

    def __init__(self, nearest: Optional[str]) -> None:
        super().__init__("is not an option")
        self.nearest = nearest


@lru_cache(maxsize=1)
def _fields() -> dict[str, Target]:
    return {f.name: Target("field", f.name, kind_of(str(f.type)), option) for f, option in options(Config)}


def find(name: str) -> Target:
    """Where the value of `name` (lower case, underscores, no prefix) goes.

    Raises UnknownName, NotInstalled, or ValueError for a name that rlmono sets itself; texts are ends of sentences.
    """
    if name in _fields():
        return _fields()[name]
    target = _sglang(name.removeprefix("sglang_")) if name.startswith("sglang_") else _megatron(name)
    if target is None and name.startswith("no_") and (positive := _positive(name.removeprefix("no_"))):
        return replace(positive, negated=True)
    if target is None:
        raise UnknownName(_nearest(name))
    return target


def _positive(name: str) -> Optional[Target]:
    try:
        target = find(name)
    except UnknownName:
        return None
    return target if target.kind.base == "bool" and target.means is None and not target.kind.many else None


def _sglang(name: str) -> Optional[Target]:
    if name in SGLANG_SWITCHES:
        key, value = SGLANG_SWITCHES[name]
        return Target("sglang", key, Kind("bool"), note=f"means --sglang-{_dashes(key)} {value} today", means=value)
    names = sglang_names()
    key = SGLANG_RENAMED.get(name) or names.aliases.get(name, name)
    if key in SGLANG_OURS:
        raise ValueError(f"is set by rlmono itself; {f'use {SGLANG_OURS[key]}' if SGLANG_OURS[key] else 'leave it out'}")
    note = f"is called --sglang-{_dashes(key)} today" if name in SGLANG_RENAMED else ""
    return Target("sglang", key, names.kinds[key], note=note) if key in names.kinds else None


def _megatron(name: str) -> Optional[Target]:
    if name in ALWAYS:
        kind, expect, why = ALWAYS[name]
        return Target("ignored", name, Kind(kind), note=f"is not needed: {why}", expect=expect)
    if name in MEGATRON_OURS:
        raise ValueError(f"is set by rlmono itself; use {MEGATRON_OURS[name]}")
    if name in MEGATRON_SWITCHES:
        key, value = MEGATRON_SWITCHES[name]
        return replace(find(key), kind=Kind("bool"), note=f"means {_dashes(key)} = {value}", means=value)
    if name in MEGATRON_RENAMED:
        key = MEGATRON_RENAMED[name]
        return replace(find(key), note=f"is {key} here")
    if name in SHAPE:
        return Target("model", name, Kind("int", many=True, single=True) if SHAPE[name] == "list" else Kind(SHAPE[name]))
    if name in ANOTHER_MODEL:
        raise ValueError("would make the trainer's model another than the engine's, which is that of config.json: leave it out")
    kinds = megatron_names().kinds
    if name in kinds and (problem := next((w for w, names in UNUSABLE.items() if any(fnmatchcase(name, n) for n in names.split())), None)):
        raise ValueError(problem)
    return Target("megatron", name, kinds[name]) if name in kinds else None


def _nearest(name: str) -> Optional[str]:
    sglang = _known(sglang_names)
    if name in sglang:
        return f"sglang_{name}"
    ours = [*_fields(), *SHAPE, *ALWAYS, *MEGATRON_RENAMED, *MEGATRON_SWITCHES]
    engine = [f"sglang_{n}" for n in (*sglang, *SGLANG_RENAMED, *SGLANG_SWITCHES)]
    pool = engine if name.startswith("sglang_") else [*_known(megatron_names)]
    for names in (ours, pool):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
            return close[0]
    return next(iter(difflib.get_close_matches(name, ours + pool, n=1, cutoff=0.5)), None)


def _known(read: Any) -> dict[str, Kind]:
    """A package's names, for a suggestion only: none where it is not installed."""
    try:
        names: Names = read()
    except NotInstalled:
        return {}
    return names.kinds


def _dashes(name: str) -> str:
    return name.replace("_", "-")
