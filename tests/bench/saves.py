"""How long a checkpoint stops the loop, written at once and in the background: part `save` of `python tests/bench/cpu.py`.

By itself (`python tests/bench/saves.py`) it prints bytes and seconds, of one rank with a model of 0.1 billion parameters in fp32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
             num_attention_heads=12, num_key_value_heads=4, head_dim=64, vocab_size=32000, rms_norm_eps=1e-6, tie_word_embeddings=False,
             max_position_embeddings=4096, rope_theta=10000.0, initializer_range=0.02)
TIMES = 5


def save_figures() -> list[dict[str, Any]]:
    from cpu import figure
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, timeout=800, env=environ)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    size, note = f"{found['bytes'] / 2**30:.3g} GiB, 1 rank", f"median of {TIMES}"
    return [figure("checkpoint: the loop stands still, written at once", found["at_once"], "s", "", size, note),
            figure("checkpoint: the loop stands still, --async-save", found["behind"], "s", "", size, f"median of {TIMES} after the first"),
            figure("checkpoint: the loop stands still, --async-save, first of a run", found["first"], "s", "", size, "host memory is made, and kept"),
            figure("checkpoint: a bare copy of its tensors in memory", found["copy"], "s", "", size, f"{note}; into new memory"),
            figure("checkpoint, --async-save: in bare copies", found["behind"] / found["copy"], "", "<= 2", "the line above"),
            figure("checkpoint, --async-save: part of the time of one written at once", found["behind"] / found["at_once"], "", "< 0.3",
                   "the lines above")]


def main() -> None:
    from rlmono.trainer import compat
    compat.prepare()
    import torch
    import torch.distributed as dist

    from rlmono.checkpoint import torch_dist
    from rlmono.config.schema import Config
    from rlmono.models.registry import shape_from_hf
    from rlmono.trainer.trainer import Trainer
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = Trainer(Config(hf_checkpoint="", model=shape_from_hf(MODEL), loss_type="sft"), torch.float32, 1)
    for tensor in torch_dist.adam_tensors(trainer).values():
        tensor.uniform_()               # as after a step: what nobody has written yet has no pages
    spent: dict[str, list[float]] = {"at_once": [], "behind": [], "copy": []}
    host = torch_dist.HostCopies()
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(TIMES + 1):
            begun = time.perf_counter()
            parts = torch_dist.stage(trainer, Path(tmp) / f"behind-{i}", host)
            spent["behind"].append(time.perf_counter() - begun)
            size = sum(part.nbytes for part in parts)
            begun = time.perf_counter()
            copies = [t.clone() for part in parts for _, t in part.tensors]
            spent["copy"].append(time.perf_counter() - begun)
            del copies, parts
            if i == 0:
                continue
            begun = time.perf_counter()
            torch_dist.save(trainer, Path(tmp) / "at-once" / str(i))
            spent["at_once"].append(time.perf_counter() - begun)
            subprocess.run(["rm", "-r", *(str(p) for p in Path(tmp).iterdir())], check=True)
    print(json.dumps({"bytes": size, "first": spent["behind"].pop(0)} | {k: statistics.median(v) for k, v in spent.items()}))


if __name__ == "__main__":
    main()
