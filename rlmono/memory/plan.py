"""What may stay on the GPU while engines generate: arithmetic on bytes, before anything moves.

The trainer's memory has four tags. While engines generate, none of it is needed; what leaves makes room for the KV cache, and
costs a copy each way (gradients cost nothing: they are dropped). So as little leaves as the cache allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional

POLICIES = ("auto", "none", "optimizer", "all")
TRAINER_TAGS = ("params", "gradients", "optimizer", "frozen")
LEAVES: dict[str, tuple[str, ...]] = {"none": (), "gradients": ("gradients",), "optimizer": ("gradients", "frozen", "optimizer"),
                                      "all": ("gradients", "frozen", "optimizer", "params")}
"""Rung -> the trainer's tags that are not on the GPU while engines generate; each rung leaves more room than the one before."""
COPIED = ("params", "optimizer", "frozen")
RESERVE = 4 * 2**30
"""Contexts, NCCL's buffers and CUDA graphs of both roles: 3.2 to 3.7 GiB were seen on an H200."""
FRACTION = 0.85
"""Of what SGLang finds free it takes about so much for weights and cache, where --sglang-mem-fraction-static does not say."""
GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes on one GPU. `trainer` is by tag; `capacity` is what both roles can have together."""

    capacity: int
    trainer: Mapping[str, int]
    engine_weights: int
    cache_wanted: int
    """KV cache of everything that one engine may have in flight, this GPU's part."""
    fraction: float = FRACTION

    def cache(self, rung: str) -> int:
        """The KV cache that SGLang makes when this rung's tags have left."""
        stays = sum(n for tag, n in self.trainer.items() if tag not in LEAVES[rung])
        return int(max(0, (self.capacity - stays) * self.fraction - self.engine_weights))


@dataclass(frozen=True)
class SwapPlan:
    """`leaves`: the trainer's tags that go; `why` is for the log."""

    rung: str
    leaves: tuple[str, ...]
    why: str

    def host_bytes(self, trainer: Mapping[str, int]) -> int:
        """Pinned host memory of one rank."""
        return sum(trainer.get(tag, 0) for tag in self.leaves if tag in COPIED)


def choose(policy: str, budget: Optional[Budget]) -> SwapPlan:
    """The plan of `--offload-train`; auto takes the first rung whose cache holds all requests in flight, or half of the largest that any gives.

    Without a budget (on CPU) auto moves nothing.
    """
    if policy != "auto":
        return SwapPlan(policy, LEAVES[policy], f"--offload-train {policy}")
    if budget is None:
        return SwapPlan("none", (), "there is no GPU memory to make room in")
    enough = min(budget.cache_wanted, budget.cache("all") // 2)
    rung = next((r for r in LEAVES if budget.cache(r) >= enough), "all")
    what = "all requests in flight" if budget.cache(rung) >= budget.cache_wanted else "half of the largest possible"
    cache, wanted = budget.cache(rung) / GIB, budget.cache_wanted / GIB
    return SwapPlan(rung, LEAVES[rung], f"a KV cache of about {cache:.0f} GiB ({what}; {wanted:.0f} GiB wanted)")


def trainer_bytes(parameters: int, frozen: int, data_parallel: int, param_bytes: int) -> dict[str, int]:
    """Bytes by tag of a rank that holds `parameters` (and as many as `frozen` of other models): weights, fp32 gradients, and its
    share of the distributed optimizer: two fp32 moments, and fp32 weights where the model's are narrower."""
    state = 8 + (4 if param_bytes < 4 else 0)
    return {"params": parameters * param_bytes, "gradients": parameters * 4, "optimizer": -(-parameters * state // data_parallel),
            "frozen": frozen * param_bytes}


def cache_bytes_a_token(shape: Mapping[str, Any], engine_tp: int, item: int) -> int:
    """KV cache of one token on one GPU of an engine: keys and values of each layer, or multi-head latent attention's latents."""
    if shape.get("multi_latent_attention"):
        width = shape["kv_lora_rank"] + shape["qk_pos_emb_head_dim"]        # every rank has all of it
    else:
        width = 2 * max(1, shape["num_query_groups"] // engine_tp) * shape["kv_channels"]
    return int(shape["num_layers"] * width * item)


def refuse_host_memory(needed: int, available: int, ranks: int, where: str, use: str = "what leaves the GPU",
                       remedy: str = "move less (--offload-train none)") -> None:
    """Raises MemoryError when `ranks` ranks of a node, each with `needed` bytes, want more than there is. A tenth is left to everything else."""
    if ranks * needed > available * 0.9:
        raise MemoryError(f"{where}: {ranks} rank(s) of this node want {ranks * needed / GIB:.1f} GiB of host memory for {use}, "
                          f"and {available / GIB:.1f} GiB are free: {remedy}, use more data-parallel ranks, or say how much "
                          "there is with --host-memory-gib if the kernel does not know")


def table(rows: Mapping[str, int], plan: SwapPlan) -> str:
    """The plan in lines: bytes a tag, and where it is while engines generate."""
    lines = [f"memory plan: {plan.rung}: {plan.why}"]
    for tag, n in rows.items():
        there = "stays" if tag not in plan.leaves else "host" if tag in COPIED else "dropped"
        lines.append(f"  {tag:<12} {n / GIB:8.2f} GiB  {there}")
    return "\n".join(lines)
