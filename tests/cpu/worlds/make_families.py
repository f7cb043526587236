"""Tiny random checkpoints of every model family, with transformers' logprobs of the samples: `make_families.py FOLDER`.

A process of its own: transformers must not be loaded beside Megatron's overrides or in a process group.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
# Multiples of 8, so that neither sequence nor context parallelism has to pad, and experts can be counted.
LENGTHS = (16, 8, 64, 32, 24, 40, 8, 16)


def sequences() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in LENGTHS]


def response_of(length: int) -> int:
    return length // 2


def configs() -> dict[str, Any]:
    import transformers as tf
    base: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=128,
                                vocab_size=VOCABULARY, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=512, eos_token_id=2,
                                bos_token_id=None, pad_token_id=0)
    experts: dict[str, Any] = dict(n_routed_experts=8, moe_intermediate_size=48, n_shared_experts=1, first_k_dense_replace=1,
                                   routed_scaling_factor=2.5)
    llama3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=8192)
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
                original_max_position_embeddings=64)
    latent: dict[str, Any] = dict(q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24)
    odd = base | dict(vocab_size=VOCABULARY + 1)        # two tensor-parallel ranks pad it
    without = {k: v for k, v in base.items() if k != "head_dim"}
    # Norms on latents have another than all others.
    other_eps = dict(rms_norm_eps=1e-3)
    return {
        "qwen2": tf.Qwen2Config(**without), "qwen3": tf.Qwen3Config(**odd), "qwen3_tied": tf.Qwen3Config(**odd | dict(tie_word_embeddings=True)),
        "qwen3_five": tf.Qwen3Config(**base | dict(num_hidden_layers=5)),
        "llama": tf.LlamaConfig(**base | dict(max_position_embeddings=131072), rope_parameters=llama3),
        "qwen3_moe": tf.Qwen3MoeConfig(**base, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True),
        "qwen3_moe_presoftmax": tf.Qwen3MoeConfig(**base, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=False),
        "glm4_moe": tf.Glm4MoeConfig(**base, **experts, attention_bias=True, use_qk_norm=True, num_experts_per_tok=2, partial_rotary_factor=0.5),
        "deepseek_v3": tf.DeepseekV3Config(**without | dict(num_key_value_heads=4) | other_eps, **experts, **latent, num_experts_per_tok=4, n_group=4,
                                           topk_group=2, rope_parameters=yarn),
        "moonlight": tf.DeepseekV3Config(**without | dict(num_key_value_heads=4) | other_eps, **experts, **latent | dict(q_lora_rank=None),
                                         num_experts_per_tok=2, n_group=1, topk_group=1),
    }


def main(folder: Path) -> None:
    import transformers as tf
    for name, config in configs().items():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float()
        for parameter_name, p in model.named_parameters():
            torch.nn.init.normal_(p, *((1.0, 0.2) if "norm" in parameter_name else (0.0, 0.1)))
        for buffer_name, b in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                torch.nn.init.normal_(b, 0.0, 0.05)
        model.eval().save_pretrained(folder / name)
        torch.save([log_probs(model, ids) for ids in sequences()], folder / name / "log_probs.pt")


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    tokens, r = torch.tensor(ids), response_of(len(ids))
    log_p = model(tokens[None]).logits[0].log_softmax(-1)
    return log_p[len(ids) - r - 1:-1].gather(1, tokens[-r:, None])[:, 0]


if __name__ == "__main__":
    from rlmono.engine.compat import prepare_cpu
    prepare_cpu()
    main(Path(sys.argv[1]))
