"""Values that are right by themselves, held against each other: contradictions, and what comes later."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import string
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from rlmono.config.batches import BatchPlan, batch_arithmetic, data_parallel_size
from rlmono.config.evals import eval_sets
from rlmono.config.hf import model_shape
from rlmono.config.kernels import note, why_local
from rlmono.config.option import ConfigError, options
from rlmono.config.rewards import RM_TYPES, reward_type
from rlmono.config.schema import Config

RETURN_ORIGINAL = "SGLANG_RETURN_ORIGINAL_LOGPROB"
SGLANG_LATER = {
    "enable_dp_attention": "engines with DP attention", "dp_size": "engines with DP attention",
    "enable_dp_lm_head": "engines with DP attention",
    "ep_size": "engines with expert parallelism", "moe_a2a_backend": "engines with expert parallelism",
    "deepep_mode": "engines with expert parallelism", "moe_dense_tp_size": "engines with expert parallelism",
    "pp_size": "engines with pipeline parallelism",
}


def validated(config: Config, environ: Mapping[str, str]) -> Config:
    """The config with derived values and remarks. Raises ConfigError that lists every contradiction."""
    problems = [p for check in CHECKS for p in check(config)]
    if environ.get(RETURN_ORIGINAL, "").lower() in ("1", "true", "yes"):
        problems.append(f"variable {RETURN_ORIGINAL} makes the engine report logprobs before the temperature, "
                        "so ratios would be wrong: unset it")
    try:
        plan = batch_arithmetic(config, data_parallel_size(config) or 1)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError([_with_source(config, p) for p in problems])
    return _derived(config, plan)


def _with_source(config: Config, problem: str) -> str:
    """A problem that begins with an option's name, and where its value is from, if the user gave it."""
    source = config.origin.get(problem.split(maxsplit=1)[0].rstrip(":"), "default")
    return problem if source == "default" else f"{problem} ({source})"


def layout_only(config: Config, environ: Mapping[str, str]) -> Config:
    """The config of a tool that builds the model and neither trains nor serves. Raises ConfigError that lists every contradiction."""
    problems = [p for check in (_shape, _pipeline) for p in check(config)]
    if problems:
        raise ConfigError(problems)
    return config


def unsupported(config: Config) -> list[str]:
    """What is asked for and comes later, a sentence each: `train` refuses to start with any, a dry run lists them."""
    found = [f"--{_dashes(field.name)} {_shown(value)} ({config.origin.get(field.name, 'set')}): {feature} comes later"
             for field, option in options(Config)
             if (feature := option.coming(value := getattr(config, field.name), field.default))]
    found += [f"--sglang-{_dashes(name)} {_shown(value)}: {SGLANG_LATER[name]} come later"
              for name, value in config.sglang.items() if name in SGLANG_LATER and (value is True or value not in (None, False, 1, "none"))]
    if (quantization := config.model.get("quantization_config")) and not _block_fp8(quantization):
        method = quantization.get("quant_method", "quantised")
        found.append(f"--hf-checkpoint {config.hf_checkpoint} holds {method} weights that are not e4m3 in blocks of 128 x 128 with dynamic "
                     "activations: rollouts with them come later; use the bf16 folder")
    return found


def on_device(config: Config, device: str) -> Config:
    """The config with remarks on options that depend on what ranks compute on (cpu or cuda). Raises ConfigError for what can't be done there."""
    c = config
    if c.transformer_impl == "transformer_engine" and (why := why_local(c, device)):
        raise ConfigError([_with_source(c, f"transformer_impl transformer_engine is not possible: {why}; use auto or local")])
    if device != "cuda":
        if c.model.get("quantization_config") and c.loss_type != "sft":
            raise ConfigError([f"--hf-checkpoint {c.hf_checkpoint} holds fp8 weights, and engines compute with them on GPUs only: on a CPU use the "
                               "bf16 folder (python -m rlmono convert fp8-to-bf16)"])
        names = ("optimizer_cpu_offload", "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer")
        given = [f"--{_dashes(n)}" for n in names if getattr(c, n)]
        nothing = f"{', '.join(given)}: nothing to do on a CPU, where Adam and its states are in host memory anyway"
        return dataclasses.replace(c, notes=(*c.notes, nothing)) if given else c
    problems = []
    if c.use_precision_aware_optimizer and not c.optimizer_cpu_offload:
        problems.append("use_precision_aware_optimizer by itself needs Transformer Engine's Adam, which rlmono does without: leave it out, or add "
                        "--optimizer-cpu-offload")
    if c.optimizer_cpu_offload and c.dtype == "float32":
        problems.append("optimizer_cpu_offload keeps fp32 copies of bfloat16 weights in host memory: leave --dtype float32 out")
    if c.megatron.get("optimizer_offload_fraction", 1.0) != 1.0:
        problems.append("optimizer_offload_fraction below 1 would lose track of Adam's states on a resume without Transformer Engine: leave it out")
    if problems:
        raise ConfigError(problems)
    return c if c.debug_rollout_only else dataclasses.replace(c, notes=(*c.notes, note(c)))


