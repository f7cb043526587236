"""What gpu_rig.py measures: a function a section, which takes the rig and adds figures to it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from gpu_rig import Rig

GIB = 2**30


# ---------------------------------------------------------------- ceilings

def ceilings(rig: Rig) -> None:
    _ceilings(rig)
    rig.collect()


def _ceilings(rig: Rig) -> None:
    torch = rig.torch
    n = 8192 if rig.gpu else 512
    x, y = (torch.randn(n, n, device=rig.device, dtype=rig.dtype) for _ in range(2))
    out = torch.empty_like(x)
    rig.ceiling["flops"] = 2 * n**3 / median(rig, lambda: torch.mm(x, y, out=out), 10 if rig.gpu else 3)
    rig.figure("ceiling: matrix product", rig.ceiling["flops"] / 1e12, "TFLOP/s", "", f"{n} x {n} x {n}, random data")
    nbytes = (4 if rig.gpu else 1 / 64) * GIB
    a, b = (torch.randint(0, 255, (int(nbytes),), device=rig.device, dtype=torch.uint8) for _ in range(2))
    rig.ceiling["copy"] = 2 * nbytes / median(rig, lambda: b.copy_(a), 10 if rig.gpu else 3)
    rig.figure("ceiling: copy on the device, read and written", rig.ceiling["copy"] / 1e9, "GB/s", "", "a tensor of random bytes")
    host = torch.zeros(int(nbytes), dtype=torch.uint8, pin_memory=rig.gpu)
    for name, work in (("to_host", lambda: host.copy_(a, non_blocking=True)), ("to_device", lambda: a.copy_(host, non_blocking=True))):
        rig.ceiling[name] = nbytes / median(rig, work, 5)
        rig.figure(f"ceiling: pinned copy {name.replace('_', ' ')}", rig.ceiling[name] / GIB, "GiB/s", "", "pinned by torch, once")


def median(rig: Rig, work: Callable[[], Any], times: int) -> float:
    rig.timed(work)
    rig.timed(work)
    return statistics.median(rig.timed(work) for _ in range(times))


# ---------------------------------------------------------------- train

SIZE = {True: (8192, 8), False: (256, 2)}
"""Tokens of a pack and packs of a step, on a GPU and in a rehearsal."""


def packs(rig: Rig) -> tuple[Any, int]:
    """(a batch of one step, its tokens): packs of eight sequences for each data-parallel rank."""
    pack, number = SIZE[rig.gpu]
    length, vocabulary = pack // 8, rig.config().model["vocab_size"]
    draw = rig.torch.Generator().manual_seed(0)
    texts = [rig.torch.randint(3, vocabulary, (length,), generator=draw).tolist() for _ in range(8 * number * rig.trainer.data_parallel[1])]
    return rig.batch([(text, length - 1, [-1.0] * (length - 1)) for text in texts]), sum(map(len, texts))


def train_local(rig: Rig) -> None:
    """The section train with rlmono's own kernels, and the ceiling of the same run; a process of its own, whose trainer is built so."""
    ceilings(rig)
    train(rig, "train_local", "train with rlmono's own kernels")


def train_te(rig: Rig) -> None:
    """The same with Transformer Engine's."""
    ceilings(rig)
    train(rig, "train_te", "train with Transformer Engine's attention and norms")


def train(rig: Rig, section: str = "train", title: str = "train") -> None:
    """Steps of 8 packs a data-parallel rank, eight sequences each; without recompute, and with where that runs out of memory."""
    trainer, (batch, tokens), m = rig.trainer, packs(rig), rig.config().model
    pack, number = SIZE[rig.gpu]
    length = pack // 8
    parameters = sum(p.numel() for c in trainer.chunks for p in c.parameters()) * rig.a.tp
    flops = tokens * (6 * parameters + 6 * m["num_layers"] * m["num_attention_heads"] * m["kv_channels"] * length)
    for recompute in ("none", "full"):
        if recompute == "full":
            for chunk in trainer.chunks:
                chunk.config.recompute_granularity, chunk.config.recompute_method, chunk.config.recompute_num_layers = "full", "uniform", 1
        try:
            if rig.gpu:
                rig.torch.cuda.reset_peak_memory_stats()
            times = [rig.timed(lambda: trainer.train(batch)) for _ in range(4 if rig.gpu else 2)]
        except rig.torch.OutOfMemoryError as e:
            rig.say(f"train without recompute: {str(e).splitlines()[0]}")
            for chunk in trainer.ddp:
                chunk.zero_grad_buffer()
            rig.collect()
            continue
        best = statistics.median(times[1:])
        rate = flops / best / rig.world
        peak = f", peak {rig.torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if rig.gpu else ""
        share = rate / rig.ceiling["flops"] if "flops" in rig.ceiling else float("nan")
        rig.figure(f"{title}, recompute {recompute}: share of the matrix product's FLOP/s", share, "", ">= 0.60" if recompute == "none" else "",
                   f"a step of {number} packs of {pack} tokens, whole step with the optimizer",
                   f"{rate / 1e12:.0f} TFLOP/s, {tokens / best:.0f} tokens/s, times {[round(t, 2) for t in times]}{peak}")
        rig.write(section)
        if recompute == "none" and rig.gpu:
            profile(rig, lambda: trainer.train(batch), section)
            break
    for chunk in trainer.chunks:
        chunk.config.recompute_granularity = chunk.config.recompute_method = chunk.config.recompute_num_layers = None
    rig.collect()


