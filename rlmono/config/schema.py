"""The one typed, frozen configuration of a run.

A field has one name, the name its users know from the flags; it is read from a `.env` file, from
`RLMONO_<NAME>` or from `--<name>` (see `sources.py`). Sections are dataclasses that `Config` inherits,
so every value has a flat name: `args.rollout_batch_size`.

Words for batch sizes, used the same way everywhere:

    prompt    one line of the prompt data
    group     one prompt and its `n_samples_per_prompt` samples
    rollout   `rollout_batch_size` groups, generated in one phase
    step      one optimizer update over `global_batch_size` samples
    pack      one micro-batch: whole samples, concatenated without padding (THD)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Optional

from rlmono.config.option import option
from rlmono.config.rewards import RM_TYPES

ESTIMATORS = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")


@dataclass(frozen=True)
class Run:
    """Where a run lives, and what holds for all of it."""

    run_dir: Optional[str] = option(None, "Folder of logs, metrics, the resolved config and the report. Default: runs/<time>.")
    device: str = option("auto", "What device ranks compute on; auto takes the GPU where there is one.", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "Training and rollout dtype; auto is bfloat16 on GPUs, float32 on CPUs.",
                        choices=("auto", "float32", "bfloat16"))
    transformer_impl: str = option(
        "auto", "Kernels of the trainer's attention and norms on GPUs: rlmono's own, or Transformer Engine's. auto takes the latter where they are "
        "installed and work.", choices=("auto", "local", "transformer_engine"))
    seed: int = option(1234, "Seed of model initialisation and of every rank's generators.")
    deterministic: bool = option(False, "Same run, same bits, also after a kill and resume (CPU): per-request sampling seeds, one thread.")
    dry_run: bool = option(False, "Print and write the resolved config, the rank grid and the batch arithmetic; start nothing.")
    start_timeout_s: float = option(900.0, "Deadline for all ranks to meet and build their engines and trainers.", minimum=1)
    phase_timeout_s: float = option(7200.0, "Deadline for one phase: a whole rollout, train step, update or save.", minimum=1)
    heartbeat_timeout_s: float = option(120.0, "A node, or an engine with requests, is taken for dead when it is silent for so long.", minimum=1)
    debug_rollout_only: bool = option(False, "Generate and evaluate with the weights of --hf-checkpoint, never train; no trainer is started.")
    debug_train_only: bool = option(False, "Train on --load-debug-rollout-data, never generate; no engine is started.")
    save_debug_rollout_data: Optional[str] = option(
        None, "Write each rollout's samples, whole, to this path; {rollout_id} is filled in (python -m rlmono view shows them).")
    load_debug_rollout_data: Optional[str] = option(
        None, "Take each rollout's samples from this path ({rollout_id}) instead of generating them; implies --debug-train-only.")
    check_weight_update_equal: bool = option(
        False, "After every update compare the engine's weights with the trainer's export, bit for bit.")


@dataclass(frozen=True)
class Placement:
    """Which ranks train and which serve. Every node has one host rank besides its device ranks."""

    colocate: bool = option(False, "Train and generate on the same devices, in turn.")
    actor_num_nodes: int = option(1, "Nodes that train.", minimum=1)
    actor_num_gpus_per_node: Optional[int] = option(None, "Training devices a node. Default: all device ranks, when colocated.", minimum=1)
    rollout_num_gpus: Optional[int] = option(None, "Devices that only generate (without --colocate).", minimum=1)
    rollout_num_gpus_per_engine: int = option(1, "Devices of one engine: its tensor-parallel size.", minimum=1)
    offload_train: str = option(
        "auto", "With --colocate, what of the trainer leaves the GPU while engines generate: optimizer is its state, gradients and reference "
        "models; all is the weights too. auto moves as little as the KV cache allows.", choices=("auto", "none", "optimizer", "all"))
    host_memory_gib: Optional[float] = option(
        None, "Host memory of a node for --offload-train, and for the copies of --async-save. Default: what kernel and cgroup call free.", above=0.0)


@dataclass(frozen=True)
class Checkpoint:
    """Weights in, checkpoints out."""

    hf_checkpoint: Optional[str] = option(None, "HF folder: config.json, tokenizer, and weights unless --load or --ref-load has them.")
    ref_load: Optional[str] = option(
        None, "Weights of the reference, and of the actor at the very start: HF folder or torch_dist. Default: --hf-checkpoint.")
    load: Optional[str] = option(None, "Folder of checkpoints to resume from; without a finished one, --ref-load is the start.")
    save: Optional[str] = option(None, "Folder to write checkpoints to.")
    save_interval: Optional[int] = option(
        None, "Save every so many rollouts (and after the last). Default: only after the last.", minimum=1)
    save_hf: Optional[str] = option(None, "Also write HF safetensors with every save, to this path; {rollout_id} is filled in.")
    async_save: bool = option(False, "Write checkpoints in the background: the loop only waits for a copy in host memory, which takes as much of it "
                              "as the checkpoint, and keeps it for the next one (--save-hf is still written before the loop goes on).")
    no_load_optim: bool = option(False, "Load weights only; the optimizer starts fresh.")
    finetune: bool = option(False, "Load weights only; optimizer, schedule and data start fresh at rollout 0.")


@dataclass(frozen=True)
class Data:
    """Prompts."""

    prompt_data: Optional[tuple[str, ...]] = option(
        None, "Prompts: jsonl (one JSON object a line), parquet, or a folder of a Hugging Face dataset; `path@[a:b]` takes a slice of the rows. "
        "Several are mixed.")
    prompt_data_weights: Optional[tuple[float, ...]] = option(
        None, "The share of each of several --prompt-data in what is given out. Default: its share of the rows.")
    lazy_data_above_mb: int = option(
        128, "A prompt file of more than so many MB is read as it is needed: rows are checked when their turn comes, and shuffled by blocks.",
        minimum=0)
    input_key: str = option("input", "Key of the prompt: a string, or a list of OpenAI messages.")
    label_key: Optional[str] = option(None, "Key of the label, for the reward.")
    metadata_key: str = option("metadata", "Key of a sample's metadata (a JSON object).")
    tool_key: Optional[str] = option(None, "Key of the tools for the chat template.")
    apply_chat_template: bool = option(False, "Render prompts with the tokenizer's chat template.")
    rollout_shuffle: bool = option(False, "Shuffle prompts each epoch, by rollout_seed + epoch.")
    rollout_seed: int = option(42, "Seed of prompt order and of sampling.")
    rollout_max_prompt_len: Optional[int] = option(None, "Prompts with more tokens are left out (counted).", minimum=1)
    skip_bad_rows: bool = option(False, "Leave bad rows of the prompt data out, counted and listed, instead of refusing it.")


@dataclass(frozen=True)
class Rollout:
    """Generation."""

    num_rollout: Optional[int] = option(None, "How many rollouts to run; wins over --num-epoch.", minimum=1)
    num_epoch: Optional[int] = option(None, "How many times to go through the prompts.", minimum=1)
    rollout_batch_size: int = option(32, "Prompts (groups) a rollout.", minimum=1)
    n_samples_per_prompt: int = option(1, "Samples a prompt.", minimum=1)
    rollout_temperature: float = option(1.0, "Sampling temperature; logits are divided by it in training too.", minimum=1e-6)
    rollout_top_p: float = option(
        1.0, "Nucleus sampling. Below 1 the training ratio is wrong (a warning says so).", minimum=0.0, maximum=1.0)
    rollout_top_k: int = option(-1, "Top-k sampling; -1 is off. Otherwise the training ratio is wrong (a warning says so).", minimum=-1)
    rollout_max_response_len: int = option(1024, "New tokens a response at most.", minimum=1)
    rollout_max_context_len: Optional[int] = option(None, "Prompt and response together at most. Default: the model's.", minimum=1)
    rollout_stop: Optional[tuple[str, ...]] = option(None, "Strings that end a response.")
    rollout_stop_token_ids: Optional[tuple[int, ...]] = option(
        None, "Token ids that end a response, besides the model's end-of-sequence ids.")
    rollout_skip_special_tokens: bool = option(False, "Leave special tokens out of the text that rewards see.")
    sglang_server_concurrency: int = option(512, "Requests in flight at one engine at most.", minimum=1)
    custom_generate_function_path: Optional[str] = option(
        None, "`module.function` or `file.py:function`: async (args, sample, sampling_params, state) -> sample, or several.")
    generate_timeout_s: float = option(3600.0, "Deadline of one call of the generate function; a slower one counts as failed.", minimum=0.01)
    rollout_max_failed_share: float = option(
        0.1, "Samples that may fail in the generate function, as a share of a rollout or an evaluation; with more the run ends.",
        minimum=0.0, maximum=1.0)
    over_sampling_batch_size: Optional[int] = option(
        None, "Prompts to submit at once; generation stops when --rollout-batch-size groups count. Default: as many as that.", minimum=1)
    dynamic_sampling_filter_path: Optional[str] = option(
        None, "`module.function` or `file.py:function`: (args, samples, **kw) -> bool, or keep and reason; a group that it drops does not count. "
        "rlmono.rollout.filters has check_reward_nonzero_std and others.")
    max_over_sampling_batches: int = option(
        64, "Batches that one rollout submits at most; a filter that still drops too much ends the run with an error.", minimum=1)
    partial_rollout: bool = option(False, "Samples that are aborted keep their tokens, and the next rollout goes on with them.")
    partial_rollout_max_age: Optional[int] = option(
        None, "A sample with tokens of weights more than so many versions (rollouts) old begins anew. Default: no bound.", minimum=0)
    mask_offpolicy_in_partial_rollout: bool = option(False, "Do not train on tokens that older weights have sampled.")
    buffer_filter_path: Optional[str] = option(
        None, "`module.function` or `file.py:function`: (args, rollout_id, buffer, num_samples) -> groups that it takes out of the data buffer. "
        "Default: the first ones.")


@dataclass(frozen=True)
class Reward:
    """Rewards; they run in worker processes of the host rank."""

    rm_type: Optional[str] = option(None, "Reward by name; boxed_ before it gives it what is in the response's last box.", choices=RM_TYPES)
    custom_rm_path: Optional[str] = option(
        None, "`module.function` or `file.py:function`, async or not: (args, sample, **kw) -> float or dict.")
    reward_key: Optional[str] = option(None, "Key of the number when the reward is a dict.")
    eval_reward_key: Optional[str] = option(None, "The same in evaluations. Default: --reward-key.")
    group_rm: bool = option(False, "Call the custom reward once a group: (args, samples, **kw) -> a list of float or dict.")
    rm_url: Optional[str] = option(None, "The reward server of remote_rm; it gets {prompt, response, label} and answers a number or dict.")
    rm_max_retries: int = option(10, "Further tries of remote_rm after one that failed, all within --reward-timeout-s.", minimum=0)
    reward_timeout_s: float = option(30.0, "Deadline of one call of the reward; a slower one counts as failed, with reward 0.", minimum=0.01)
    reward_workers: int = option(
        0, "Worker processes for rewards on each host rank. 0: one for every four cores that it may use, from 1 to 8.", minimum=0)
    reward_concurrency: int = option(64, "Calls of an async reward (remote_rm is one) at a time on each host rank at most.", minimum=1)
    reward_memory_limit_gb: float = option(
        4.0, "Memory (GiB) that a reward worker may write to; beyond it the sample counts as failed. 0: no limit.", minimum=0.0)


@dataclass(frozen=True)
class Eval:
    """Evaluation: before training, at intervals, and at the end."""

    eval_interval: Optional[int] = option(None, "Evaluate every so many rollouts.", minimum=1)
    eval_prompt_data: Optional[tuple[str, ...]] = option(None, "name path [name path …]; a path alone takes the file's name.")
    eval_config: Optional[str] = option(
        None, "YAML file of eval sets, each with a name, a path and what differs for it (docs/rollout.md).")
    eval_input_key: Optional[str] = option(None, "Default: --input-key.")
    eval_label_key: Optional[str] = option(None, "Default: --label-key.")
    n_samples_per_eval_prompt: int = option(1, "Samples a prompt; with several, pass@k is reported for k = 2, 4, 8 and so on.", minimum=1)
    eval_temperature: Optional[float] = option(None, "Default: the rollout's. 0 is greedy.", minimum=0.0)
    eval_top_p: Optional[float] = option(None, "Default: the rollout's.", minimum=0.0, maximum=1.0)
    eval_top_k: Optional[int] = option(None, "Default: the rollout's.", minimum=-1)
    eval_max_response_len: Optional[int] = option(None, "Default: the rollout's.", minimum=1)
    skip_eval_before_train: bool = option(False, "No evaluation before the first rollout.")


@dataclass(frozen=True)
class Batch:
    """From samples to steps and packs."""

    global_batch_size: Optional[int] = option(
        None, "Samples a step. Default: rollout_batch_size * n_samples_per_prompt / num_steps_per_rollout.", minimum=1)
    num_steps_per_rollout: Optional[int] = option(None, "Optimizer steps a rollout. Default: from --global-batch-size, or 1.", minimum=1)
    micro_batch_size: int = option(1, "Samples a pack without --use-dynamic-batch-size.", minimum=1)
    use_dynamic_batch_size: bool = option(False, "Fill packs up to --max-tokens-per-gpu; loss and gradients stay the same.")
    max_tokens_per_gpu: Optional[int] = option(
        None, "Tokens a pack (times context-parallel size); a longer sample is a pack of its own.", minimum=1)
    balance_data: bool = option(False, "Deal packs to data-parallel ranks by estimated FLOPs (Karmarkar-Karp).")


@dataclass(frozen=True)
class Algorithm:
    """Losses and advantages; what each one computes stands beside its function in rlmono/trainer."""

    loss_type: str = option(
        "policy_loss", "policy_loss trains on samples of the policy; sft on the data's own answers.", choices=("policy_loss", "sft"))
    advantage_estimator: str = option(
        "grpo", "How advantages are made from rewards. gspo and cispo take grpo's and have a loss of their own; dr_grpo divides the loss by "
        "--rollout-max-response-len instead of lengths; reinforce_plus_plus and its baseline form are whitened; ppo trains a critic.",
        choices=ESTIMATORS)
    disable_grpo_std_normalization: bool = option(False, "Advantages are r - mean, without the division by the group's std.")
    disable_rewards_normalization: bool = option(False, "Advantages are the rewards themselves, not compared within their group.")
    normalize_advantages: bool = option(False, "Whiten advantages over all tokens of the rollout (reinforce_plus_plus always does).")
    gamma: float = option(1.0, "Discount a token, in reinforce_plus_plus and ppo.", minimum=0.0, maximum=1.0)
    lambd: float = option(1.0, "Lambda of generalised advantage estimation, in ppo.", minimum=0.0, maximum=1.0)
    eps_clip: float = option(0.2, "PPO clip range below 1.", minimum=0.0)
    eps_clip_high: Optional[float] = option(None, "PPO clip range above 1. Default: --eps-clip.", minimum=0.0)
    eps_clip_c: Optional[float] = option(None, "Dual clip for negative advantages: the loss is at most c * |A|.", above=1.0)
    kl_coef: float = option(0.0, "KL penalty in the reward.", minimum=0.0)
    use_kl_loss: bool = option(False, "KL to the reference in the loss; loads the reference (at coefficient 0 its KL is reported).")
    kl_loss_coef: float = option(0.0, "Coefficient of the KL loss.", minimum=0.0)
    kl_loss_type: str = option("k1", "Estimator of the KL (Schulman 2020).", choices=("k1", "k2", "k3", "low_var_kl"))
    entropy_coef: float = option(0.0, "Coefficient of the entropy bonus.", minimum=0.0)
    calculate_per_token_loss: bool = option(False, "Mean over the step's tokens instead of the mean of per-sample means.")
    use_rollout_logprobs: bool = option(False, "Ratio against the engine's logprobs instead of recomputed ones.")
    use_tis: bool = option(False, "Weigh each token's policy loss by p_train / p_rollout, for the mismatch of the two (TIS, MIS, IcePop).")
    tis_clip: float = option(2.0, "Upper bound of that ratio.", above=0.0)
    tis_clip_low: float = option(0.0, "Lower bound of that ratio.", minimum=0.0)
    tis_mode: str = option("truncate", "A ratio out of bounds: truncate sets it to the bound (TIS); mask to 0 (on tokens IcePop, on sequences MIS).",
                           choices=("truncate", "mask"))
    tis_level: str = option("token", "The ratio of a token, of its sequence (product), or of its sequence a token (geometric mean).",
                            choices=("token", "sequence", "geometric"))
    use_opsm: bool = option(False, "Leave samples with a negative advantage out whose mean log p_old - log p is above --opsm-delta. "
                            "p_old is the ratio's: the engine's with --use-rollout-logprobs.")
    opsm_delta: float = option(1e-4, "Bound of --use-opsm.", minimum=0.0)
    use_opd: bool = option(False, "On-policy distillation: advantages less --opd-kl-coef * (log p - log p_teacher).")
    opd_type: str = option("megatron", "Where the teacher runs: in the trainers, or as an engine.", choices=("megatron", "sglang"),
                           later_choices={"sglang": "a teacher in an engine"})
    opd_kl_coef: float = option(1.0, "Coefficient of --use-opd.", minimum=0.0)
    opd_teacher_load: Optional[str] = option(
        None, "The teacher: an HF folder with the same vocabulary, or torch_dist checkpoints of the same model.")
    overlong_buffer_len: Optional[int] = option(
        None, "The last so many tokens of --rollout-max-response-len cost reward, linearly up to --overlong-penalty-factor (DAPO).", minimum=1)
    overlong_penalty_factor: float = option(1.0, "Cost of a response of full length.", minimum=0.0)
    value_clip: float = option(0.2, "The critic's values may move so far from those of before the rollout's first step.", above=0.0)
    critic_load: Optional[str] = option(
        None, "Where the critic starts: HF folder or torch_dist; its head is new where there is none. Default: as the actor.")
    critic_lr: Optional[float] = option(None, "Peak learning rate of the critic. Default: --lr.", minimum=0.0)
    critic_lr_warmup_iters: int = option(0, "Steps of linear warm-up of the critic.", minimum=0)
    num_critic_only_steps: int = option(0, "Rollouts at the start that train only the critic.", minimum=0)


@dataclass(frozen=True)
class Parallel:
    """Megatron's layout of the training ranks."""

    tensor_model_parallel_size: int = option(1, "Tensor parallel.", minimum=1)
    sequence_parallel: bool = option(False, "Sequence parallel in the norms, with tensor parallel.")
    pipeline_model_parallel_size: int = option(1, "Pipeline parallel.", minimum=1)
    virtual_pipeline_model_parallel_size: Optional[int] = option(
        None, "Model chunks a pipeline stage.", minimum=1)
    decoder_first_pipeline_num_layers: Optional[int] = option(
        None, "Layers of the first stage.", minimum=1)
    decoder_last_pipeline_num_layers: Optional[int] = option(
        None, "Layers of the last stage.", minimum=1)
    context_parallel_size: int = option(1, "Context parallel.", minimum=1)
    expert_model_parallel_size: int = option(1, "Expert parallel.", minimum=1)
    expert_tensor_parallel_size: Optional[int] = option(
        None, "Tensor parallel of the experts.", minimum=1)
    recompute_granularity: Optional[str] = option(
        None, "Recompute activations in the backward pass; auto recomputes as many whole layers as memory asks.",
        choices=("full", "selective", "auto"))
    recompute_method: Optional[str] = option(None, "With full recompute.", choices=("uniform", "block"))
    recompute_num_layers: Optional[int] = option(None, "With full recompute.", minimum=1)


