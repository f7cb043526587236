"""Memory that the loss and conversions take: parts of `python tests/bench/cpu.py`. Each measurement has processes of its own.

`python tests/bench/memory.py loss whole|chunked TOKENS` is one of them; it prints bytes and seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, GIB = 151936, 2**30
COMPARED, LONG = 4096, 8192
"""Tokens of a pack: as many as fp32 logits leave room for on a small machine, and a long one."""


def loss_figures() -> list[dict[str, Any]]:
    """Peak memory of logprob and entropy of a pack, forward and backward, from bf16 logits."""
    from cpu import figure
    whole, chunked, long = _loss("whole", COMPARED), _loss("chunked", COMPARED), _loss("chunked", LONG)
    if abs(chunked["gradient"] / whole["gradient"] - 1) > 0.01:
        raise SystemExit(f"the two are not the same loss: {whole}, {chunked}")
    reference = f"{COMPARED} tokens x {VOCABULARY} words: {COMPARED * VOCABULARY * 2 / GIB:.3g} GiB of bf16 logits, twice that in fp32"
    note = "logits and their gradient included"
    return [
        figure("loss on whole fp32 logits (before): peak memory", whole["bytes"] / GIB, "GiB", "", reference, f"{note}; {whole['seconds']:.3g} s"),
        figure("loss on chunks (rlmono): peak memory", chunked["bytes"] / GIB, "GiB", "", reference, f"{note}; {chunked['seconds']:.3g} s"),
        figure("loss on chunks: part of the memory of the whole", chunked["bytes"] / whole["bytes"], "", "<= 0.5", "the line two above"),
        figure(f"loss on chunks, {LONG} tokens: peak memory beside the logits", (long["bytes"] - LONG * VOCABULARY * 2) / GIB, "GiB", "<= 3",
               f"{LONG * VOCABULARY * 4 / GIB:.3g} GiB: one copy of the logits in fp32", "bf16 logits take "
               f"{LONG * VOCABULARY * 2 / GIB:.3g} GiB")]


def _loss(how: str, tokens: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "loss", how, str(tokens)], cwd=ROOT, capture_output=True, text=True, timeout=800,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"loss {how} {tokens}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_loss(how: str, tokens: int) -> None:
    import torch
    import torch.distributed as dist

    from rlmono.trainer.logprobs import logprobs_and_entropy
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def whole(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As one writes it down."""
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(1, targets[:, None]).sum() + 0.01 * (log_p.exp() * log_p).sum()

    def chunked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_probs, entropy = logprobs_and_entropy(logits, targets, 1.0, VOCABULARY, dist.group.WORLD, True)     # type: ignore[arg-type]
        return log_probs.sum() - 0.01 * entropy.sum()

    class Head(torch.autograd.Function):
        """Stands for the model: logits that are the caller's alone, and what becomes of their gradient."""

        @staticmethod
        def forward(ctx: Any, scale: torch.Tensor) -> torch.Tensor:
            logits = torch.empty(tokens, VOCABULARY, dtype=torch.bfloat16)
            return torch.mul(scale[:, None], torch.randn(VOCABULARY, dtype=torch.bfloat16)[None], out=logits)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            found["gradient"] = float(gradients[0][:64].float().norm())
            return torch.zeros(tokens, dtype=torch.bfloat16)
    found: dict[str, float] = {}
    torch.manual_seed(0)
    scale = torch.rand(tokens, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here
    before, begun = _status("VmRSS"), time.perf_counter()
    {"whole": whole, "chunked": chunked}[how](Head.apply(scale), targets).backward()
    print(json.dumps(found | {"seconds": time.perf_counter() - begun, "bytes": _status("VmHWM") - before}))


def _status(name: str, pid: str = "self") -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


# ---------------------------------------------------------------- conversions

def convert_figures() -> list[dict[str, Any]]:
    """Peak memory of each rank in `convert hf-to-torch-dist` of a model of 1.1 GiB, above what the same ranks take for a tiny one."""
    from cpu import figure, run
    out = []
    with tempfile.TemporaryDirectory() as tmp:
        models = {name: Path(tmp) / name / "model" for name in ("tiny", "qwen3-0.6b")}
        for name in models:
            run([sys.executable, "tests/bench/random_model.py", name, str(Path(tmp) / name)], os.environ | {"PYTHONPATH": str(ROOT)})
        for ranks in (1, 2, 4):
            base, _ = _convert(models["tiny"], ranks, Path(tmp) / "out")
            peaks, seconds = _convert(models["qwen3-0.6b"], ranks, Path(tmp) / "out")
            shares = _shares(models["qwen3-0.6b"], ranks)
            parts = [(peaks[r] - base[r]) / shares[r] for r in range(ranks)]
            worst = max(range(ranks), key=lambda r: parts[r])
            out.append(figure(f"convert hf-to-torch-dist, {ranks} rank(s): peak memory of a rank, in parts of its share", parts[worst], "", "<= 2",
                              f"its share: {shares[worst] / GIB:.3g} of {sum(shares) / GIB:.3g} GiB, in bf16",
                              f"anonymous memory, without {max(base.values()) / GIB:.2g} GiB of Python and Megatron; {seconds:.3g} s"))
    return out


def _convert(model: Path, ranks: int, folder: Path) -> tuple[dict[int, int], float]:
    """(peak of anonymous memory by rank, seconds) of one conversion, watched from outside every 2 ms."""
    from torchrun import free_port
    shutil.rmtree(folder, ignore_errors=True)
    launch = [sys.executable, "launch/torchrun.py", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    command = [*launch, "-m", "rlmono", "convert", "hf-to-torch-dist", "--hf-checkpoint", str(model), "--save", str(folder)]
    peaks: dict[int, int] = {}
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as text, subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=text, env=os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as process:
        found: dict[int, int] = {}      # rank -> pid
        while process.poll() is None:
            if len(found) < ranks:
                found |= _ranks(process.pid)
                time.sleep(0.05)
            for rank, pid in found.items():
                try:
                    peaks[rank] = max(peaks.get(rank, 0), _status("RssAnon", str(pid)))
                except (OSError, KeyError):         # it has ended
                    continue
            time.sleep(0.002)
        if process.returncode:
            text.seek(0)
            raise SystemExit(text.read().decode(errors="replace")[-3000:])
    return peaks, time.perf_counter() - begun


def _ranks(parent: int) -> dict[int, int]:
    """The ranks that torchrun has started."""
    out = {}
    for pid in (int(p) for p in os.listdir("/proc") if p.isdecimal()):
        try:
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environ = dict(x.partition("=")[::2] for x in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if "RANK" in environ:
            out[int(environ["RANK"])] = pid
    return out


def _shares(model: Path, ranks: int) -> list[int]:
    """Bytes of the weights that each rank holds, where layers are dealt over ranks: the first has the embeddings, and so has the last where
    they are tied."""
    import math

    from rlmono.convert.megatron import deal_layers
    from rlmono.weights.hf import headers, index_of
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    dealt = deal_layers(layers, ranks)
    stages = dealt.get("pipeline_model_parallel_size", 1)
    assert stages == ranks and config["tie_word_embeddings"]
    first, last = (dealt.get(f"decoder_{end}_pipeline_num_layers", layers) for end in ("first", "last"))
    middle = [(layers - first - last) // max(1, ranks - 2)] * (ranks - 2)
    counts = [first, *middle, last] if ranks > 1 else [layers]
    sizes = {name: 2 * math.prod(shape) for name, (_, shape) in headers(index_of(model)).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    embeddings, norm = sizes["model.embed_tokens.weight"], sizes["model.norm.weight"]
    shares = [count * layer for count in counts]
    shares[0] += embeddings
    shares[-1] += norm + (embeddings if ranks > 1 else 0)
    return shares


if __name__ == "__main__":
    assert sys.argv[1] == "loss"
    measure_loss(sys.argv[2], int(sys.argv[3]))
