"""A checkpoint with random weights, the quickstart's tokenizer and a prompt file: `python tests/bench/random_model.py NAME DIR`.

NAME is a real shape (qwen3-8b, qwen3-4b, qwen3-1.7b, qwen3-0.6b) for measurements, or a small model of another family (moe, glm, deepseek) to
compare trainer and engine. It generates noise, at the speed of the real model.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlmono.models.registry import family, shape_from_hf
from rlmono.quickstart import make

COMMON: dict[str, Any] = dict(head_dim=128, max_position_embeddings=40960, initializer_range=0.02, rms_norm_eps=1e-6, dtype="bfloat16")
SMALL = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, vocab_size=1024,
             tie_word_embeddings=False)
# 24: for powers of two SGLang takes a FlashInfer kernel, which is not always installed.
EXPERTS = dict(n_routed_experts=24, num_experts_per_tok=4, moe_intermediate_size=256, n_shared_experts=1, first_k_dense_replace=1,
               routed_scaling_factor=2.5, norm_topk_prob=True)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                     vocab_size=151936, tie_word_embeddings=False),
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                     vocab_size=151936, tie_word_embeddings=True),
    "qwen3-1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       vocab_size=151936, tie_word_embeddings=True),
    "qwen3-0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       vocab_size=151936, tie_word_embeddings=True),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
                 tie_word_embeddings=True),
    "moe": SMALL | dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=16, num_experts_per_tok=4,
                        moe_intermediate_size=256, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "glm": SMALL | EXPERTS | dict(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", attention_bias=True, use_qk_norm=True,
                                  partial_rotary_factor=0.5, n_group=1, topk_group=1, rms_norm_eps=1e-5),
    "deepseek": SMALL | EXPERTS | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", num_key_value_heads=8, n_group=4, topk_group=2, q_lora_rank=256,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, scoring_func="sigmoid", topk_method="noaux_tc",
        moe_layer_freq=1, rope_theta=10000.0,
        rope_scaling=dict(type="yarn", rope_type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
                          original_max_position_embeddings=4096)),
}


def main(name: str, folder: Path) -> None:
    """Write `folder`/model and `folder`/prompts.jsonl."""
    with tempfile.TemporaryDirectory() as tmp:
        make(Path(tmp) / "qs", seed=1)
        shutil.copytree(Path(tmp) / "qs" / "model", folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    base = json.loads((folder / "model" / "config.json").read_text())
    config = {**base, **COMMON, **SHAPES[name]}
    if name == "deepseek":
        config.pop("head_dim")
        config.pop("rope_parameters", None)
    (folder / "model" / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(folder / "model", config)
    draw = random.Random(0)
    rows = [{"messages": [{"role": "user", "content": "".join(draw.choices("0123456789+*", k=draw.randrange(100, 140)))}], "label": "1"}
            for _ in range(2048)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def _write_weights(folder: Path, config: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for t in family(config["architectures"][0]).tensors(shape_from_hf(config)):
        for hf_name in t.hf_names:
            tensors[hf_name] = _tensor(hf_name, config, generator, device)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor(name: str, c: dict[str, Any], generator: torch.Generator, device: str) -> torch.Tensor:
    shape = _shape(name, c)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    if "e_score_correction_bias" in name:
        return torch.zeros(shape, dtype=torch.float32)
    return (torch.randn(shape, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()


def _shape(name: str, c: dict[str, Any]) -> tuple[int, ...]:
    h, d, heads = c["hidden_size"], c.get("head_dim", 0), c["num_attention_heads"]
    f = c["moe_intermediate_size"] if "experts" in name else c["intermediate_size"]
    experts = c.get("n_routed_experts", c.get("num_experts", 0))
    rope, nope, v = (c.get(k, 0) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    q_rank, kv_rank = c.get("q_lora_rank", 0), c.get("kv_lora_rank", 0)
    shapes = {
        "embed_tokens": (c["vocab_size"], h), "lm_head": (c["vocab_size"], h), "q_a_proj": (q_rank, h), "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (nope + rope), q_rank), "kv_a_proj_with_mqa": (kv_rank + rope, h), "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + v), kv_rank), "q_proj": (heads * d, h), "k_proj": (c["num_key_value_heads"] * d, h),
        "v_proj": (c["num_key_value_heads"] * d, h), "o_proj": (h, heads * (v or d)), "gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f),
        "q_norm": (d,), "k_norm": (d,), "mlp.gate.weight": (experts, h), "e_score_correction_bias": (experts,)}
    found = next((s for key, s in shapes.items() if key in name), (h,))
    return (found[0],) if name.endswith("bias") else found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
