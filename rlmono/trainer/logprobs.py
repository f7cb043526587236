"""Log-probability and entropy of tokens from vocab-parallel logits, a chunk of tokens at a time.

Logits arrive in the model's dtype, [t, v / tp]; nothing of that size is ever made in fp32. The backward pass writes the
gradient over the logits, whose values are no longer needed then.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
import torch.distributed as dist

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
        for rows, x in _chunks(ctx, logits):
            top[rows] = x.amax(1)
            x -= top[rows, None]
            e = x.exp()
            total[rows] = e.sum(1)
            weighted[rows] = (e * x).sum(1)
            at_target[rows] = x.gather(1, ctx.local[rows, None])[:, 0]
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
        for rows, x in _chunks(ctx, logits):
            log_p = x.sub_(top[rows, None]).sub_(log_total[rows, None])
            g = log_p.exp() * -grad_logp[rows, None]
            if ctx.with_entropy_grad:
                g -= log_p.exp() * (log_p + entropy[rows, None]) * grad_entropy[rows, None]
            hit = ctx.mine[rows].nonzero()[:, 0]
            g[hit, ctx.local[rows][hit]] += grad_logp[rows][hit]
            logits[rows, :ctx.columns] = (g / ctx.temperature).to(logits.dtype)
            logits[rows, ctx.columns:] = 0
        return logits, None, None, None, None, None


def _chunks(ctx: Any, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, a copy of these rows' logits over the real vocabulary, in fp32 and divided by the temperature)."""
    for a in range(0, logits.shape[0], CHUNK):
        rows = slice(a, a + CHUNK)
        yield rows, logits[rows, :ctx.columns].to(torch.float32, copy=True).div_(ctx.temperature)
