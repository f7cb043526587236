"""Advantages: pure functions. First those of a whole rollout, with one value a sample; then those of one response, with one
value a token; last what is done to them over all tokens.

Tokens that the loss mask leaves out are no actions: they get 0, and time does not pass at them.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from typing import Callable, Iterator, Sequence

import torch


def grpo(rewards: Sequence[float], groups: Sequence[int], normalize: bool = True, divide_by_std: bool = True) -> torch.Tensor:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, §4.1.2), one a sample, fp32.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)     over the samples of i's own group, unbiased std

    Groups may differ in size; a group of one, or of equal rewards, has A = 0. Without `divide_by_std` only the mean is taken off (Dr. GRPO,
    arXiv:2503.20783); without `normalize` A is the reward. Computed in fp64.
    """
    r = torch.tensor(list(rewards), dtype=torch.float64)
    if not normalize:
        return r.float()
    out = torch.zeros_like(r)
    for index, x in _varied(r, groups):
        centred = x - x.mean()
        out[index] = centred / (x.std() + 1e-6) if divide_by_std else centred
    return out.float()


def rloo(rewards: Sequence[float], groups: Sequence[int]) -> torch.Tensor:
    """REINFORCE leave-one-out (arXiv:2402.14740; Kool et al. 2019), one a sample, fp32. Computed in fp64.

        A_i = r_i - 1/(k - 1) Σ_{j≠i} r_j = (r_i - mean(r)) · k/(k - 1)     over the k samples of i's own group

    A group of one has nothing to be compared with, and A = 0.
    """
    r = torch.tensor(list(rewards), dtype=torch.float64)
    out = torch.zeros_like(r)
    for index, x in _varied(r, groups):
        out[index] = (x - x.mean()) * (len(x) / (len(x) - 1))
    return out.float()


def _varied(r: torch.Tensor, groups: Sequence[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices, values) of each group whose values are not all equal: rounding of the mean must not become an advantage."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(groups):
        members[g].append(i)
    for index in members.values():
        x = r[index]
        if x.max() != x.min():
            yield index, x


# ---------------------------------------------------------------- one response: [n] values, and its loss mask [n]

def token_rewards(score: float, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef · kl at every token, and the score of the response on top of that at the last one (REINFORCE++, arXiv:2501.03262; PPO alike).
    fp64."""
    out = torch.where(mask > 0, -kl_coef * kl.double(), 0.0)
    kept = mask.nonzero()
    if len(kept):
        out[kept[-1]] += score
    return out


def discounted(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """REINFORCE's return (arXiv:2501.03262): G_t = r_t + gamma · G_{t+1}. fp64."""
    out = torch.zeros_like(rewards, dtype=torch.float64)
    out[mask > 0] = _decayed(rewards[mask > 0], gamma)
    return out


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lambd: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) by generalised advantage estimation (arXiv:1506.02438, eq. 16). fp64.

        δ_t = r_t + gamma · V_{t+1} - V_t;   A_t = δ_t + gamma · lambd · A_{t+1};   return_t = A_t + V_t

    values: V_t, of what stands before token t. After the last token V is 0: the response ends there.
    """
    kept = mask > 0
    v = values[kept].double()
    following = torch.cat([v[1:], v.new_zeros(min(1, len(v)))])
    advantages, returns = (torch.zeros_like(rewards, dtype=torch.float64) for _ in range(2))
    advantages[kept] = _decayed(rewards[kept].double() + gamma * following - v, gamma * lambd)
    returns[kept] = advantages[kept] + v
    return advantages, returns


def _decayed(x: torch.Tensor, decay: float) -> torch.Tensor:
    """[n]: out_t = x_t + decay · out_{t+1}."""
    backwards = accumulate(reversed(x.tolist()), lambda later, now: now + decay * later)
    return torch.tensor(list(backwards), dtype=torch.float64, device=x.device).flip(0)


# ---------------------------------------------------------------- all tokens

def distilled(advantages: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coef: float) -> torch.Tensor:
    """On-policy distillation: A - coef · (log p_student - log p_teacher), the one-sample estimate of the reverse KL as a cost of each
    token (MiniLLM, arXiv:2306.08543; Lu et al., "On-Policy Distillation", 2025)."""
    return advantages - coef * (student - teacher)


def whiten(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """(A - mean) / sqrt(var + 1e-8) over all masked-in tokens of a rollout, unbiased var (REINFORCE++, arXiv:2501.03262; "global batch
    normalisation"). fp32; computed in fp64.

    `total` sums a tensor over the ranks that share the rollout, so that the shares don't matter.
    """
    rows = [(v.double(), m.double()) for v, m in zip(values, masks, strict=True)]
    zero = torch.zeros((), dtype=torch.float64, device=values[0].device)
    count, weighted = total(torch.stack([sum((m.sum() for _, m in rows), zero), sum(((v * m).sum() for v, m in rows), zero)]))
    mean = weighted / count.clamp(min=1)
    squares = total(sum((((v - mean).square() * m).sum() for v, m in rows), zero))
    scale = (squares / (count - 1).clamp(min=1) + 1e-8).rsqrt()
    return [((v - mean) * scale * (m > 0)).float() for v, m in rows]