@dataclass(frozen=True)
class Optimizer:
    """Adam and its schedule, over Megatron's distributed optimizer."""

    optimizer: str = option("adam", "The optimizer.", choices=("adam",))
    lr: float = option(1e-6, "Peak learning rate.", minimum=0.0)
    min_lr: float = option(0.0, "Final learning rate of a decay.", minimum=0.0)
    lr_decay_style: str = option("constant", "Shape of the schedule; WSD stays at the peak, and decays in the last --lr-wsd-decay-iters steps.",
                                choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"))
    lr_warmup_iters: int = option(0, "Steps of linear warm-up.", minimum=0)
    lr_warmup_fraction: Optional[float] = option(None, "Warm-up as a part of the decay's steps, instead.", minimum=0.0, below=1.0)
    lr_warmup_init: float = option(0.0, "Learning rate that the warm-up begins from.", minimum=0.0)
    lr_decay_iters: Optional[int] = option(None, "Steps until min_lr. Default: all steps of the run.", minimum=1)
    lr_wsd_decay_style: str = option("exponential", "Shape of the decay of WSD.", choices=("exponential", "linear", "cosine", "minus_sqrt"))
    lr_wsd_decay_iters: Optional[int] = option(None, "Steps of the decay of WSD.", minimum=1)
    weight_decay: float = option(0.01, "Decoupled weight decay; norms and biases have none.", minimum=0.0)
    weight_decay_incr_style: str = option("constant", "How weight decay grows over the run, from --start-weight-decay to --end-weight-decay.",
                                          choices=("constant", "linear", "cosine"))
    start_weight_decay: Optional[float] = option(None, "Weight decay before the first step.", minimum=0.0)
    end_weight_decay: Optional[float] = option(None, "Weight decay of the last step.", minimum=0.0)
    adam_beta1: float = option(0.9, "Decay of Adam's first moment.", minimum=0.0, below=1.0)
    adam_beta2: float = option(0.999, "Decay of Adam's second moment.", minimum=0.0, below=1.0)
    adam_eps: float = option(1e-8, "Term in Adam's denominator.", above=0.0)
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 is off.", minimum=0.0)
    optimizer_cpu_offload: bool = option(False, "Adam's states and fp32 weights in host memory, computed on by the CPU (on GPUs).")
    overlap_cpu_optimizer_d2h_h2d: bool = option(False, "With --optimizer-cpu-offload: copy gradients and weights while the CPU computes.")
    use_precision_aware_optimizer: bool = option(False, "Megatron's name for a part of --optimizer-cpu-offload, which has it anyway. On GPUs without "
                                                 "that it needs Transformer Engine's Adam, and is refused.")


@dataclass(frozen=True)
class Observe:
    """Metrics and trackers."""

    use_tensorboard: bool = option(False, "Write TensorBoard events to <run_dir>/tensorboard.")
    use_wandb: bool = option(False, "Log to Weights & Biases; offline where there is no network (WANDB_MODE).")
    wandb_project: str = option("rlmono", "Project at Weights & Biases.")
    wandb_group: Optional[str] = option(None, "Group at Weights & Biases.")
    wandb_name: Optional[str] = option(None, "Name of the run at Weights & Biases. Default: the run directory's name.")
    log_samples: int = option(4, "Samples of each rollout to write as readable text (samples/*.jsonl; python -m rlmono view).", minimum=0)
    log_eval_samples: Optional[int] = option(None, "The same of each evaluation set. Default: all.", minimum=0)
    profile: bool = option(False, "Write a trace of every device rank to <run_dir>/profile: open it in ui.perfetto.dev or chrome://tracing.")
    profile_rollouts: tuple[int, ...] = option((1,), "Rollouts that --profile traces, counted from 0.")
    profile_phase_s: float = option(2.0, "Seconds of each phase, from its start, in which --profile traces operators and kernels, and of each "
                                         "optimizer's step; the rest, thousands of steps alike, is one bar.", above=0.0)
    progress: str = option("auto", "Live progress on the controller's console; auto is rich on a terminal, plain lines elsewhere.",
                           choices=("auto", "rich", "plain", "none"))


SECTIONS = (Run, Placement, Checkpoint, Data, Rollout, Reward, Eval, Batch, Algorithm, Parallel, Optimizer, Observe)


@dataclass(frozen=True)
class Config(Run, Placement, Checkpoint, Data, Rollout, Reward, Eval, Batch, Algorithm, Parallel, Optimizer, Observe):
    """All sections, flat. `model` is the shape (from the HF config, with overrides); `sglang` and `megatron` are
    the arguments that go through by name. `origin` says where each value came from, by its flat name or as `model.x`,
    `sglang.x`, `megatron.x`; `notes` is what was translated, ignored or is worth a warning."""

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sglang: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    megatron: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
