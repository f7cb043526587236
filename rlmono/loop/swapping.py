"""A colocated rank's memory: what will leave the GPU, decided and paid for before anything is built."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

import torch

from rlmono.config.schema import Config
from rlmono.loop.world import RunPlan, World
from rlmono.memory import plan as swap_plan
from rlmono.memory.host import HostMemory, node_bytes
from rlmono.memory.saver import open_saver
from rlmono.memory.swap import Memory
from rlmono.weights.hf import WeightsError, headers, index_of

log = logging.getLogger(__name__)

PROMPT = 1024
"""Tokens of a prompt, where no option bounds it."""
SLACK = 256 * 2**20
"""Host memory beside what the checkpoint's headers say: Megatron pads and rounds."""


class ColocatedMemory(Memory):
    """Memory, and what an out-of-memory error should say."""

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises RuntimeError, with what lies where, for torch.OutOfMemoryError."""
        try:
            yield
        except torch.OutOfMemoryError as e:
            raise RuntimeError(f"the GPU's memory is used up {self.where()}. {str(e).splitlines()[0]} Train with smaller packs "
                               "(--max-tokens-per-gpu), recompute (--recompute-granularity), move more (--offload-train), or give the engine less "
                               "(--sglang-mem-fraction-static)") from e


def open_memory(world: World, plan: RunPlan) -> ColocatedMemory:
    """The swap of this rank: its plan from what the checkpoint's headers say, and host memory that is pinned from now on, in the background.

    Raises MemoryError where the node has too little of it, RuntimeError where GPU memory can't be paused.
    """
    saver = open_saver(world.device)
    expected = _expected(world.config, plan, world)
    if expected is None:                # no headers to read: `settle` decides, by what was built
        return ColocatedMemory(saver)
    memory = ColocatedMemory(saver, swap_plan.choose(world.config.offload_train, _budget(world, expected)))
    memory.host = _host_memory(memory.plan.host_bytes(expected), world, SLACK)
    return memory


def settle(memory: ColocatedMemory, world: World, trainer: Any) -> None:
    """The trainer is built: its memory is the swap's from now on, and what the engine's start must not find on the GPU leaves."""
    memory.adopt(trainer.tagged())
    trainer.before_update(memory.wait)
    sizes = {tag: h.nbytes for tag, h in memory.holdings.items()}
    if memory.plan.rung == "none" and memory.host is None:
        memory.plan = swap_plan.choose(world.config.offload_train, _budget(world, sizes, built=True))
    needed = memory.plan.host_bytes(sizes)
    if needed and (memory.host is None or memory.host.nbytes < needed + SLACK // 4):
        memory.host = _host_memory(needed, world, SLACK // 4)
    log.info("%s", swap_plan.table(sizes, memory.plan))
    memory.to("boot")


def _host_memory(needed: int, world: World, slack: int) -> Optional[HostMemory]:
    if not needed:
        return None
    available = node_bytes(world.config.host_memory_gib)
    swap_plan.refuse_host_memory(needed + slack, available, world.launch.local_world_size - 1, f"--offload-train {world.config.offload_train}")
    return HostMemory(needed + slack, pin=world.device == "cuda")


def _expected(c: Config, plan: RunPlan, world: World) -> Optional[dict[str, int]]:
    """Bytes of the trainer's tags on this rank; None where no folder with weights says how large the model is."""
    counts = _parameters(plan.actor.folder if plan.actor.kind == "hf" else c.hf_checkpoint or "", c)
    if counts is None:
        return None
    parameters = counts * (2 if plan.critic is not None else 1)
    frozen = counts if c.loss_type != "sft" and (c.use_kl_loss or c.kl_coef > 0) else 0
    if plan.teacher is not None:
        frozen += _parameters(plan.teacher.folder, c) or counts
    return swap_plan.trainer_bytes(parameters, frozen, world.grid.data_parallel_size * c.context_parallel_size, getattr(torch, world.dtype).itemsize)


def _parameters(folder: str, c: Config) -> Optional[int]:
    """Parameters a rank holds, stages taken as equal."""
    try:
        shapes = {name: shape for name, (_, shape) in headers(index_of(Path(folder))).items()}
    except (WeightsError, OSError):
        return None
    dense = sum(math.prod(s) for n, s in shapes.items() if ".experts." not in n)
    expert = sum(math.prod(s) for n, s in shapes.items() if ".experts." in n)
    tp, pp = c.tensor_model_parallel_size, c.pipeline_model_parallel_size
    return math.ceil(dense / (tp * pp) + expert / ((c.expert_tensor_parallel_size or tp) * c.expert_model_parallel_size * pp))


def _budget(world: World, trainer: Mapping[str, int], built: bool = False) -> Optional[swap_plan.Budget]:
    """None where there is no GPU."""
    if world.device != "cuda":
        return None
    c, item = world.config, getattr(torch, world.dtype).itemsize
    free = torch.cuda.mem_get_info()[0] + (sum(trainer.values()) if built else 0)
    engine_tp, model_parallel = c.rollout_num_gpus_per_engine, c.tensor_model_parallel_size * c.pipeline_model_parallel_size
    weights = trainer["params"] * model_parallel // engine_tp       # experts over other ranks make this too little, the critic too much
    samples = math.ceil(c.rollout_batch_size * c.n_samples_per_prompt / len(world.grid.engines))
    length = (c.rollout_max_prompt_len or PROMPT) + c.rollout_max_response_len
    length = min(length, c.rollout_max_context_len or c.model["max_position_embeddings"])
    wanted = min(samples, c.sglang_server_concurrency) * length * swap_plan.cache_bytes_a_token(c.model, engine_tp, item)
    fraction = float(c.sglang.get("mem_fraction_static") or swap_plan.FRACTION)
    return swap_plan.Budget(free - swap_plan.RESERVE, trainer, weights, wanted, fraction)
