"""Tiny models with random weights of every family, as transformers writes them, and what to compare folders with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 97         # odd, so that two tensor-parallel ranks pad it
FLOAT32 = "e_score_correction_bias"
PREDICTION = ("glm", "deepseek")
"""Families that are published with a layer for next-token prediction after the last."""
FAMILIES = ("qwen3-tied", "qwen3", "qwen2", "moe", "glm", "deepseek")

Tensors = dict[str, torch.Tensor]


def make_family(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, files: int = 2, **changes: Any) -> Path:
    """A folder as it would be downloaded, with weights in `files` files. Not in a process with Megatron's overrides or a process group."""
    from rlmono.engine.compat import prepare_cpu
    prepare_cpu()           # or transformers' models can't be imported beside a torchvision for GPUs
    import transformers
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(_config(name, changes)).float()
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in key else 0.0, 0.1)
    for key, b in model.named_buffers():
        if key.endswith(FLOAT32):
            torch.nn.init.normal_(b, 0.0, 0.05)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name in PREDICTION:
        tensors |= _prediction_layer(tensors, model.config.num_hidden_layers)
    write_folder(folder, {k: t if k.endswith(FLOAT32) else t.to(dtype) for k, t in tensors.items()}, files)
    (folder / "tokenizer_config.json").write_text('{"a": "tokenizer"}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return folder


def _prediction_layer(tensors: Tensors, layer: int) -> Tensors:
    """A whole layer after the last, its projection and norms, and copies of embeddings and head."""
    generator = torch.Generator().manual_seed(layer)
    last, new = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    hidden = tensors["model.norm.weight"].shape[0]
    own = {"eh_proj.weight": (hidden, 2 * hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,), "shared_head.norm.weight": (hidden,),
           "shared_head.head.weight": (VOCABULARY, hidden), "embed_tokens.weight": (VOCABULARY, hidden)}
    shapes = {k.removeprefix(last): t.shape for k, t in tensors.items() if k.startswith(last)} | own
    return {new + k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def write_folder(folder: Path, tensors: Tensors, files: int = 1) -> None:
    """Weights as one file, or as several with an index."""
    names = sorted(tensors)
    parts = [names[i::files] for i in range(files)]
    file_names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    for file, part in zip(file_names, parts, strict=True):
        save_file({k: tensors[k].contiguous() for k in part}, folder / file, metadata={"format": "pt"})
    if files > 1:
        weight_map = {k: file for file, part in zip(file_names, parts, strict=True) for k in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def read_folder(folder: Path) -> Tensors:
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def differences(folder: Path, other: Path) -> list[str]:
    """Names of tensors that are not in both, or not the same to the bit."""
    a, b = read_folder(folder), read_folder(other)
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or a[k].dtype != b[k].dtype or a[k].shape != b[k].shape
                  or not torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)))


def _config(name: str, changes: dict[str, Any]) -> Any:
    import transformers as tf
    base: dict[str, Any] = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96, vocab_size=VOCABULARY,
        rms_norm_eps=1e-6, tie_word_embeddings=name == "qwen3-tied", max_position_embeddings=512, eos_token_id=2, bos_token_id=None,
        pad_token_id=0) | changes
    experts = dict(num_experts_per_tok=2, moe_intermediate_size=48, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
                   routed_scaling_factor=2.5)
    if name.startswith("qwen3"):
        return tf.Qwen3Config(**base)
    if name == "qwen2":
        return tf.Qwen2Config(**{k: v for k, v in base.items() if k != "head_dim"})
    if name == "moe":
        return tf.Qwen3MoeConfig(**base, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)
    if name == "glm":
        return tf.Glm4MoeConfig(**base, **experts, attention_bias=True, use_qk_norm=True, partial_rotary_factor=0.5, num_nextn_predict_layers=1)
    del base["head_dim"]
    base["num_key_value_heads"] = 4
    return tf.DeepseekV3Config(
        **base, **experts, n_group=1, topk_group=1, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24,
        num_nextn_predict_layers=1,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
                             original_max_position_embeddings=64))
