"""The largest dense model that one GPU trains, with Adam's states on the GPU and in host memory: gpu_largest.py OUT WORK HOST-GIB.

Writes OUT/largest.json. Models have the width of Qwen3-14B and more or fewer layers. Each number of layers is tried in a process of its own: two
optimizer steps of two packs of 8k tokens, every layer recomputed; from what memory could hold downwards, until one trains.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu

from rlmono.memory.host import available_bytes

ON_GPU = gpu.has_gpu()
SHAPE: dict[str, Any] = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", attention_bias=False, rms_norm_eps=1e-6, rope_theta=1e6, head_dim=128,
    initializer_range=0.02, max_position_embeddings=40960, tie_word_embeddings=False, num_key_value_heads=8,
    **(dict(hidden_size=5120, intermediate_size=17408, num_attention_heads=40, vocab_size=151936) if ON_GPU else
       dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, vocab_size=512)))
PACK = 8192 if ON_GPU else 256
BYTES = {"on the GPU": (18, 0), "in host memory": (6, 16)}
"""Of GPU and host memory that a parameter takes: bf16 weight and fp32 gradient; and three fp32 numbers of Adam with mixed precision, beside
which there is a copy of the gradient on the host."""
FIRST = 0.93
"""The first that is tried fills so much of the GPU, or all that is given of the host, with these bytes."""


def main() -> int:
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    figures: list[dict[str, Any]] = []
    host = available_bytes() if sys.argv[3] == "0" else int(float(sys.argv[3]) * 2**30)
    for where, (on_gpu, on_host) in BYTES.items():
        tried = []
        parameters = min(FIRST * capacity() / on_gpu, host / on_host if on_host else float("inf"))
        layers = int((parameters - 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]) / layer_parameters()) if ON_GPU else 2
        while layers > 0:
            found = attempt(work, layers, where == "in host memory")
            tried.append(f"{layers}: {found['why'] if 'why' in found else 'trains'}")
            print(f"Adam {where}, {layers} layers: {found}", flush=True)
            if "why" not in found:
                and_host = f", {host / 2**30:.0f} GiB of host memory" if on_host else ""
                figures.append(gpu.figure(
                    f"largest dense model that trains, Adam {where}", found["parameters"] / 1e9, "e9 parameters", "",
                    f"{capacity() / 2**30:.0f} GiB of GPU memory{and_host}, packs of {PACK} tokens, full recompute",
                    f"{layers} layers of Qwen3-14B's width, steps {found['steps']} s, peak {found['peak']:.1f} GiB; tried {', '.join(tried)}"))
                (out / "largest.json").write_text(json.dumps(figures, indent=1))
                break
            layers -= 1
    return 0


def capacity() -> int:
    if not ON_GPU:
        return 2**30
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


def layer_parameters() -> int:
    h, kv = SHAPE["hidden_size"], SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    return int(2 * h * SHAPE["num_attention_heads"] * SHAPE["head_dim"] + 2 * h * kv + 3 * h * SHAPE["intermediate_size"])


def attempt(work: Path, layers: int, offload: bool) -> dict[str, Any]:
    """What the process found, or `why` it did not."""
    folder = work / f"largest-{layers}-{offload}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    left = float(os.environ.get("BENCH_END") or time.time() + 3600) - time.time()
    command = [*gpu.torchrun(1), __file__, "attempt", str(folder), str(int(offload))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, left))
    except subprocess.TimeoutExpired:
        return {"why": "no time left"}
    if rows := [line for line in done.stdout.splitlines() if line.startswith("found ")]:
        return dict(json.loads(rows[-1].removeprefix("found ")))
    text = done.stdout + done.stderr
    if not re.search("out of memory", text, re.IGNORECASE):
        print(text[-4000:], flush=True)
        return {"why": "failed"}
    return {"why": "out of memory"}


def child(folder: Path, offload: bool) -> None:
    """Under torchrun: build, train two steps, print."""
    sys.path[:0] = [str(gpu.ROOT), str(gpu.ROOT / "tests" / "cpu" / "worlds")]
    import torch
    import torch.distributed as dist

    from rlmono.trainer import compat
    compat.prepare()
    import tiny

    from rlmono.config.schema import Config
    from rlmono.models.registry import shape_from_hf
    from rlmono.trainer.trainer import Trainer
    from rlmono.world.messages import TrainBatch, TrainStep
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    shape = shape_from_hf(json.loads((folder / "config.json").read_text()))
    trainer = Trainer(Config(
        hf_checkpoint=str(folder), model=shape, lr=1e-6, use_dynamic_batch_size=True, max_tokens_per_gpu=PACK, optimizer_cpu_offload=offload,
        overlap_cpu_optimizer_d2h_h2d=offload, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        torch.bfloat16 if ON_GPU else torch.float32, 10)
    for p in (p for c in trainer.chunks for p in c.parameters()):
        torch.nn.init.normal_(p, 0.0, 0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    trainer.weights_changed()
    length = PACK // 8
    samples = [tiny.sample(i, i // 8, float(i % 3), [(7 * i + j) % 500 for j in range(length)], length - 1, [1] * (length - 1), [-1.0] * (length - 1))
               for i in range(16)]
    step = TrainStep([samples[:8], samples[8:]], 16, 16 * (length - 1))
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        metrics = trainer.train(TrainBatch(0, [step], [(s.group_index, s.index, s.reward) for s in samples]))
        times.append(round(time.perf_counter() - begun, 2))
    assert metrics["train/grad_norm"] > 0, metrics
    parameters = sum(p.numel() for c in trainer.chunks for p in c.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
    print("found " + json.dumps({"parameters": parameters, "steps": times, "peak": peak}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "attempt":
        child(Path(sys.argv[2]), sys.argv[3] == "1")
    sys.exit(main())
