"""Every algorithm once more, by the papers' formulas, a sample and a token at a time, in plain floats, on transformers' models.

Nothing here is shared with rlmono's trainer but the names of the options: no weights, no packs, no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, Optional

import torch
from tiny import mask_of, response_log_probs, rollout_log_probs_of, tokens_of

from rlmono.world.messages import TrainSample

Rows = list[list[float]]
"""One list a sample, one number a response token."""


@dataclass
class Critic:
    """transformers' model without its head, and a value head [1, hidden]."""

    model: Any
    head: torch.Tensor

    def values(self, s: TrainSample) -> torch.Tensor:
        hidden = self.model.model(torch.tensor(tokens_of(s))[None]).last_hidden_state[0]
        return hidden[-s.response_length - 1:-1] @ self.head[0]


@dataclass
class Answer:
    """What the trainer should report, and losses with gradients."""

    loss: torch.Tensor
    advantages: Rows
    value_loss: Optional[torch.Tensor] = None
    metrics: dict[str, float] = field(default_factory=dict)


def answer(c: Any, samples: list[TrainSample], policy: Any, reference: Any = None, teacher: Any = None, critic: Optional[Critic] = None) -> Answer:
    """One step over these samples, which are the whole rollout."""
    log_probs = [response_log_probs(policy, s)[0] for s in samples]
    now = [x.tolist() for x in log_probs]
    engine = [rollout_log_probs_of(s) for s in samples]
    old = engine if c.use_rollout_logprobs else now
    masks = [mask_of(s) for s in samples]
    ref, taught = (frozen(m, samples) if m is not None else None for m in (reference, teacher))
    values = [critic.values(s) for s in samples] if critic else None
    kl = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(old, ref, strict=True)] if ref else [[0.0] * len(m) for m in masks]
    advantages, returns = credit(c, samples, masks, kl, [v.tolist() for v in values] if values else None)
    if taught:
        advantages = [[a - c.opd_kl_coef * (x - y) for a, x, y in zip(*row, strict=True)] for row in zip(advantages, old, taught, strict=True)]
    if c.normalize_advantages or c.advantage_estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        advantages = whitened(advantages, masks)
    total, weights = torch.zeros((), dtype=torch.float64), token_weights(c, masks)
    metrics = {"train/tis": 0.0, "train/tis_clipfrac": 0.0, "train/opsm_clipfrac": 0.0}
    for i, x in enumerate(log_probs):
        factors = corrections(c, now[i], old[i], engine[i], masks[i], advantages[i], weights[i], metrics)
        for t, token_loss in enumerate(token_losses(c, x, old[i], masks[i], advantages[i])):
            if masks[i][t]:
                total = total + weights[i][t] * factors[t] * token_loss.double()
    out = Answer(total, advantages, metrics=metrics)
    if values:
        out.value_loss = sum(((w * m * (v - r) ** 2).double() for row in zip(weights, masks, values, returns, strict=True)
                              for w, m, v, r in zip(*row, strict=True)), torch.zeros((), dtype=torch.float64))
    return out


@torch.no_grad()
def frozen(model: Any, samples: list[TrainSample]) -> Rows:
    return [response_log_probs(model, s)[0].tolist() for s in samples]


def token_weights(c: Any, masks: Rows) -> Rows:
    tokens, longest = sum(sum(m) for m in masks), c.rollout_max_response_len if c.advantage_estimator == "dr_grpo" else None
    return [[1 / (tokens if c.calculate_per_token_loss else len(masks) * (longest or max(1, sum(m)))) for _ in m] for m in masks]


# ---------------------------------------------------------------- advantages

