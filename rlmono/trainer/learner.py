"""A model that learns: its chunks with their gradient buffers, optimizer and schedule; passes over packs, and steps."""

from __future__ import annotations

import logging
import math
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from rlmono.config.schema import Config
from rlmono.trainer import model, optimizer
from rlmono.trainer.objective import Parts
from rlmono.trainer.packs import Pack

log = logging.getLogger(__name__)
Objective = Callable[[Pack, torch.Tensor], tuple[torch.Tensor, Parts]]
"""(loss, weighted sums for metrics) of one pack from the model's output, [t, …]."""


class Learner:
    """Megatron's model, optimizer and schedule on this rank. `total_steps` is the number of optimizer steps of the whole run."""

    def __init__(self, config: Config, dtype: torch.dtype, total_steps: int, tf_config: TransformerConfig, chunks: list[Any]):
        self.config, self.dtype, self.tf_config = config, dtype, tf_config
        self.device = optimizer.this_device()
        self.chunks = [c.to(self.device) for c in chunks]
        self.ddp = model.wrap(config, tf_config, self.chunks)
        self.optimizer = optimizer.build_optimizer(config, dtype, self.ddp)
        self.schedule = optimizer.build_schedule(config, self.optimizer, total_steps)
        self.norms = optimizer.Norms(self.optimizer, self.ddp)
        self.skipped_steps = 0
        self.hooks: list[Callable[[], None]] = []       # before the optimizer uses its state

    @property
    def optimizers(self) -> list[Any]:
        """The distributed optimizers: one, or a second for experts under expert parallelism."""
        return optimizer.singles(self.optimizer)

    def buffers(self) -> dict[str, list[torch.Tensor]]:
        """Its memory by purpose: params and gradients (Megatron's flat buffers), and the optimizer's state, where it is not a view of params."""
        flat = [b for chunk in self.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        params = [b.param_data for b in flat if b.param_data is not None] or [p for c in self.chunks for p in c.parameters()]
        others = {t.untyped_storage().data_ptr() for t in params}
        state = [t for single in self.optimizers for group in single.optimizer.param_groups for p in group["params"]
                 for t in (p, *single.optimizer.state.get(p, {}).values()) if isinstance(t, torch.Tensor) and t.device.type == self.device.type]
        state = [t for t in state if t.untyped_storage().data_ptr() not in others and t.dim() > 0]
        return {"params": params, "gradients": [b.grad_data for b in flat], "optimizer": state}

    def weights_changed(self) -> None:
        """After weights were written into the module: the optimizer's fp32 copies follow."""
        self.optimizer.reload_model_params()

    def step(self, packs: list[Pack], objective: Objective) -> dict[str, float]:
        """One optimizer step; grad_norm and lr, those of each group of parameters, and on the last pipeline stage the objective's parts
        over all ranks."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(p: Pack, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Parts]:
            value, parts = objective(p, out)
            return value, torch.zeros((), dtype=torch.int, device=value.device), parts      # the schedule wants a count; nobody uses it
        collected = run(self.ddp, packs, loss, forward_only=False)
        self.schedule.step(1)
        return reduce(collected) | self._update() | {"lr": self.optimizer.param_groups[0]["lr"]}

    def _update(self) -> dict[str, float]:
        """Clip and step; a step whose gradient is not finite is skipped and counted, never taken."""
        for hook in self.hooks:
            hook()
        found_inf = self.optimizer.prepare_grads()
        norms = self.norms.measure()
        norm = norms["grad_norm"]
        if found_inf or not math.isfinite(norm):
            self.skipped_steps += 1
            log.warning("a gradient is not finite: the step is skipped, and weights and optimizer stay as they are (%d so far)", self.skipped_steps)
            return norms
        for single in self.optimizers:
            if self.config.clip_grad > 0 and single.get_parameters():
                clip_grad_by_total_norm_fp32(single.get_parameters(), max_norm=self.config.clip_grad, total_norm=norm,
                                             use_decoupled_grad=optimizer.decoupled(single))
        self.optimizer.step_with_ready_grads()
        return norms


def run(chunks: list[Any], packs: list[Pack], loss_func: Any, forward_only: bool) -> list[Any]:
    """Megatron's schedule over the packs; `loss_func(pack, output)` on the last stage. Returns what it collected, in order."""
    several = len(chunks) > 1

    def forward_step(packs_left: Iterable[Pack], m: Any) -> tuple[torch.Tensor, Any]:
        p = next(packs_left)        # type: ignore[call-overload]
        out = m(p.tokens[None], p.positions[None], None, packed_seq_params=p.params)
        return out, lambda output, non_loss_data=False: loss_func(p, output[0])
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=[iter(packs) for _ in chunks] if several else iter(packs),
        model=chunks if several else chunks[0], num_microbatches=len(packs),
        seq_length=1, micro_batch_size=1, forward_only=forward_only, collect_non_loss_data=forward_only)


@torch.no_grad()
def per_token(chunks: list[Any], packs: list[Pack], read: Callable[[Pack, torch.Tensor], torch.Tensor]) -> list[Any]:
    """[r] values of each pack's response tokens, by `read` from the model's output; None on all but the last pipeline stage."""
    out = run(chunks, packs, read, forward_only=True)
    return out if parallel_state.is_pipeline_last_stage() else [None] * len(packs)


def reduce(collected: list[Parts]) -> dict[str, float]:
    """Sums (or maxima) of the packs' parts over packs and data-parallel ranks; empty off the last pipeline stage."""
    if not parallel_state.is_pipeline_last_stage():
        return {}
    group = parallel_state.get_data_parallel_group()        # context-parallel ranks all have the whole pack's loss
    out: dict[str, float] = {}
    for maximum in (False, True):
        names = sorted(k for k in collected[0] if k.startswith("max:") == maximum)
        if not names:
            continue
        stacked = torch.stack([torch.stack([c[k].double() for k in names]) for c in collected])
        value = stacked.amax(0) if maximum else stacked.sum(0)
        dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)
        out |= {k.removeprefix("max:"): float(v) for k, v in zip(names, value, strict=True)}
    return out
