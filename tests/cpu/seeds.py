"""The argument lists that users come with, as they paste them, and HF configs of the models' shapes.

`{root}` stands for their folder. Where a list says "…" or takes its data from another example, it is filled in from there.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rlmono.config.schema import Config

GRPO = """
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
"""
ADAM = "--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98"
CPU_ADAM = ADAM + " --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer"
MATH = """
   --prompt-data {root}/dapo-math-17k/dapo-math-17k.jsonl
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type deepscaler
   --num-rollout 3000
   --n-samples-per-prompt 8
   --rollout-temperature 0.8
   --balance-data
"""
LARGE = MATH + """
   --rollout-batch-size 128
   --rollout-max-response-len 32768
   # sample twice the batch, and drop groups of equal rewards
   --over-sampling-batch-size 256
   --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
   --num-steps-per-rollout 4
"""
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

QWEN3_4B_MODEL = """
   --swiglu
   --num-layers 36
   --hidden-size 2560
   --ffn-hidden-size 9728
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --use-rotary-position-embeddings
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   --rotary-base 1000000
   --vocab-size 151936
   --kv-channels 128
   --qk-layernorm
"""
QWEN3_4B = MATH + GRPO + ADAM + """
   --hf-checkpoint {root}/Qwen3-4B
   --ref-load {root}/Qwen3-4B_torch_dist
   --load {root}/Qwen3-4B_slime/
   --save {root}/Qwen3-4B_slime/
   --save-interval 20
   --rollout-batch-size 32
   --rollout-max-response-len 8192
   --num-steps-per-rollout 1
   --eval-interval 5
   --eval-prompt-data {root}/aime-2024/aime-2024.jsonl
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 16384
   --eval-top-p 0.7
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   # --micro-batch-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
   --rollout-num-gpus-per-engine 2
   --sglang-mem-fraction-static 0.7
""" + RECOMPUTE
QWEN3_4B_COLOCATED = QWEN3_4B + " --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate"
QWEN3_4B_DISAGGREGATED = QWEN3_4B + """
   --actor-num-nodes 1
   --actor-num-gpus-per-node 2
   --rollout-num-gpus 6
   --sglang-server-concurrency 160
   --sglang-cuda-graph-bs 1 2 4 8 16 24 32 40
   --sglang-log-level warning
"""
QWEN3_4B_DYNAMIC_SAMPLING = QWEN3_4B_COLOCATED + """
   --over-sampling-batch-size 64
   --dynamic-sampling-filter-path
   slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
   --partial-rollout
"""

GLM_BASE = LARGE + GRPO + CPU_ADAM + """
   --load {root}/GLM-4.5-355B-A32B_slime/
   --save {root}/GLM-4.5-355B-A32B_slime/
   --save-interval 20
   --actor-num-nodes 8 --actor-num-gpus-per-node 8 --colocate
   --tensor-model-parallel-size 8
   --sequence-parallel
   --pipeline-model-parallel-size 4
   --context-parallel-size 2
   --expert-model-parallel-size 16
   --expert-tensor-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --rollout-num-gpus-per-engine 32
   --sglang-mem-fraction-static 0.7
   --sglang-enable-dp-attention
   --moe-enable-deepep
   --moe-token-dispatcher-type flex
""" + RECOMPUTE
GLM = GLM_BASE + " --hf-checkpoint {root}/GLM-4.5-355B-A32B --sglang-dp-size 4"
GLM_FP8 = GLM_BASE + """
   --hf-checkpoint {root}/GLM-4.5-355B-A32B-FP8/
   --sglang-dp-size 32
   --sglang-ep-size 32
   --sglang-moe-dense-tp-size 1
   --sglang-enable-dp-lm-head
   --sglang-cuda-graph-bs 1 2 4 8 """ + " ".join(str(n) for n in range(16, 129, 8)) + """
   --sglang-moe-a2a-backend deepep
   --sglang-deepep-mode auto
"""

DEEPSEEK_R1 = LARGE + GRPO + CPU_ADAM + """
   --hf-checkpoint {root}/DeepSeek-R1/
   #--hf-checkpoint {root}/DeepSeek-R1-bf16/
   --ref-load {root}/DeepSeek-R1_torch_dist/
   --load {root}/DeepSeek-R1_slime/
   --save {root}/DeepSeek-R1_slime/
   --save-interval 20
   --actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate
   --tensor-model-parallel-size 8
   --sequence-parallel
   --pipeline-model-parallel-size 4
   --context-parallel-size 4
   --expert-model-parallel-size 32
   --expert-tensor-parallel-size 1
   --decoder-last-pipeline-num-layers 13
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --rollout-num-gpus-per-engine 64
   --sglang-mem-fraction-static 0.6
   --sglang-enable-ep-moe
   --sglang-enable-dp-attention
   --sglang-dp-size 8
   --sglang-moe-dense-tp-size 1
   --sglang-enable-dp-lm-head
   --sglang-disable-radix-cache
   --sglang-enable-deepep-moe
   --sglang-deepep-mode auto
   --sglang-server-concurrency 1024
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   # --attention-backend flash
   --moe-enable-deepep
   --moe-token-dispatcher-type flex
""" + RECOMPUTE

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
HF_QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "max_position_embeddings": 40960,
}
HF_GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "num_hidden_layers": 92, "hidden_size": 5120, "intermediate_size": 12288,
    "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552, "rope_theta": 1000000,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True, "use_qk_norm": True,
    "n_routed_experts": 160, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 1536, "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "max_position_embeddings": 131072,
}
HF_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "rope_theta": 10000, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 4096},
    "tie_word_embeddings": False, "attention_bias": False, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "max_position_embeddings": 163840,
    "quantization_config": FP8,
}
FOLDERS = {"Qwen3-4B": HF_QWEN3_4B, "GLM-4.5-355B-A32B": HF_GLM, "GLM-4.5-355B-A32B-FP8": {**HF_GLM, "quantization_config": FP8},
           "DeepSeek-R1": HF_DEEPSEEK}


def make_root(root: Path) -> Path:
    """A folder with what the lists name: HF folders (config only), reference checkpoints, prompts."""
    for name, config in FOLDERS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    for name in ("Qwen3-4B_torch_dist", "DeepSeek-R1_torch_dist"):
        (root / name).mkdir()
    for name in ("dapo-math-17k", "aime-2024"):
        (root / name).mkdir()
        (root / name / f"{name}.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1 + 1 ="}], "label": "2"}) + "\n")
    return root


def words(seed: str, root: Path) -> list[str]:
    """The list as a shell hands it to a program, comments left out."""
    return shlex.split(seed.format(root=root), comments=True)


def outcome(config: Config) -> dict[str, Any]:
    """All of a config's values, without the paths of checkpoints and without sources and remarks."""
    left_out = ("load", "save", "ref_load", "origin", "notes")
    return {name: value.rstrip("/") if name == "hf_checkpoint" else value for name, value in vars(config).items() if name not in left_out}