def profile(rig: Rig, work: Callable[[], Any], section: str) -> None:
    """Where the GPU's time goes, by kernel: the next step of tuning reads it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile
    with torch_profile(activities=[ProfilerActivity.CUDA]) as p:
        work()
        rig.sync()
    if rig.rank == 0:
        (rig.a.out / f"{section}_kernels.txt").write_text(p.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


def cpu_adam(rig: Rig) -> None:
    """Steps of the same packs, with Adam's states and fp32 weights in host memory; a process of its own, whose trainer is built so."""
    trainer, (batch, tokens) = rig.trainer, packs(rig)
    if rig.gpu:
        rig.torch.cuda.reset_peak_memory_stats()
    times = [rig.timed(lambda: trainer.train(batch)) for _ in range(3)]
    parameters = sum(p.numel() for c in trainer.chunks for p in c.parameters())
    held = sum(t.nbytes for tensors in trainer.tagged().values() for t in tensors if t.is_cuda)
    peak = f", peak {rig.torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if rig.gpu else ""
    rig.figure("train, Adam in host memory: a step", min(times[1:]), "s", "", f"{tokens} tokens, {parameters / 1e9:.2f}e9 parameters",
               f"{tokens / min(times[1:]):.0f} tokens/s, times {[round(t, 2) for t in times]}{peak}, of which weights, gradients and states "
               f"{held / GIB:.1f} GiB")


# ---------------------------------------------------------------- update

def update(rig: Rig) -> None:
    weights, version = rig.weights, 1
    rig.memory.to("sync")
    times, parts = [], []
    nbytes = sum(t.nbytes for bucket in rig.trainer.export() for _, t in bucket)
    for _ in range(8):
        times.append(weights.update(version))
        version += 1
    for _ in range(3):
        export = rig.timed(lambda: [b for b in rig.trainer.export()])
        buckets = [b for b in rig.trainer.export()]
        load = rig.timed(lambda: [rig.engine.load_weights(b) for b in buckets])         # noqa: B023 - called at once
        parts.append((export, load, rig.timed(lambda: rig.engine.finish_update(version))))
    export, load, finish = (min(p[i] for p in parts) * 1e3 for i in range(3))
    differing = rig.engine.compare_weights(rig.trainer.export())
    limit = {(1, 1, 1): "<= 12", (2, 2, 1): "<= 20", (2, 2, 2): "<= 20", (4, 4, 1): "<= 25"}.get((rig.world, rig.a.tp, rig.a.engine_tp), "")
    floor = 2 * nbytes / rig.a.engine_tp / rig.ceiling["copy"] * 1e3 if "copy" in rig.ceiling else float("nan")
    what = f"{rig.world} GPU(s), trainer tp{rig.a.tp}, engine tp{rig.a.engine_tp}"
    rig.figure("weight update", statistics.median(times[2:]) * 1e3, "ms", limit, what,
               f"{nbytes / 1e9:.2f} GB; copies alone would take {floor:.1f} ms; first {times[0] * 1e3:.0f} ms; alone: export {export:.1f}, "
               f"load {load:.1f}, finish {finish:.1f} ms; plan: {rig.engine._plan.why_not or 'copies'}; differing: {differing[:3]}")


# ---------------------------------------------------------------- swap

REST_S = 2
"""The driver clears what has been freed, beside whatever the GPU does next: copies into memory that changes hands at once run at 0.9 of the rate."""