def _block_fp8(quantization: Mapping[str, Any]) -> bool:
    return (quantization.get("quant_method") == "fp8" and list(quantization.get("weight_block_size") or ()) == [128, 128]
            and quantization.get("activation_scheme", "dynamic") == "dynamic")


def _shape(config: Config) -> Iterator[str]:
    model, tp, engine_tp = config.model, config.tensor_model_parallel_size, config.rollout_num_gpus_per_engine
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if model.get(name) and model[name] % tp and not (name == "num_query_groups" and model.get("multi_latent_attention")):
            yield f"tensor_model_parallel_size {tp} does not divide the model's {name} {model[name]}"
    if config.sglang.get("enable_dp_attention"):
        replicas = config.sglang.get("dp_size", 1)
        if engine_tp % replicas:
            yield f"sglang dp_size {replicas} does not divide rollout_num_gpus_per_engine {engine_tp}"
            return
        engine_tp //= replicas
    elif config.sglang.get("dp_size", 1) > 1:
        yield f"sglang dp_size {config.sglang['dp_size']} needs --sglang-enable-dp-attention; without it, each engine is one replica"
    heads, groups = model.get("num_attention_heads"), model.get("num_query_groups")
    engine = f"rollout_num_gpus_per_engine {config.rollout_num_gpus_per_engine}: attention over {engine_tp} devices"
    if heads and heads % engine_tp:
        yield f"{engine} does not divide the model's {heads} heads"
    elif groups and groups % engine_tp and engine_tp % groups:
        yield f"{engine} and the model's {groups} KV heads: one must divide the other"


