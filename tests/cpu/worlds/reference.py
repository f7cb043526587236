"""GRPO once more, by the papers' formulas, a sample at a time, on transformers' model: what the trainer is compared with.

Nothing here is shared with rlmono's trainer: no weights, no packs, no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Optional

import torch
from tiny import mask_of, response_log_probs, rollout_log_probs_of

from rlmono.world.messages import TrainSample


@dataclass(frozen=True)
class Objective:
    """The options of the loss, by their flags' meaning."""

    per_token: bool = False
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual: Optional[float] = None
    kl_type: str = "k1"
    kl_loss_coef: float = 0.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    temperature: float = 1.0
    off_policy: bool = False
    """Ratios against the samples' rollout logprobs; else against the policy itself."""


def kl(log_p: torch.Tensor, log_q: torch.Tensor, kind: str) -> torch.Tensor:
    """Schulman's estimators, as he writes them: with r = q(x) / p(x)."""
    log_r = log_q - log_p
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return 0.5 * log_r * log_r
    k3 = log_r.exp() - 1 - log_r
    return k3.clamp(max=10, min=-10) if kind == "low_var_kl" else k3


def normalised(samples: list[TrainSample], rewards: list[float]) -> list[float]:
    """Group-relative advantages."""
    out = []
    for s, reward in zip(samples, rewards, strict=True):
        group = [r for other, r in zip(samples, rewards, strict=True) if other.group_index == s.group_index]
        out.append((reward - mean(group)) / (stdev(group) + 1e-6) if len(set(group)) > 1 else 0.0)
    return out


def loss(policy: Any, reference: Any, samples: list[TrainSample], o: Objective, advantages: Optional[list[float]] = None) -> torch.Tensor:
    """The objective of a step over these samples, with gradients for `policy`. `advantages` where the rollout has other samples too."""
    forward = [response_log_probs(policy, s, o.temperature) for s in samples]
    with torch.no_grad():
        ref = [response_log_probs(reference, s, o.temperature)[0] for s in samples]
    sampled = [torch.tensor(rollout_log_probs_of(s)) if o.off_policy else log_p.detach() for s, (log_p, _) in zip(samples, forward, strict=True)]
    penalties = [float((torch.tensor(mask_of(s)) * kl(old, log_q, o.kl_type)).sum()) for s, old, log_q in zip(samples, sampled, ref, strict=True)]
    rewards = [s.reward - o.kl_coef * penalty for s, penalty in zip(samples, penalties, strict=True)]
    total, tokens = torch.zeros((), dtype=torch.float64), sum(sum(mask_of(s)) for s in samples)
    advantages = advantages or normalised(samples, rewards)
    for s, (log_p, entropy), old, log_q, advantage in zip(samples, forward, sampled, ref, advantages, strict=True):
        token_loss = surrogate((log_p - old).exp(), advantage, o) + o.kl_loss_coef * kl(log_p, log_q, o.kl_type) - o.entropy_coef * entropy
        masked = (token_loss * torch.tensor(mask_of(s))).double().sum()
        total = total + masked / (tokens if o.per_token else len(samples) * max(1, sum(mask_of(s))))
    return total


def surrogate(ratio: torch.Tensor, advantage: float, o: Objective) -> torch.Tensor:
    """-J of PPO (arXiv:1707.06347, eq. 7) with DAPO's two ranges, and dual clip (arXiv:1912.09729, eq. 5): min and max of objectives."""
    objective = torch.min(ratio * advantage, ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * advantage)
    if o.dual is not None and advantage < 0:
        objective = torch.max(objective, torch.tensor(o.dual * advantage))
    return -objective


def clipped_share(policy: Any, samples: list[TrainSample], o: Objective) -> dict[str, int]:
    """How many tokens each clip case of the objective holds in: the cases must occur, or the comparison shows nothing."""
    counts = {"above": 0, "below": 0, "dual": 0, "inside": 0}
    for s, a in zip(samples, normalised(samples, [s.reward for s in samples]), strict=True):
        with torch.no_grad():
            ratios = (response_log_probs(policy, s, o.temperature)[0] - torch.tensor(rollout_log_probs_of(s))).exp().tolist()
        for ratio, m in zip(ratios, mask_of(s), strict=True):
            if not m or math.isclose(a, 0):
                continue
            if a < 0 and o.dual is not None and ratio > o.dual:
                counts["dual"] += 1
            elif a > 0 and ratio > 1 + o.eps_high:
                counts["above"] += 1
            elif a < 0 and ratio < 1 - o.eps_low:
                counts["below"] += 1
            else:
                counts["inside"] += 1
    return counts
