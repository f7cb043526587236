"""The numbers of a GPU: `python tests/bench/gpu.py [--only update,swap,…] [--budget-s 480] [--out DIR]`.

    ceilings   matrix products, copies on the device, copies from and to pinned memory
    train      FLOP/s of optimizer steps of packs of 8k tokens
    update     weights from the trainer into the engine of the same rank
    swap       what leaves the GPU and comes back, the rate of it, and what leaks over 50 swaps
    cycle      generate, train and update as a colocated rank does, by policy: the share that neither generates nor trains
    rollout    the engine in a rank against a standalone sglang.Engine: five interleaved pairs
    run        `rlmono train` as a user starts it: launch to first token, and the same share out of its metrics
    fp8_speed      rollouts in fp8 against bf16: tokens a second of an 8B shape
    fp8_accuracy   the same of a 0.6B shape: logprobs against the trainer's
    train_local, train_te   the section train with rlmono's own kernels, and with Transformer Engine's (where it is installed)
    cpu_adam   the section train again, with Adam's states in host memory
    largest    the largest dense model that one GPU trains, with them there and without
    peer       TRL's GRPOTrainer over a sweep of settings, where TRL is installed

Sections that share models share processes (`gpu_rig.py` under torchrun, `--ranks` of them). Each has a budget; one that fails or runs
out of it is printed, and the next goes on. Figures are written to DIR/*.json as a section ends; `--keep` puts them into
docs/benchmarks/gpu.json too. Without a GPU a tiny model is rehearsed on, and nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
RIG = ("ceilings", "train", "update", "swap", "cycle")
FP8 = ("fp8_speed", "fp8_accuracy")
BY_KERNELS = ("train_local", "train_te")
EXTRA = (*BY_KERNELS, "cpu_adam", "largest", *FP8, "peer")
"""Only where they are asked for: they take minutes."""
SECTIONS = (*RIG, "rollout", "run", *EXTRA)
SHARES = {"rig": 0.5, "train_local": 0.25, "train_te": 0.25, "cpu_adam": 0.2, "largest": 0.5, "rollout": 0.24, "run": 0.26, "fp8_speed": 0.4,
          "fp8_accuracy": 0.4, "peer": 0.5}
"""Of the budget, at most, for each process."""
ROLLOUTS = 3
"""Of a run as a user starts it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(s for s in SECTIONS if s not in EXTRA), help="sections, comma-separated")
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--shape", default=None, help="a name of random_model.py; default qwen3-4b on a GPU, tiny without")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1, help="the trainer's tensor-parallel size")
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=0, help="new tokens of a response in cycle, rollout, run; 0: 512 on a GPU, 8 without")
    parser.add_argument("--host-memory-gib", type=float, default=0.0, help="of the section largest; 0: what is free")
    parser.add_argument("--policies", default="none,optimizer", help="of the section cycle")
    parser.add_argument("--keep", action="store_true", help="write docs/benchmarks/gpu.json")
    a = parser.parse_args()
    wanted = [s for s in a.only.split(",") if s]
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    out = a.out or Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    gpu = has_gpu()
    shape = a.shape or ("qwen3-4b" if gpu else "tiny")
    tokens = a.tokens or (512 if gpu else 8)
    end, work = time.monotonic() + a.budget_s, Path(tempfile.mkdtemp(prefix="gpu-bench-work-"))
    made = work / "made"
    if set(wanted) - {"largest", *FP8}:
        call("model", [sys.executable, str(BENCH / "random_model.py"), shape, str(made)], out, 120)
    of_rig = [s for s in wanted if s in RIG]
    jobs: list[tuple[str, list[str]]] = [("+".join(of_rig), rig(a, of_rig, made, out, tokens))] if of_rig else []
    others = {**{s: rig(a, [s], made, out, tokens) for s in (*BY_KERNELS, "cpu_adam", "rollout")},
              "run": user_run(made, work, tokens, gpu, a), **{s: [sys.executable, str(BENCH / "gpu_fp8.py"), s, str(out), str(work)] for s in FP8},
              "largest": [sys.executable, str(BENCH / "gpu_largest.py"), str(out), str(work), str(a.host_memory_gib)],
              "peer": [sys.executable, str(BENCH / "gpu_peer.py"), str(made), str(out), str(tokens)]}
    jobs += [(s, others[s]) for s in wanted if s not in RIG]
    weights = [SHARES.get(name, SHARES["rig"]) for name, _ in jobs]
    for i, (name, command) in enumerate(jobs):
        limit = (end - time.monotonic()) * weights[i] / sum(weights[i:])
        status = call(name, command, out, max(20.0, limit), {"BENCH_END": str(time.time() + max(20.0, limit) - 10)})
        if name == "run":
            read_run(work / "run", out, float((out / "run.started").read_text()), status, gpu)
    return table(out, a.keep and gpu)


