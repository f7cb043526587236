"""Log-probability and entropy of tokens from vocab-parallel logits, a chunk of tokens at a time.

Logits arrive in the model's dtype, [t, v / tp]; nothing of that size is ever made in fp32. The backward pass writes the
gradient over the logits, whose values are no longer needed then.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
import torch.distributed as dist

from rlmono.trainer.fused import fused

CHUNK = 1024


def logprobs_and_entropy(logits: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_size: int,
                         group: dist.ProcessGroup, with_entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target) [t], entropy [t]), fp32, of softmax(logits / temperature).

    logits: [t, v / tp], this rank's columns of the padded vocabulary; columns from `vocab_size` on get no probability.
    targets: [t] token ids. `group`: the tensor-parallel group. Entropy carries a gradient only if `with_entropy_grad`.
    The logits are consumed: backward overwrites them.
    """
    return _LogProb.apply(logits, targets, temperature, vocab_size, group, with_entropy_grad)


class _LogProb(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup,
                with_entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        start = dist.get_rank(group) * logits.shape[1]
        ctx.columns = max(0, min(logits.shape[1], vocab_size - start))
        ctx.temperature, ctx.with_entropy_grad = temperature, with_entropy_grad
        local = targets - start
        ctx.mine = (local >= 0) & (local < ctx.columns)
        ctx.local = local.clamp(0, max(0, ctx.columns - 1))
        top, total, weighted, at_target = (logits.new_zeros(len(targets), dtype=torch.float32) for _ in range(4))
        # Everything counts from the largest logit: a log-partition far from 0 would round small differences away.
        for rows in _chunks(logits):
            top[rows], total[rows], weighted[rows], at_target[rows] = _statistics(logits[rows, :ctx.columns], ctx.local[rows], temperature)
        at_target = torch.where(ctx.mine, at_target, 0.0)
        if dist.get_world_size(group) > 1:
            overall = top.clone()
            dist.all_reduce(overall, dist.ReduceOp.MAX, group=group)
            down = top - overall
            sums = torch.stack([total, weighted + down * total, torch.zeros_like(total)]) * down.exp()
            sums[2] = torch.where(ctx.mine, at_target + down, 0.0)
            dist.all_reduce(sums, group=group)
            top, (total, weighted, at_target) = overall, sums
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(logits, top, log_total, entropy)
        ctx.mark_non_differentiable(*([] if with_entropy_grad else [entropy]))
        return at_target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        logits, top, log_total, entropy = ctx.saved_tensors
        grad_logp, grad_entropy = grads
        grad_target = torch.where(ctx.mine, grad_logp, 0.0)
        for rows in _chunks(logits):
            here = logits[rows, :ctx.columns]
            about = (top[rows], log_total[rows], ctx.local[rows], ctx.temperature, grad_logp[rows], grad_target[rows])
            here.copy_(_gradient_with_entropy(here, *about, entropy[rows], grad_entropy[rows]) if ctx.with_entropy_grad else _gradient(here, *about))
            logits[rows, ctx.columns:] = 0
        return logits, None, None, None, None, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    return (slice(a, a + CHUNK) for a in range(0, logits.shape[0], CHUNK))


@fused
def _statistics(logits: torch.Tensor, local: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """Of x = logits / temperature, [t, columns]: its largest value m a row, Σ exp(x - m), Σ exp(x - m)·(x - m), and x - m at column `local`."""
    x = logits.float() / temperature
    top = x.amax(1)
    x = x - top[:, None]
    e = x.exp()
    return top, e.sum(1), (e * x).sum(1), x.gather(1, local[:, None])[:, 0]


@fused
def _gradient(logits: torch.Tensor, top: torch.Tensor, log_total: torch.Tensor, local: torch.Tensor, temperature: float, grad: torch.Tensor,
              grad_target: torch.Tensor) -> torch.Tensor:
    """d/d logits of Σ grad · log p(target): grad_target where the target is, less grad · p everywhere."""
    log_p = logits.float() / temperature - top[:, None] - log_total[:, None]
    hit = torch.arange(logits.shape[1], device=logits.device) == local[:, None]
    return ((torch.where(hit, grad_target[:, None], 0.0) - log_p.exp() * grad[:, None]) / temperature).to(logits.dtype)


@fused
def _gradient_with_entropy(logits: torch.Tensor, top: torch.Tensor, log_total: torch.Tensor, local: torch.Tensor, temperature: float,
                           grad: torch.Tensor, grad_target: torch.Tensor, entropy: torch.Tensor, grad_entropy: torch.Tensor) -> torch.Tensor:
    """As `_gradient`, and Σ grad_entropy · entropy, whose gradient is -p · (log p + entropy)."""
    log_p = logits.float() / temperature - top[:, None] - log_total[:, None]
    g = -log_p.exp() * (grad[:, None] + (log_p + entropy[:, None]) * grad_entropy[:, None])
    hit = torch.arange(logits.shape[1], device=logits.device) == local[:, None]        # not before: it is not there at the peak of memory
    return ((torch.where(hit, grad_target[:, None], 0.0) + g) / temperature).to(logits.dtype)