def _pipeline(config: Config) -> Iterator[str]:
    layers, pp = config.model.get("num_layers"), config.pipeline_model_parallel_size
    ends = [n for n in (config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers) if n is not None]
    virtual = config.virtual_pipeline_model_parallel_size or 1
    if virtual > 1 and pp == 1:
        yield f"virtual_pipeline_model_parallel_size {virtual} needs pipeline_model_parallel_size above 1"
    if not layers or pp == 1:
        if ends:
            yield "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers need pipeline_model_parallel_size above 1"
        return
    rest, stages = layers - sum(ends), pp - len(ends)
    if rest < stages or (stages and rest % stages) or (not stages and rest):
        yield (f"{layers} layers over pipeline_model_parallel_size {pp}: {rest} layers don't divide into {stages} equal stages; "
               "set --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers")
    elif virtual > 1 and (odd := next((n for n in (*ends, rest // stages if stages else 0) if n % virtual), None)):
        yield f"virtual_pipeline_model_parallel_size {virtual} does not divide the {odd} layers of a pipeline stage"


def _experts(config: Config) -> Iterator[str]:
    model, tp, ep = config.model, config.tensor_model_parallel_size, config.expert_model_parallel_size
    experts, etp = model.get("num_moe_experts"), config.expert_tensor_parallel_size or tp
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if (value := config.megatron.get(name)) not in (None, 0, [0]):
            yield f"{name} {value}: Megatron would add this loss to each pack, whatever the pack weighs in the step; leave it out"
    if config.megatron.get("moe_router_load_balancing_type") == "sinkhorn":
        yield "moe_router_load_balancing_type sinkhorn would send tokens to other experts than the engine does: leave it out"
    if not experts:
        if model and ep > 1:
            yield f"expert_model_parallel_size {ep}: the model has no experts; leave it out"
        return
    if experts % ep:
        yield f"expert_model_parallel_size {ep} does not divide the model's {experts} experts"
    if tp > 1 and not config.sequence_parallel:
        yield f"tensor_model_parallel_size {tp} with experts needs --sequence-parallel"
    for name, size, what in (("moe_ffn_hidden_size", etp, "expert_tensor_parallel_size"),
                             ("moe_shared_expert_intermediate_size", tp, "tensor_model_parallel_size")):
        if (model.get(name) or 0) % size:
            yield f"{what} {size} does not divide the model's {name} {model[name]}"


def _placement(config: Config) -> Iterator[str]:
    per_node, serve, engine = config.actor_num_gpus_per_node, config.rollout_num_gpus, config.rollout_num_gpus_per_engine
    train = config.actor_num_nodes * per_node if per_node else None
    tp, pp, cp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.context_parallel_size
    if train and train % (tp * pp * cp):
        yield f"{train} training devices are no multiple of tensor {tp} x pipeline {pp} x context {cp} parallel = {tp * pp * cp}"
    expert = (config.expert_tensor_parallel_size or tp) * config.expert_model_parallel_size * pp
    if train and config.expert_model_parallel_size > 1 and train % expert:
        yield f"{train} training devices are no multiple of expert tensor x expert x pipeline parallel = {expert}"
    if config.loss_type == "sft" or _saved(config):
        return
    if config.colocate:
        if serve is not None and serve != train:
            yield f"rollout_num_gpus {serve} contradicts colocate: all training devices serve too; leave one of the two out"
        serve = train
    elif serve is None or (per_node is None and not config.debug_rollout_only):
        yield "without --colocate, give --actor-num-gpus-per-node (devices that train) and --rollout-num-gpus (devices that serve)"
    if serve and serve % engine:
        yield f"{serve} serving devices don't divide into engines of rollout_num_gpus_per_engine {engine}"


def _algorithm(config: Config) -> Iterator[str]:
    if config.kl_coef and config.use_kl_loss and config.kl_loss_coef:
        yield f"kl_coef {config.kl_coef:g} and kl_loss_coef {config.kl_loss_coef:g} would count the KL twice: set one of them to 0"
    if config.kl_loss_coef and not config.use_kl_loss:
        yield f"kl_loss_coef {config.kl_loss_coef:g} has no effect without --use-kl-loss: add it, or leave the coefficient out"
    if config.use_dynamic_batch_size and config.max_tokens_per_gpu is None:
        yield "use_dynamic_batch_size needs --max-tokens-per-gpu"
    if config.recompute_granularity == "full" and (config.recompute_method is None or config.recompute_num_layers is None):
        yield "recompute_granularity full needs --recompute-method and --recompute-num-layers (uniform and 1 save most)"
    if config.recompute_granularity != "full" and (config.recompute_method or config.recompute_num_layers):
        yield "recompute_method and recompute_num_layers need --recompute-granularity full"
    if config.over_sampling_batch_size is not None and config.over_sampling_batch_size < config.rollout_batch_size:
        yield (f"over_sampling_batch_size {config.over_sampling_batch_size} is below rollout_batch_size {config.rollout_batch_size}: "
               "it must be at least as many")
    if config.dynamic_sampling_filter_path in NEED_SEVERAL and config.n_samples_per_prompt == 1:
        yield (f"dynamic_sampling_filter_path {config.dynamic_sampling_filter_path} compares the samples of a group, so with n_samples_per_prompt 1 "
               "it drops every group: raise --n-samples-per-prompt, or leave the filter out")
    context = config.rollout_max_context_len
    positions = config.model.get("max_position_embeddings")
    if context and positions and context > positions:
        yield f"rollout_max_context_len {context} is above the model's max_position_embeddings {positions}"
    for name in ("rollout_max_response_len", "eval_max_response_len"):
        if (length := getattr(config, name)) and (limit := context or positions) and length >= limit and config.loss_type != "sft":
            yield f"{name} {length} leaves no room for a prompt in a context of {limit} tokens"


def _optimizer(config: Config) -> Iterator[str]:
    c = config
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(c, name) > c.lr:
            yield f"{name} {getattr(c, name):g} is above lr {c.lr:g}"
    if c.lr_warmup_iters and c.lr_warmup_fraction is not None:
        yield f"lr_warmup_iters {c.lr_warmup_iters} and lr_warmup_fraction {c.lr_warmup_fraction:g} say the same thing: give one of the two"
    if c.lr_decay_style == "WSD" and c.lr_wsd_decay_iters is None:
        yield "lr_decay_style WSD needs --lr-wsd-decay-iters: the steps of its decay"
    if c.lr_decay_style != "WSD":
        own = [n for n in ("lr_wsd_decay_iters", "lr_wsd_decay_style") if _given(c, n)]
        yield from (f"{n} {getattr(c, n)} has no effect without --lr-decay-style WSD" for n in own)
    ends = [n for n in ("start_weight_decay", "end_weight_decay") if getattr(c, n) is not None]
    if c.weight_decay_incr_style == "constant":
        yield from (f"{n} {getattr(c, n):g} has no effect without --weight-decay-incr-style linear or cosine" for n in ends)
    elif len(ends) < 2:
        yield f"weight_decay_incr_style {c.weight_decay_incr_style} needs --start-weight-decay and --end-weight-decay"
    elif c.start_weight_decay > c.end_weight_decay:       # type: ignore[operator]    # both are there
        yield f"start_weight_decay {c.start_weight_decay:g} is above end_weight_decay {c.end_weight_decay:g}"
    if c.async_save and c.save is None:
        yield "async_save needs --save"


NEED_SEVERAL = ("rlmono.rollout.filters.check_reward_nonzero_std",)
"""Filters that drop every group of one sample."""

GROUPED = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
"""Estimators that compare a sample with the others of its group."""


def _estimator(config: Config) -> Iterator[str]:
    name = f"advantage_estimator {config.advantage_estimator}"
    if config.advantage_estimator == "dr_grpo" and config.calculate_per_token_loss:
        yield f"{name} divides the loss by a constant, calculate_per_token_loss by the step's tokens: leave one of the two out"
    if config.advantage_estimator in ("dr_grpo", "rloo") and config.disable_rewards_normalization:
        yield f"{name} is a comparison within the group, which disable_rewards_normalization turns off: leave one of the two out"
    if config.advantage_estimator == "cispo" and config.eps_clip_c is not None:
        yield f"{name} has no dual clip: leave eps_clip_c {config.eps_clip_c:g} out"
    if config.use_tis and config.use_rollout_logprobs:
        yield "use_tis corrects a ratio against the trainer's logprobs, use_rollout_logprobs takes the engine's: leave one of the two out"
    if config.tis_clip_low >= config.tis_clip:
        yield f"tis_clip_low {config.tis_clip_low:g} is not below tis_clip {config.tis_clip:g}"
    if config.use_opd and config.opd_teacher_load is None:
        yield "use_opd needs --opd-teacher-load: the teacher's checkpoint"
    if config.overlong_buffer_len is not None and config.overlong_buffer_len > config.rollout_max_response_len:
        yield (f"overlong_buffer_len {config.overlong_buffer_len} is above rollout_max_response_len {config.rollout_max_response_len}: "
               "every response would be overlong")
    for needed, names in DEPENDENT.items():
        if getattr(config, needed) in (False, None):
            yield from (f"{n} {_shown(getattr(config, n))} has no effect without --{_dashes(needed)}: add it, or leave {n} out"
                        for n in names if _given(config, n))


DEPENDENT = {"use_tis": ("tis_clip", "tis_clip_low", "tis_mode", "tis_level"), "use_opsm": ("opsm_delta",),
             "partial_rollout": ("partial_rollout_max_age", "mask_offpolicy_in_partial_rollout"),
             "use_opd": ("opd_type", "opd_kl_coef", "opd_teacher_load"), "overlong_buffer_len": ("overlong_penalty_factor",),
             "optimizer_cpu_offload": ("overlap_cpu_optimizer_d2h_h2d",)}
"""Option -> options that say how it is done."""


def _given(config: Config, name: str) -> bool:
    return bool(getattr(config, name) != next(f.default for f, _ in options(Config) if f.name == name))


def _teacher(config: Config) -> Iterator[str]:
    """The folders of the other models, and that the teacher speaks the same tokens."""
    for name in ("opd_teacher_load", "critic_load"):
        if (path := getattr(config, name)) is not None and not Path(path).exists():
            yield f"{name} {path} does not exist"
    path = config.opd_teacher_load
    if path is None or not (Path(path) / "config.json").exists():
        return
    try:
        shape = model_shape(path)
    except ConfigError as error:
        yield from (f"opd_teacher_load: {problem}" for problem in error.problems)
        return
    if (mine := config.model.get("vocab_size")) and shape["vocab_size"] != mine:
        yield f"opd_teacher_load {path} has a vocabulary of {shape['vocab_size']} tokens, the model {mine}: the teacher must share it"
    stages, layers = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1), shape["num_layers"]
    if layers != config.model.get("num_layers") and layers % stages:
        yield f"opd_teacher_load {path}: its {layers} layers don't divide into {stages} equal pipeline stages"
    for name in ("num_attention_heads", "ffn_hidden_size"):
        if shape[name] % config.tensor_model_parallel_size:
            yield (f"opd_teacher_load {path}: tensor_model_parallel_size {config.tensor_model_parallel_size} does not divide the teacher's "
                   f"{name} {shape[name]}")
    if shape.get("quantization_config"):
        yield f"opd_teacher_load {path} holds quantised weights: use the bf16 folder"


def _run(config: Config) -> Iterator[str]:
    if config.hf_checkpoint is None:
        yield "--hf-checkpoint is required: the Hugging Face folder of the model"
    if config.num_rollout is None and config.num_epoch is None:
        yield "--num-rollout or --num-epoch is required"
    if config.save is None and config.save_interval is not None:
        yield f"save_interval {config.save_interval} needs --save"
    if config.ref_load is not None and not Path(config.ref_load).exists():
        yield f"ref_load {config.ref_load} does not exist"
    yield from _debug(config)
    for field, _ in options(Config):
        value = getattr(config, field.name)
        if field.name.endswith(("_function_path", "_filter_path", "_rm_path")) and value is not None:
            yield from _function(field.name, value)


def _debug(config: Config) -> Iterator[str]:
    if config.debug_rollout_only and (config.debug_train_only or config.load_debug_rollout_data):
        yield "debug_rollout_only generates, and debug_train_only and load_debug_rollout_data take what is there: leave one of the two out"
    if config.debug_rollout_only and config.loss_type == "sft":
        yield "debug_rollout_only has nothing to do in loss_type sft, which generates nothing"
    if config.debug_train_only and config.load_debug_rollout_data is None:
        yield "debug_train_only needs --load-debug-rollout-data: what to train on"
    if config.load_debug_rollout_data is not None and config.num_rollout is None:
        yield "load_debug_rollout_data needs --num-rollout: how many rollouts to train on"
    for name in ("save_debug_rollout_data", "load_debug_rollout_data"):
        if (template := getattr(config, name)) is not None:
            yield from _template(name, template, needed=name.startswith("save"))


def _template(name: str, template: str, needed: bool) -> Iterator[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        template.format(rollout_id=0)
    except (ValueError, LookupError):
        yield f"{name} {template}: only {{rollout_id}} can be filled in"
        return
    if needed and not fields:
        yield f"{name} {template}: each rollout would overwrite the one before; put {{rollout_id}} into the name"


def _function(name: str, value: str) -> Iterator[str]:
    file, colon, function = value.rpartition(":")
    if colon and not Path(file).is_file():
        yield f"{name} {value}: there is no file {file}"
    elif not colon and not re.fullmatch(r"\w+(\.\w+)+", value):
        yield f"{name} {value} is not of the form module.function or file.py:function"
    elif not colon and find_spec(value.partition(".")[0]) is None:
        yield f"{name} {value}: there is no module {value.partition('.')[0]} here (PYTHONPATH?)"
    elif colon and (defined := _without(Path(file), function)) is not None:
        near = difflib.get_close_matches(function, defined, 3)
        yield f"{name} {value}: {file} has no {function!r}" + (f"; near: {', '.join(near)}" if near else "")


def _without(file: Path, function: str) -> list[str] | None:
    """The functions that a file defines, where another's name is nowhere in it, so that it can't have that one; without running it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if re.search(rf"\b{re.escape(function)}\b|import \*|__getattr__|globals\(", text):
        return None
    return re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE)


def _data(config: Config) -> Iterator[str]:
    if config.prompt_data is None and not _saved(config):
        yield "--prompt-data is required"
    try:
        sets = eval_sets(config)
    except ConfigError as error:
        yield from error.problems
        return
    option = "eval_config" if config.eval_config else "eval_prompt_data"
    if config.eval_config is not None and config.eval_prompt_data:
        yield "eval_config and eval_prompt_data both name sets: give one of the two"
    for s in sets:
        for name, path in (("custom_rm_path", s.custom_rm_path), ("custom_generate_function_path", s.custom_generate_function_path)):
            if path:
                yield from _function(f"eval_config {config.eval_config}: set {s.name!r}: {name}", path)
        if s.rm_type:
            problems = [f"rm_type {s.rm_type} is none of {', '.join(RM_TYPES)}"] if s.rm_type not in RM_TYPES else _reward(s.config(config))
            yield from (f"eval_config {config.eval_config}: set {s.name!r}: {problem}" for problem in problems)
    for name, path in (*(("prompt_data", p) for p in config.prompt_data or ()), *((option, s.path) for s in sets)):
        if not _file(path).exists():
            yield f"{name} {path}: there is no such file" + ("; a slice is written path@[start:end]" if "@" in _file(path).name else "")
    yield from _weights(config)
    if config.eval_interval is not None and not sets:
        yield f"eval_interval {config.eval_interval} needs --eval-prompt-data or --eval-config"
    if config.loss_type == "sft" or _saved(config):
        return
    yield from _reward(config)
    if not (config.rm_type or config.custom_rm_path or config.custom_generate_function_path or _rows_name_reward(config)):
        yield "no reward: give --rm-type or --custom-rm-path, or a rm_type in each prompt's metadata"


def _saved(config: Config) -> bool:
    """Rollouts are read from files."""
    return config.debug_train_only or config.load_debug_rollout_data is not None


def _weights(config: Config) -> Iterator[str]:
    if (weights := config.prompt_data_weights) is None:
        return
    files = len(config.prompt_data or ())
    if len(weights) != files:
        yield f"prompt_data_weights {_shown(weights)} has {len(weights)} value(s) for {files} --prompt-data: give one for each"
    elif min(weights) <= 0:
        yield f"prompt_data_weights {_shown(weights)}: each must be above 0; leave out a file that is not to be used"


def _reward(config: Config) -> Iterator[str]:
    """What the reward of --rm-type needs. Rows that name another are checked when they are read."""
    if config.rm_url is not None and not re.match(r"https?://[^/\s]+", config.rm_url):
        yield f"rm_url {config.rm_url} is not an http:// or https:// address"
    if config.rm_type is None or config.custom_rm_path is not None:
        return
    name, kind = f"rm_type {config.rm_type}", reward_type(config.rm_type)
    if kind.labelled and config.label_key is None:
        yield f"{name} compares with a label: name its key with --label-key"
    if kind.concurrent and config.rm_url is None:
        yield f"{name} needs --rm-url: the address of the reward server"
    if kind.keys and config.reward_key is None:
        yield f"{name} returns a dict: name the key of its number with --reward-key {kind.keys[0]}"
    for key in ("reward_key", "eval_reward_key"):
        if kind.keys and getattr(config, key) not in (None, *kind.keys):
            yield f"{key} {getattr(config, key)}: {name} has {' and '.join(kind.keys)}"


def _rows_name_reward(config: Config) -> bool:
    """Whether the first prompt's metadata names its reward. A file that cannot be read is another check's problem."""
    path = _file(config.prompt_data[0]) if config.prompt_data else None
    if path is None or path.suffix != ".jsonl" or not path.is_file():
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except ValueError:
        return True
    metadata = row.get(config.metadata_key) if isinstance(row, dict) else None
    return isinstance(metadata, dict) and bool(metadata.get("rm_type"))


def _file(path: str) -> Path:
    """The path without its slice `@[a:b]`."""
    return Path(re.sub(r"@\[(-?\d+)?:(-?\d+)?\]$", "", path))


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    _run, _data, _placement, _shape, _experts, _pipeline, _algorithm, _optimizer, _estimator, _teacher)


def _derived(config: Config, plan: BatchPlan) -> Config:
    values: dict[str, Any] = dict(global_batch_size=plan.global_batch_size, num_steps_per_rollout=plan.steps)
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        values["sequence_parallel"] = False
    if config.load_debug_rollout_data is not None:
        values |= dict(debug_train_only=True)
    if config.debug_rollout_only:
        values |= dict(save=None, save_interval=None, load=None)
    if _saved(config) or config.loss_type == "sft":
        values |= dict(eval_prompt_data=None, eval_config=None, eval_interval=None)
    if config.virtual_pipeline_model_parallel_size == 1:
        values["virtual_pipeline_model_parallel_size"] = None
    changed = {name: "derived" for name, value in values.items() if value != getattr(config, name)}
    return dataclasses.replace(config, **values, origin={**config.origin, **changed}, notes=(*config.notes, *_remarks(config, plan)))


def _remarks(config: Config, plan: BatchPlan) -> Iterator[str]:
    for name, off in (("rollout_top_p", 1.0), ("rollout_top_k", -1)):
        if getattr(config, name) != off and config.loss_type != "sft":
            yield f"warning: {name} {getattr(config, name)}: the engine samples from a cut distribution, so the training ratio is wrong"
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        yield "sequence_parallel is off: it needs tensor_model_parallel_size above 1"
    if config.debug_rollout_only and (config.save or config.load):
        yield "debug_rollout_only: the weights are those of hf_checkpoint; save and load are ignored"
    if (_saved(config) or config.loss_type == "sft") and (config.eval_prompt_data or config.eval_config):
        yield "evaluation is ignored: nothing generates"
    if config.use_dynamic_batch_size and config.micro_batch_size != 1:
        yield f"micro_batch_size {config.micro_batch_size} is ignored with use_dynamic_batch_size"
    if config.max_tokens_per_gpu is not None and not config.use_dynamic_batch_size:
        yield f"max_tokens_per_gpu {config.max_tokens_per_gpu} is ignored without use_dynamic_batch_size"
    over_samples = config.dynamic_sampling_filter_path is not None or (config.over_sampling_batch_size or 0) > config.rollout_batch_size
    if config.partial_rollout and not over_samples and config.loss_type != "sft":
        yield ("partial_rollout has nothing to do: without over_sampling_batch_size above rollout_batch_size or dynamic_sampling_filter_path "
               "nothing is aborted")
    if over_samples and config.loss_type == "sft":
        yield "over_sampling_batch_size and dynamic_sampling_filter_path are ignored: SFT samples nothing"
    if (config.eval_prompt_data or config.eval_config) and config.eval_interval is None:
        yield "evaluation runs only before and after training: there is no eval_interval"
    grouped = config.loss_type == "policy_loss" and config.advantage_estimator in GROUPED and not config.disable_rewards_normalization
    if grouped and config.n_samples_per_prompt == 1 and not config.use_opd:
        yield "warning: n_samples_per_prompt 1: an advantage is a comparison within a group, so all of them are 0"
    if config.use_opsm and plan.steps == 1 and not config.use_rollout_logprobs:
        yield "warning: use_opsm leaves nothing out: with one step a rollout the policy is the old one; add --use-rollout-logprobs for the engine's"
    for name, estimators in ESTIMATOR_OPTIONS.items():
        if config.advantage_estimator not in estimators and _given(config, name):
            yield f"{name} is ignored: it belongs to advantage_estimator {' and '.join(estimators)}"
    if config.group_rm and config.custom_rm_path is None:
        yield "group_rm is for functions of --custom-rm-path: the shipped rewards judge each sample by itself"
    if config.num_rollout is not None and config.num_epoch is not None:
        yield f"num_rollout {config.num_rollout} wins over num_epoch {config.num_epoch}"


_RETURNS = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
ESTIMATOR_OPTIONS: dict[str, tuple[str, ...]] = {
    "gamma": _RETURNS,
    **{name: ("ppo",) for name in ("lambd", "value_clip", "critic_load", "critic_lr", "critic_lr_warmup_iters", "num_critic_only_steps")},
    "disable_grpo_std_normalization": ("grpo", "gspo", "cispo"),
}


def _dashes(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