def swap(rig: Rig) -> None:
    from rlmono.memory.plan import LEAVES, SwapPlan
    memory = rig.memory
    rig.serving()
    memory.to("train")
    for rung in ("optimizer", "all"):
        holdings = [h for tag in LEAVES[rung] if (h := memory.holdings[tag]).kept and h.nbytes]
        for h in holdings:
            h.reserve(memory.host)
        gib = sum(h.nbytes for h in holdings) / GIB
        rates: dict[str, list[float]] = {"out": [], "in": []}
        for rest_s in ((0, REST_S) if rung == "optimizer" else (0,)):
            back = rates.setdefault(f"in, {REST_S} s after memory was freed" if rest_s else "in", [])
            for _ in range(4):
                rates["out"].append(gib / rig.timed(lambda: _out(rig, holdings)))       # noqa: B023 - called at once
                time.sleep(rest_s)
                back.append(gib / rig.timed(lambda: _in(holdings)))     # noqa: B023
        for way, found in rates.items():
            rate, top = statistics.median(found[1:]), rig.ceiling.get("to_device" if way.startswith("in") else "to_host", float("nan")) / GIB
            rig.figure(f"swap {rung}, {way}: share of the pinned copy rate", rate / top, "", ">= 0.95", f"{top:.1f} GiB/s",
                       f"{rate:.1f} GiB/s, {gib:.1f} GiB")
        rig.write("swap")
    memory.plan = SwapPlan("none", (), "bench")
    memory.to("sync")
    rig.weights.update(2)
    memory.to("rollout")
    rig.figure("host memory: waited for at the first swap", memory.host.waited_s, "s", "", "pinned in the background from the trainer's build on")
    for name, n in memory.sizes.items():
        rig.figure(f"bytes: {name}", n / GIB, "GiB", "", "this rank")
    memory.plan = SwapPlan("gradients", LEAVES["gradients"], "bench")
    used = []
    for _ in range(50 if rig.gpu else 5):
        for state in ("train", "sync", "rollout"):
            memory.to(state)
        rig.sync()
        used.append(rig.torch.cuda.mem_get_info()[0] if rig.gpu else 0)
    rig.figure("GPU memory lost over 50 swaps", abs(used[0] - used[-1]) / 2**20, "MiB", "<= 64", "free memory after the first swap")
    memory.to("train")
    memory.wait()
    memory.to("sync")
    rig.weights.update(2)
    memory.to("rollout")


def _out(rig: Rig, holdings: list[Any]) -> None:
    """All at once, and the memory handed back."""
    for h in holdings:
        h.start_out()
    for h in holdings:
        h.leave()
    if rig.gpu:
        rig.torch.cuda.empty_cache()


def _in(holdings: list[Any]) -> None:
    for h in holdings:
        h.come()
    for h in holdings:
        h.wait()


# ---------------------------------------------------------------- cycle

WAYS = ("forced", "overlapped", "overlapped, cache after it")
"""How a swap goes on: alone; beside the phases before and after; and so where the KV cache has no room beside what leaves, and waits for it."""


