"""Adam over Megatron's distributed optimizer: where it computes, its schedule, and the norms of its groups of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import param_is_not_shared

from rlmono.config.schema import Config

GROUPS = ("decayed", "not_decayed", "experts")
"""Matrices, what weight decay leaves alone (norms, biases), and the experts' matrices; the same names on any layout."""


def build_optimizer(config: Config, dtype: torch.dtype, chunks: list[DistributedDataParallel]) -> Any:
    """Adam over the distributed optimizer (state and fp32 weights are sharded over data-parallel ranks)."""
    values: dict[str, Any] = dict(
        optimizer=config.optimizer, lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay, adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2, adam_eps=config.adam_eps, clip_grad=config.clip_grad, bf16=dtype == torch.bfloat16,
        params_dtype=dtype, use_distributed_optimizer=True)
    if in_host_memory(config):
        # Megatron's offload takes the road of the precision-aware optimizer: without, fp32 weights stay on the GPU, and new ones aren't seen.
        values.update(optimizer_cpu_offload=True, optimizer_offload_fraction=1.0, use_precision_aware_optimizer=True,
                      overlap_cpu_optimizer_d2h_h2d=config.overlap_cpu_optimizer_d2h_h2d)
    names = {f.name for f in dataclasses.fields(OptimizerConfig)}
    values.update({k: v for k, v in config.megatron.items() if k in names})
    optimizer = get_megatron_optimizer(OptimizerConfig(**values), chunks)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    for single in singles(optimizer):
        _allocate_adam_state(single.optimizer)
    return optimizer


def in_host_memory(config: Config) -> bool:
    """Whether Adam is to be somewhere else than the weights."""
    return config.optimizer_cpu_offload and torch.cuda.is_available()


def singles(optimizer: Any) -> list[Any]:
    """The distributed optimizers: one, or a second for experts under expert parallelism; without one that has nothing to do here."""
    return [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if not getattr(o, "is_stub_optimizer", False)]


def _allocate_adam_state(adam: Any) -> None:
    """torch's Adam makes its state at the first step; checkpoints and the memory plan want it from the start."""
    fused = isinstance(adam, torch.optim.Adam)          # AdamW is one
    if fused:
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)             # foreach makes a copy of all parameters in passing
    for inner in getattr(adam, "sub_optimizers", [adam]):       # of HybridDeviceOptimizer: one, or one a parameter
        for group in inner.param_groups:
            for p in group["params"]:
                inner.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device if fused or inner is not adam else "cpu"),
                                  "exp_avg": torch.zeros_like(p.data), "exp_avg_sq": torch.zeros_like(p.data)}
    if hasattr(adam, "sub_optimizers"):
        adam._sync_sub_optimizers_state_to_hdo()


def build_schedule(config: Config, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
    """Learning rate and weight decay; step n (from 1) trains with their n-th value, so warm-up never begins with 0.

    Steps that are skipped count: the schedule is a place in the run. A decay never ends before the warm-up does.
    """
    decay = config.lr_decay_iters or total_steps
    warmup = config.lr_warmup_iters if config.lr_warmup_fraction is None else config.lr_warmup_fraction * decay
    decay = max(decay, int(warmup) + 1)
    start, end = config.weight_decay, config.weight_decay
    if config.weight_decay_incr_style != "constant":
        start, end = config.start_weight_decay, config.end_weight_decay    # type: ignore[assignment]    # checked to be there
    return OptimizerParamScheduler(
        optimizer, init_lr=config.lr_warmup_init, max_lr=config.lr, min_lr=config.min_lr, lr_warmup_steps=warmup, lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style, start_wd=start, end_wd=end, wd_incr_steps=total_steps, wd_incr_style=config.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
        wsd_decay_steps=min(config.lr_wsd_decay_iters or 0, decay - int(warmup)), lr_wsd_decay_style=config.lr_wsd_decay_style)


def this_device() -> torch.device:
    """Where this rank computes, and its collectives want their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# ---------------------------------------------------------------- norms

@dataclasses.dataclass(frozen=True)
class _Member:
    group: int                          # index into GROUPS
    single: Any
    shard: torch.Tensor                 # what the optimizer steps: this rank's part of a parameter
    counted: bool                       # False for a copy that another rank counts


class Norms:
    """Norms of gradients and weights over all trainers, by group. `names` are the parameters of the optimizer's model."""

    def __init__(self, optimizer: Any, chunks: Sequence[torch.nn.Module]):
        self._optimizer = optimizer
        names = {p: name for chunk in chunks for name, p in chunk.named_parameters()}
        self._members = [_Member(*found) for single in singles(optimizer) for found in _shards(single, names)]

    def measure(self) -> dict[str, float]:
        """`grad_norm` over all, and of each group `param_group/<name>/` lr, weight_decay, grad_norm and param_norm (of the weights before the
        step). Collective over trainers, whose pool is the default group; call it between `prepare_grads` and clipping.

        A gradient that is not finite anywhere, in a copy too, makes the norm not finite everywhere.
        """
        device = this_device()
        squares = torch.zeros(3, len(GROUPS), dtype=torch.float64, device=device)
        if self._members:
            at = torch.tensor([m.group for m in self._members], device=device)
            counted = torch.tensor([m.counted for m in self._members], dtype=torch.float64, device=device)
            for row, tensors in enumerate(([_gradient(m) for m in self._members], [m.shard.detach() for m in self._members])):
                norms = torch.stack(list(torch._foreach_norm(tensors, 2, dtype=torch.float32)))
                squares[row].index_add_(0, at, norms.double().square() * counted)       # 0 · NaN is NaN: no copy's is missed
            sizes = torch.tensor([m.shard.numel() for m in self._members], dtype=torch.float64, device=device)
            squares[2].index_add_(0, at, sizes * counted)
        dist.all_reduce(squares)
        gradients, weights, sizes = squares.cpu()
        out = {"grad_norm": float(gradients.sum().sqrt())}
        for i, name in enumerate(GROUPS):
            if sizes[i]:
                lr, decay = self._rates(name)
                out |= {f"param_group/{name}/lr": lr, f"param_group/{name}/weight_decay": decay,
                        f"param_group/{name}/grad_norm": float(gradients[i].sqrt()), f"param_group/{name}/param_norm": float(weights[i].sqrt())}
        return out

    def _rates(self, name: str) -> tuple[float, float]:
        """(learning rate, weight decay). Every rank has all of Megatron's groups, also those that it holds nothing of."""
        group = next(g for g in self._optimizer.param_groups if (g["wd_mult"] == 0) == (name == "not_decayed"))
        return float(group["lr"]), float(group["weight_decay"])


def _shards(single: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[tuple[int, Any, torch.Tensor, bool]]:
    for parameter, (group, place) in single.model_param_group_index_map.items():
        params = single.optimizer.param_groups[group]
        kind = "not_decayed" if params["wd_mult"] == 0 else "experts" if ".local_experts." in names[parameter] else "decayed"
        shard = params["params"][place]
        counted = param_is_not_shared(shard) and tensor_parallel.param_is_not_tensor_parallel_duplicate(shard, single.tp_group)
        yield GROUPS.index(kind), single, shard, bool(counted)


def _gradient(m: _Member) -> torch.Tensor:
    gradient = m.shard.decoupled_grad if decoupled(m.single) else m.shard.grad      # type: ignore[attr-defined]
    assert gradient is not None
    return gradient


def decoupled(single: Any) -> bool:
    """Whether gradients lie in `decoupled_grad`, beside weights of another dtype."""
    return bool(single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
