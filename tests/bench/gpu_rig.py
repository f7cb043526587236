"""The sections of gpu.py that need a trainer or an engine in this process; under torchrun: gpu_rig.py SECTIONS MADE OUT [--tp …].

Models are built when a section first asks for them, and shared. Each section writes OUT/<section>.json as soon as it has figures.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cpu" / "worlds")]
GIB = 2**30


def main() -> None:
    """Run the sections in order; one that fails is told, and the next goes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sections")
    parser.add_argument("made", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--policies", default="none,optimizer")
    a = parser.parse_args()
    from gpu import has_gpu
    gpu = has_gpu()
    sections = a.sections.split(",")
    if gpu and sections != ["rollout"]:
        from rlmono.memory.saver import preload
        preload(dict(os.environ))       # before torch
    import gpu_sections
    rig = Rig(a, gpu)
    for name in sections:
        begun = time.perf_counter()
        rig.figures = []
        try:
            if time.time() > rig.end:
                raise TimeoutError("no time is left of the budget")
            gpu_sections.SECTIONS[name](rig)
        except BaseException:
            traceback.print_exc()
            rig.say(f"FAILED {name} after {time.perf_counter() - begun:.0f} s")
            if "out of memory" in traceback.format_exc().lower():
                rig.free()
        rig.write(name)
        rig.say(f"{name}: {time.perf_counter() - begun:.1f} s")
    sys.stdout.flush()
    os._exit(0)                         # SGLang's threads and NCCL can hang in destructors


class Rig:
    """A world of its own on this machine: `trainer`, `engine`, `memory` and `host`, built when first used."""

    def __init__(self, a: argparse.Namespace, gpu: bool):
        import torch
        import torch.distributed as dist
        self.a, self.gpu, self.torch, self.dist = a, gpu, torch, dist
        self.began, self.end = time.time(), float(os.environ.get("BENCH_END") or time.time() + 1e6)
        faulthandler.dump_traceback_later(max(10.0, self.end - self.began), exit=False)      # where it stood when time ran out
        self.figures: list[dict[str, Any]] = []
        self.ceiling: dict[str, float] = {}
        self.device = "cuda" if gpu else "cpu"
        self.local = int(os.environ["LOCAL_RANK"])
        if gpu:
            torch.cuda.set_device(self.local)
        if a.sections != "rollout":
            from rlmono.trainer import compat
            compat.prepare()            # megatron before sglang
        import host
        host.DEADLINE_S = 600
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.say(f"world of {self.world}")
        self.built: dict[str, Any] = {}
        if self.rank == 0:
            import figures
            name = torch.cuda.get_device_name() if gpu else "no GPU"
            (a.out / "machine.txt").write_text(f"{self.world} x {name}; {figures.this_machine()}")

    # ------------------------------------------------------------ building

    def config(self, **more: Any) -> Any:
        from rlmono.config.schema import Config
        from rlmono.models.registry import shape_from_hf
        model = shape_from_hf(json.loads((self.a.made / "model" / "config.json").read_text()))
        sglang = dict(mem_fraction_static=0.7, cuda_graph_max_bs_decode=256) if self.gpu else {}
        values: dict[str, Any] = dict(
            hf_checkpoint=str(self.a.made / "model"), model=model, colocate=True, lr=1e-6, tensor_model_parallel_size=self.a.tp,
            sequence_parallel=self.a.tp > 1, rollout_num_gpus_per_engine=self.a.engine_tp, rollout_max_response_len=self.a.tokens,
            use_dynamic_batch_size=True, max_tokens_per_gpu=8192 if self.gpu else 256, sglang=sglang, deterministic=not self.gpu, rollout_seed=1,
            transformer_impl={"train_local": "local", "train_te": "transformer_engine" if self.gpu else "auto"}.get(self.a.sections, "auto"),
            optimizer_cpu_offload=self.a.sections == "cpu_adam", overlap_cpu_optimizer_d2h_h2d=self.a.sections == "cpu_adam")
        return Config(**(values | more))

    @property
    def trainer(self) -> Any:
        if "trainer" not in self.built:
            from rlmono.trainer.trainer import Trainer
            begun = time.perf_counter()
            trainer = Trainer(self.config(), self.dtype, 100)
            trainer.load_hf(self.a.made / "model")
            self.built["trainer"] = trainer
            self.say(f"trainer built in {time.perf_counter() - begun:.1f} s")
        return self.built["trainer"]

    @property
    def memory(self) -> Any:
        """The swap, with a pinned copy of all that any policy moves."""
        if "memory" not in self.built:
            from rlmono.memory.host import HostMemory
            from rlmono.memory.plan import LEAVES, SwapPlan
            from rlmono.memory.saver import open_saver
            from rlmono.memory.swap import Memory
            trainer = self.trainer
            memory = Memory(open_saver(self.device), SwapPlan("none", (), "bench"))
            memory.adopt(trainer.tagged())
            trainer.before_update(memory.wait)
            sizes = {k: h.nbytes for k, h in memory.holdings.items()}
            memory.host = HostMemory(SwapPlan("all", LEAVES["all"], "").host_bytes(sizes) + 2**20, pin=self.gpu)
            self.built["memory"] = memory
        return self.built["memory"]

    @property
    def engine(self) -> Any:
        if "engine" not in self.built:
            from host import Host

            from rlmono.engine.engine import Engine
            memory = self.memory if "trainer" in self.built or self.needs_trainer else None
            begun = time.perf_counter()
            self.collect()
            self.built["host"] = Host(self.engines)
            engine = Engine(self.config(), self.engines, self.local, self.device, "bfloat16" if self.gpu else "float32", self.built["host"].link,
                            memory_saver=memory is not None and memory.saver is not None)
            self.built["engine"] = engine
            engine.drain()
            self.say(f"engine built in {time.perf_counter() - begun:.1f} s")
            if memory is not None:
                memory.add_engine(engine)
                memory.to("sync")
        return self.built["engine"]

    needs_trainer = True

    @property
    def engines(self) -> list[list[int]]:
        return [list(range(i, i + self.a.engine_tp)) for i in range(0, self.world, self.a.engine_tp)]

    @property
    def weights(self) -> Any:
        if "weights" not in self.built:
            from rlmono.weights.update import Colocated
            self.built["weights"] = Colocated(self.trainer, self.engine, check=False)
        return self.built["weights"]

    def serving(self) -> None:
        """Engine and cache on the GPU with the trainer's weights, whatever went before."""
        if self.memory.state != "rollout" or "weights" not in self.built:
            self.engine         # noqa: B018 - builds it
            self.memory.wait()
            self.memory.to("sync")
            self.weights.update(1)
            self.memory.to("rollout")

    # ------------------------------------------------------------ measuring

    def sync(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize()

    def collect(self) -> None:
        gc.collect()
        if self.gpu:
            self.torch.cuda.empty_cache()

    free = collect

    def timed(self, work: Callable[[], Any]) -> float:
        self.sync()
        begun = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begun

    def say(self, text: str) -> None:
        if self.rank == 0:
            used = f" {(self.torch.cuda.mem_get_info()[1] - self.torch.cuda.mem_get_info()[0]) / GIB:.1f} GiB used" if self.gpu else ""
            print(f"[{time.time() - self.began:6.1f} s{used}] {text}", flush=True)

    def figure(self, name: str, value: float, unit: str, target: str, reference: str, note: str = "") -> None:
        """Targets are for GPUs: a rehearsal has none."""
        more = {"note": note} if note else {}
        self.figures.append({"name": name, "value": value, "unit": unit, "target": target if self.gpu else "", "reference": reference} | more)
        self.say(f"{name}: {value:.4g} {unit} {note}")

    def write(self, section: str) -> None:
        if self.rank == 0 and self.figures:
            (self.a.out / f"{section}.json").write_text(json.dumps(self.figures, indent=1))

    @property
    def time_left(self) -> float:
        left = self.torch.tensor(self.end - time.time())
        if self.world > 1:
            self.dist.broadcast(left, 0)
        return float(left)

    # ------------------------------------------------------------ work

    def generate(self, number: int, tokens: int, tag: int) -> tuple[dict[str, Any], float]:
        """`number` requests of 128 prompt tokens in groups of eight, dealt over the engines; (answers, seconds)."""
        from host import request
        vocabulary = self.config().model["vocab_size"] - 10
        length = 128 if self.gpu else 12
        prompts = [[(i // 8 * 7 + j * 3 + tag) % vocabulary for j in range(length)] for i in range(number)]
        batch = [request(tag * 100000 + i, prompt, tokens, temperature=1.0) for i, prompt in enumerate(prompts)]
        firsts = self.built["host"].firsts
        begun = time.perf_counter()
        got = self.built["host"].generate(self.engine, {first: batch[i::len(firsts)] for i, first in enumerate(firsts)})
        self.prompts = {r.rid: r.input_ids for r in batch}
        return got, time.perf_counter() - begun

    def batch(self, sequences: list[tuple[list[int], int, list[float]]]) -> Any:
        """TrainBatch of one step: (tokens, response length, logprobs) of each sample, this data-parallel rank's packs."""
        import tiny

        from rlmono.rollout.schedule import plan_rollout
        from rlmono.world.messages import TrainBatch, TrainStep
        samples = [tiny.sample(i, i // 8, float(i % 3), t, r, [1] * r, lp) for i, (t, r, lp) in enumerate(sequences)]
        dp, size = self.trainer.data_parallel
        packs = plan_rollout([len(t) for t, _, _ in sequences], [len(sequences)], self.config(), size)[0][dp]
        step = TrainStep([[samples[i] for i in pack] for pack in packs], len(samples), sum(r for _, r, _ in sequences))
        return TrainBatch(0, [step], [(s.group_index, s.index, s.reward) for s in samples])


if __name__ == "__main__":
    main()