def credit(c: Any, samples: list[TrainSample], masks: Rows, kl: Rows, values: Optional[Rows]) -> tuple[Rows, Rows]:
    """(advantages, returns) before distillation and whitening."""
    name = c.advantage_estimator
    by_token = name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
    rewards = [s.reward if by_token else s.reward - c.kl_coef * sum(k for k, m in zip(row, mask, strict=True) if m)
               for s, row, mask in zip(samples, kl, masks, strict=True)]
    scores = [score(name, i, [s.group_index for s in samples], rewards) for i in range(len(samples))]
    if not by_token:
        return [[a] * len(m) for a, m in zip(scores, masks, strict=True)], []
    advantages, returns = [[0.0] * len(m) for m in masks], [[0.0] * len(m) for m in masks]
    for i, mask in enumerate(masks):
        kept = [t for t, m in enumerate(mask) if m]
        reward = {t: -c.kl_coef * kl[i][t] + (scores[i] if t == kept[-1] else 0.0) for t in kept}
        for n, t in enumerate(kept):
            if values is None:
                advantages[i][t] = sum(c.gamma ** (k - n) * reward[kept[k]] for k in range(n, len(kept)))
                continue
            v = [values[i][k] for k in kept] + [0.0]
            advantages[i][t] = sum((c.gamma * c.lambd) ** (k - n) * (reward[kept[k]] + c.gamma * v[k + 1] - v[k]) for k in range(n, len(kept)))
            returns[i][t] = advantages[i][t] + v[n]
    return advantages, returns


def score(name: str, i: int, groups: list[int], rewards: list[float]) -> float:
    group = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
    others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == groups[i] and j != i]
    if name in ("reinforce_plus_plus", "ppo"):
        return rewards[i]
    if name == "rloo":
        return rewards[i] - mean(others) if others else 0.0
    if name in ("dr_grpo", "reinforce_plus_plus_baseline"):
        return rewards[i] - mean(group)
    return (rewards[i] - mean(group)) / (stdev(group) + 1e-6) if len(set(group)) > 1 else 0.0


def whitened(advantages: Rows, masks: Rows) -> Rows:
    kept = [a for row in zip(advantages, masks, strict=True) for a, m in zip(*row, strict=True) if m]
    return [[(a - mean(kept)) / stdev(kept) if m else 0.0 for a, m in zip(*row, strict=True)] for row in zip(advantages, masks, strict=True)]


# ---------------------------------------------------------------- losses

def token_losses(c: Any, log_probs: torch.Tensor, old: list[float], mask: list[float], advantages: list[float]) -> list[torch.Tensor]:
    high = c.eps_clip if c.eps_clip_high is None else c.eps_clip_high
    log_ratios = [x - o for x, o in zip(log_probs, old, strict=True)]
    if c.advantage_estimator == "gspo":
        kept = [x for x, m in zip(log_ratios, mask, strict=True) if m]
        log_ratios = [sum(kept, torch.zeros(())) / max(1, len(kept))] * len(log_ratios)
    out = []
    for log_p, log_ratio, a in zip(log_probs, log_ratios, advantages, strict=True):
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - c.eps_clip, 1 + high)
        if c.advantage_estimator == "cispo":
            out.append(-clipped.item() * a * log_p)
            continue
        objective = torch.min(ratio * a, clipped * a)
        out.append(-(torch.max(objective, torch.tensor(c.eps_clip_c * a)) if c.eps_clip_c is not None and a < 0 else objective))
    return out


def corrections(c: Any, now: list[float], old: list[float], engine: list[float], mask: list[float], advantages: list[float], weights: list[float],
                metrics: dict[str, float]) -> list[float]:
    """What each token's policy loss is multiplied with; adds to the metrics."""
    kept = [t for t, m in enumerate(mask) if m]
    factors = [1.0] * len(mask)
    if c.use_tis:
        d = [o - e for o, e in zip(old, engine, strict=True)]
        whole = sum(d[t] for t in kept)
        for t in kept:
            ratio = math.exp({"token": d[t], "sequence": whole, "geometric": whole / len(kept)}[c.tis_level])
            inside = c.tis_clip_low <= ratio <= c.tis_clip
            factors[t] = ratio if inside else 0.0 if c.tis_mode == "mask" else c.tis_clip if ratio > c.tis_clip else c.tis_clip_low
            metrics["train/tis"] += weights[t] * ratio
            metrics["train/tis_clipfrac"] += weights[t] * (not inside)
    if c.use_opsm and kept and mean(old[t] - now[t] for t in kept) > c.opsm_delta:
        for t in kept:
            if advantages[t] < 0:
                factors[t] = 0.0
                metrics["train/opsm_clipfrac"] += weights[t]
    return factors