def cycle(rig: Rig) -> None:
    """As loop/colocated.py, with the host's part played by this rank."""
    from rlmono.memory.plan import LEAVES, SwapPlan
    rig.serving()
    number, tokens = (256, rig.a.tokens) if rig.gpu else (16, rig.a.tokens)
    rig.generate(number, 4, 90)
    longest, room_for = 0.0, rig.memory._room_for
    for tag, (rung, way) in enumerate([(p, w) for p in rig.a.policies.split(",") for w in (("overlapped",) if p == "none" else WAYS)]):
        if rig.time_left < longest * 1.2:
            rig.say(f"no time for policy {rung}, {way}")
            break
        rig.memory.plan = SwapPlan(rung, LEAVES[rung], "bench")
        rig.memory._room_for = room_for if way != WAYS[2] else lambda tags, more=0: more == 0 and room_for(tags)
        for again in range(2):          # the first comes from another way, and generates beside what that has left to do
            row = one_cycle(rig, number, tokens, 2 * tag + again, overlapped=way != "forced")
            longest = max(longest, row["step"])
            rig.say(f"{rung} {way}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
        share = 100 * (1 - (row["generate"] + row["train"]) / row["step"])
        target = "<= 2" if rung == "none" or tokens >= 4000 else "<= 12" if way == "forced" else "<= 6"
        rate = f"{number * tokens / row['generate'] / rig.world:.0f} tokens/s generated a GPU"
        rig.figure(f"cycle, {rung if rung == 'none' else f'{rung} {way}'}: share that neither generates nor trains", share, "%", target,
                   f"{number} samples of {tokens} tokens", ", ".join(f"{k} {v:.3f} s" for k, v in row.items()) + f", {rate}")
        rig.write("cycle")
    rig.memory._room_for = room_for


def one_cycle(rig: Rig, number: int, tokens: int, tag: int, overlapped: bool) -> dict[str, float]:
    memory, row = rig.memory, {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        out = work()
        if name == "train":
            rig.sync()
        row[name] = row.get(name, 0.0) + time.perf_counter() - begun
        return out

    def move(state: str) -> None:
        memory.to(state)
        if not overlapped:
            memory.wait()
            rig.sync()
    rig.dist.barrier()
    begun = time.perf_counter()
    got = timed("generate", lambda: rig.generate(number, tokens, tag)[0])
    timed("wake", lambda: move("train"))
    sequences = [(rig.prompts[rid] + o.output_ids, len(o.output_ids), o.log_probs) for rid, o in sorted(got.items())]
    batch = timed("pack", lambda: rig.batch(sequences))
    timed("train", lambda: rig.trainer.train(batch))
    timed("wake", lambda: move("sync"))
    timed("update", lambda: rig.weights.update(tag + 2))
    timed("sleep", lambda: move("rollout"))
    return row | {"step": time.perf_counter() - begun}


# ---------------------------------------------------------------- rollout

def rollout(rig: Rig) -> None:
    """Both engines on one GPU, in turn: the other one waits in the meantime. Random weights of the same shape."""
    rig.needs_trainer = False
    number, tokens = (256, rig.a.tokens // 2) if rig.gpu else (8, rig.a.tokens)
    fraction = 0.3
    rig.config = with_fraction(rig, fraction)       # type: ignore[method-assign]
    engine = rig.engine
    other = standalone(rig, engine, fraction)
    pairs, prompts = [], None
    rates: dict[str, list[float]] = {"rank": [], "standalone": []}
    for i in range(6 if rig.gpu else 2):
        got, took = rig.generate(number, tokens, 50 + i)
        prompts = list(rig.prompts.values())
        mine = sum(len(o.output_ids) for o in got.values()) / took
        theirs = other(prompts, tokens)
        if i >= (1 if rig.gpu else 0):  # the first warms up
            pairs.append(mine / theirs)
            rates["rank"].append(mine)
            rates["standalone"].append(theirs)
        rig.say(f"pair {i}: rank {mine:.0f} tokens/s, standalone {theirs:.0f}")
        if rig.time_left < 2 * took + 5 and pairs:
            break
    rig.figure("engine in a rank over standalone sglang.Engine, tokens/s", statistics.median(pairs), "", ">= 0.98", "median of interleaved pairs",
               f"{len(pairs)} pairs, {min(pairs):.3f} to {max(pairs):.3f}; {statistics.median(rates['rank']):.0f} and "
               f"{statistics.median(rates['standalone']):.0f} tokens/s, {number} x {tokens} tokens")


def with_fraction(rig: Rig, fraction: float) -> Callable[..., Any]:
    plain = rig.config
    return lambda **more: plain(**(dict(sglang=dict(mem_fraction_static=fraction, cuda_graph_max_bs_decode=256) if rig.gpu else {}) | more))


def standalone(rig: Rig, engine: Any, fraction: float) -> Callable[[list[list[int]], int], float]:
    """sglang.Engine with the same arguments, in processes of its own; returns a function (prompts, tokens) -> tokens a second.

    Without a GPU (where its processes would need what engine/compat.py overrides) the rank's own engine stands in: a rehearsal.
    """
    if not rig.gpu:
        return lambda prompts, tokens: len(prompts) * tokens / rig.generate(len(prompts), tokens, 70)[1]
    names = ("model_path", "tp_size", "dtype", "load_format", "skip_tokenizer_init", "sampling_backend", "attention_backend",
             "disable_prefill_cuda_graph", "max_running_requests", "cuda_graph_max_bs_decode", "random_seed", "context_length")
    same = {k: getattr(engine.args, k) for k in names if hasattr(engine.args, k)}
    # The fraction is of what is free: as many bytes as the first has taken.
    free, total = rig.torch.cuda.mem_get_info()
    arguments = json.dumps(same | {"mem_fraction_static": min(0.85, fraction * total / free)})
    torchruns = ("TORCHELASTIC_", "ROLE_", "GROUP_", "MASTER_", "LOCAL_", "WORLD_", "RANK", "LD_PRELOAD")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(torchruns)}
    begun = time.perf_counter()
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("standalone.py")), arguments], env=environ, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None

    def wait_for(word: str) -> str:
        for line in server.stdout or ():
            if line.startswith(word):
                return line[len(word):]
            print(line, end="", flush=True)
        raise RuntimeError(f"sglang.Engine has ended with status {server.wait(30)}")
    wait_for("ready")
    rig.say(f"sglang.Engine built in {time.perf_counter() - begun:.1f} s")

    def run(prompts: list[list[int]], tokens: int) -> float:
        assert server.stdin is not None
        server.stdin.write(json.dumps([prompts, tokens]) + "\n")
        server.stdin.flush()
        return float(wait_for("rate:"))
    return run


SECTIONS: dict[str, Callable[[Rig], None]] = {f.__name__: f for f in (ceilings, train, train_local, train_te, cpu_adam, update, swap, cycle, rollout)}