def has_gpu() -> bool:
    """Without importing torch."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0")


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]


def rig(a: argparse.Namespace, sections: list[str], made: Path, out: Path, tokens: int) -> list[str]:
    return [*torchrun(a.ranks), str(BENCH / "gpu_rig.py"), ",".join(sections), str(made), str(out), "--tp", str(a.tp),
            "--engine-tp", str(a.engine_tp), "--tokens", str(tokens), "--policies", a.policies]


def user_run(made: Path, work: Path, tokens: int, gpu: bool, a: argparse.Namespace) -> list[str]:
    """Policy auto."""
    return train_command(made / "model", work / "run", tokens, gpu, a.ranks, "0.7", "--lr", "1e-6", "--tensor-model-parallel-size", str(a.tp),
                         "--rollout-num-gpus-per-engine", str(a.engine_tp))


def train_command(model: Path, run: Path, tokens: int, gpu: bool, ranks: int, fraction: str, *more: str) -> list[str]:
    """`rlmono train` as a user starts it, colocated, with a model of random_model.py; `fraction` of a GPU's memory is the engine's."""
    prompts, samples, pack = ("32", "8", "8192") if gpu else ("2", "2", "512")
    on_gpu = ["--sglang-mem-fraction-static", fraction, "--sglang-cuda-graph-max-bs-decode", "256", "--recompute-granularity", "auto"] if gpu else []
    return [*torchrun(ranks + 1), "-m", "rlmono", "train", "--run-dir", str(run), "--progress", "plain",
            "--hf-checkpoint", str(model), "--prompt-data", str(model.parent / "prompts.jsonl"), "--input-key", "messages",
            "--label-key", "label", "--apply-chat-template", "--custom-rm-path", "rlmono.quickstart.reward", "--num-rollout", str(ROLLOUTS),
            "--rollout-batch-size", prompts, "--n-samples-per-prompt", samples, "--rollout-max-response-len", str(tokens),
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", pack, "--colocate", *on_gpu, *more]


def call(name: str, command: list[str], out: Path, limit_s: float, more: dict[str, str] | None = None) -> int:
    """Run a command with a deadline; its output goes to a file, the end of it here when it failed."""
    log, began = out / f"{name}.log", time.time()
    (out / f"{name}.started").write_text(str(began))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"} | (more or {})
    print(f"== {name} (at most {limit_s:.0f} s)", flush=True)
    with log.open("wb") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environ, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            stop(process)
    print(f"   {name}: status {status} after {time.time() - began:.0f} s", flush=True)
    if status:
        print("   " + "\n   ".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return status


def stop(process: subprocess.Popen[bytes]) -> None:
    """torchrun first, so that it ends its ranks, which lead sessions of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def read_run(run: Path, out: Path, launched: float, status: int, gpu: bool) -> None:
    """Figures out of a user's run: its metrics and when it began. A rehearsal has no targets."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    figures = []
    first = rows[0]
    started = first["time"] - launched - first["perf/step_time"]
    figures.append(figure("run: launch to the first request", started, "s", "<= 45", "caches as they were"))
    for row in rows:
        busy = sum(row.get(f"perf/{k}", 0.0) for k in ("rollout_time", "train_time", "log_probs_time", "ref_log_probs_time"))
        share = 100 * (1 - busy / row["perf/step_time"])
        figures.append(figure(f"run: rollout {row['rollout_id']}, share that neither generates nor trains", share, "%", "<= 2",
                              "time of the rollout, policy auto", f"step {row['perf/step_time']:.2f} s, status {status}"))
    for name in sorted(k for k in rows[-1] if k.startswith("perf/") and isinstance(rows[-1][k], float)):
        figures.append(figure(f"run: {name}", rows[-1][name], "", "", "last rollout"))
    (out / "run.json").write_text(json.dumps([f | ({} if gpu else {"target": ""}) for f in figures], indent=1))


def figure(name: str, value: float, unit: str, target: str, reference: str, note: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference} | ({"note": note} if note else {})


def table(out: Path, keep: bool) -> int:
    """The short table, last. 0 when every figure has met its target."""
    sys.path[:0] = [str(BENCH)]
    import figures
    found = [f for s in SECTIONS if (out / f"{s}.json").exists() for f in json.loads((out / f"{s}.json").read_text())]
    print(f"== figures ({out})")
    for f in found:
        mark = "MISSED" if not figures.met(f) else "ok" if f["target"] else ""
        print(f"{mark:6} {f['name']}: {f['value']:.4g} {f['unit']} {f['target']}  [{f['reference']}] {f.get('note', '')}".rstrip())
    if keep:
        machine = (out / "machine.txt").read_text() if (out / "machine.txt").exists() else figures.this_machine()
        figures.write("gpu", [f | {"command": "python tests/bench/gpu.py", "machine": machine} for f in found])
    return 0 if all(map(figures.met, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
