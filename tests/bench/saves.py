"""How long a checkpoint stops the loop, written at once and in the background: part `save` of `python tests/bench/cpu.py`.

By itself (`python tests/bench/saves.py [MODEL [TIMES]]`) it prints the bytes of each rank, and seconds: of one rank with a model of
0.1 billion parameters in fp32; on GPUs, under torchrun, of any number of data-parallel ranks with a model of random_model.py in bf16.
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
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
             num_attention_heads=12, num_key_value_heads=4, head_dim=64, vocab_size=32000, rms_norm_eps=1e-6, tie_word_embeddings=False,
             max_position_embeddings=4096, rope_theta=10000.0, initializer_range=0.02)
TIMES = 5


def save_figures() -> list[dict[str, Any]]:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, timeout=800, env=environ)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return rows(json.loads(done.stdout.splitlines()[-1]), f"median of {TIMES}")


def rows(found: dict[str, Any], note: str) -> list[dict[str, Any]]:
    """The figures of what `main` prints."""
    from cpu import figure
    ranks = found["ranks"]
    size = f"{sum(ranks) / 2**30:.3g} GiB, {len(ranks)} rank{'s' * (len(ranks) > 1)}"
    return [figure("checkpoint: the loop stands still, written at once", found["at_once"], "s", "", size, note),
            figure("checkpoint: the loop stands still, --async-save", found["behind"], "s", "", size, f"{note} after the first"),
            figure("checkpoint: the loop stands still, --async-save, first of a run", found["first"], "s", "", size, "host memory is made, and kept"),
            figure("checkpoint: a bare copy of a rank's tensors in host memory", found["copy"], "s", "", size, f"{note}; into new memory"),
            figure("checkpoint, --async-save: in bare copies", found["behind"] / found["copy"], "", "<= 2", "the line above"),
            figure("checkpoint, --async-save: part of the time of one written at once", found["behind"] / found["at_once"], "", "< 0.3",
                   "the lines above")]


def main() -> None:
    from rlmono.trainer import compat
    compat.prepare()
    import torch
    import torch.distributed as dist
    from random_model import COMMON, SHAPES

    from rlmono.checkpoint import torch_dist
    from rlmono.config.schema import Config
    from rlmono.models.registry import shape_from_hf
    from rlmono.trainer.trainer import Trainer
    name, times = (sys.argv[1:] + [""])[0], int((sys.argv[2:] + [TIMES])[0])
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = COMMON | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", rope_theta=1e6) | SHAPES[name] if name else MODEL
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    trainer = Trainer(Config(hf_checkpoint="", model=shape_from_hf(model), loss_type="sft"), dtype, 1)
    for tensor in torch_dist.adam_tensors(trainer).values():
        tensor.uniform_()               # as after a step: what nobody has written yet has no pages
    spent: dict[str, list[float]] = {"at_once": [], "behind": [], "copy": []}
    folder, host = Path(_everywhere(tempfile.mkdtemp())), torch_dist.HostCopies()

    def timed(what: str, work: Callable[[], Any]) -> Any:
        _settle(folder)
        begun = time.perf_counter()
        result = work()
        spent[what].append(time.perf_counter() - begun)
        return result
    for i in range(times + 1):
        parts = timed("behind", lambda: torch_dist.stage(trainer, folder / "behind", host))
        size = sum(part.nbytes for part in parts)
        timed("copy", lambda: [t.clone() for part in parts for _, t in part.tensors])       # noqa: B023 - called at once
        if i:
            del parts
            timed("at_once", lambda: torch_dist.save(trainer, folder / "at-once"))
    _settle(folder)
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, size)
    check(trainer, folder / "check", host)
    _settle(folder)
    if dist.get_rank() == 0:
        folder.rmdir()
        first = {"ranks": sizes, "first": spent["behind"].pop(0)}
        print(json.dumps(first | {k: statistics.median(v) for k, v in spent.items()}))


def check(trainer: Any, folder: Path, host: Any) -> None:
    """What is loaded is what was there when the copy was made."""
    import torch

    from rlmono.checkpoint import torch_dist
    live = [*torch_dist.adam_tensors(trainer).values(), *torch_dist.held_tensors(trainer.chunks).values()]
    expected = [t.detach().clone() for t in live]
    parts = torch_dist.stage(trainer, folder, host)
    with torch.no_grad():
        for t in live:
            t.zero_()
    for part in parts:
        part.write()
    torch_dist.load(trainer, folder, with_optimizer=True)
    assert all(torch.equal(a, b) for a, b in zip(live, expected, strict=True)), "other numbers were loaded"


def _everywhere(value: Any) -> Any:
    """The first rank's."""
    import torch.distributed as dist
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _settle(folder: Path) -> None:
    """Every rank and its device are here, with nothing in the folder."""
    import torch
    import torch.distributed as dist
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run(["rm", "-rf", *(str(p) for p in folder.iterdir())], check=True)
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
