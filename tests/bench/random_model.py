"""A checkpoint of a real shape with random weights, the quickstart's tokenizer and a prompt file: `python tests/bench/random_model.py qwen3-4b DIR`.

For measurements only: it generates noise, at the speed of the real model.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlmono.models.registry import family, shape_from_hf
from rlmono.quickstart import make

SHAPES = {
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936,
                     tie_word_embeddings=True),
    "qwen3-1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, vocab_size=151936,
                       tie_word_embeddings=True),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
                 tie_word_embeddings=True),
}


def main(name: str, folder: Path) -> None:
    """Write `folder`/model and `folder`/prompts.jsonl."""
    with tempfile.TemporaryDirectory() as tmp:
        make(Path(tmp) / "qs", seed=1)
        shutil.copytree(Path(tmp) / "qs" / "model", folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    base = json.loads((folder / "model" / "config.json").read_text())
    config = {**base, **SHAPES[name], "head_dim": 128, "max_position_embeddings": 40960, "initializer_range": 0.02, "dtype": "bfloat16"}
    (folder / "model" / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(folder / "model", config)
    draw = random.Random(0)
    rows = [{"messages": [{"role": "user", "content": "".join(draw.choices("0123456789+*", k=draw.randrange(100, 140)))}], "label": "1"} for _ in range(2048)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def _write_weights(folder: Path, config: dict) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for t in family(config["architectures"][0]).tensors(shape_from_hf(config)):
        for hf_name in t.hf_names:
            tensors[hf_name] = _tensor(hf_name, config, generator, device)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor(name: str, c: dict, generator: torch.Generator, device: str) -> torch.Tensor:
    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    shapes = {"embed_tokens": (c["vocab_size"], h), "lm_head": (c["vocab_size"], h), "q_proj": (c["num_attention_heads"] * d, h),
              "k_proj": (c["num_key_value_heads"] * d, h), "v_proj": (c["num_key_value_heads"] * d, h), "o_proj": (h, c["num_attention_heads"] * d),
              "gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f), "q_norm": (d,), "k_norm": (d,)}
    shape = next((s for key, s in shapes.items() if key in name), (h,))
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
