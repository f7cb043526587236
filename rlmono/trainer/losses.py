"""Losses: pure functions on flat vectors with one entry a response token.

The loss of a step is  L = Σ_tokens w · ℓ,  summed over packs and ranks. The weights w are fixed for the step before packs
are made, so no layout and no packing can change L or its gradient:

    per sample (default)   w = m / (G · max(Σ_sample m, 1))     G = samples of the step
    per token              w = m / Σ_step m                     m = loss mask
    constant               w = m / (G · budget)                 Dr. GRPO, arXiv:2503.20783, §3.2: no length in the denominator
"""

from __future__ import annotations

from typing import Optional

import torch


def token_weights(masks: list[torch.Tensor], samples: int, tokens: int, per_token: bool, budget: Optional[int] = None) -> torch.Tensor:
    """w for every response token of these samples, concatenated. `samples` and `tokens` (masked-in) count the whole step; `budget` is
    the constant length of a response that Dr. GRPO divides by."""
    if budget is not None:
        return torch.cat([m / (samples * budget) for m in masks])
    if per_token:
        return torch.cat([m / max(tokens, 1) for m in masks])
    return torch.cat([m / (samples * max(float(m.sum()), 1.0)) for m in masks])


def policy_loss(log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, eps_clip: float, eps_clip_high: float,
                eps_clip_c: Optional[float] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ℓ [n], clipped [n] bool): PPO's clipped surrogate, with two ranges (DAPO, arXiv:2503.14476, eq. 10) and dual clip
    (arXiv:1912.09729, eq. 5).

        ratio = exp(log_probs - old_log_probs)
        ℓ = max(-A · ratio, -A · clamp(ratio, 1 - eps_clip, 1 + eps_clip_high));  for A < 0 at most -A · eps_clip_c
    """
    ratio = (log_probs - old_log_probs).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * eps_clip_c), loss)
    return loss, clipped


def per_sample(x: torch.Tensor, mask: torch.Tensor, sample_of: torch.Tensor, samples: int, mean: bool = True) -> torch.Tensor:
    """[n]: for each token, the mean (or sum) of x over the masked-in tokens of its sample; 0 where there are none. Summed in fp64."""
    m = mask.double()
    zeros = m.new_zeros(samples)
    sums = zeros.index_add(0, sample_of, x.double() * m)
    if mean:
        sums = sums / zeros.index_add(0, sample_of, m).clamp(min=1)
    return sums[sample_of].to(x.dtype)


def cispo_loss(log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, eps_clip: float,
               eps_clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ℓ [n], clipped [n] bool): CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5). The clipped ratio only weighs: every token keeps
    a gradient.

        ℓ = -sg(clamp(ratio, 1 - eps_clip, 1 + eps_clip_high)) · A · log_probs
    """
    ratio = (log_probs.detach() - old_log_probs).exp()
    weight = ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    return -weight * advantages * log_probs, weight != ratio


LARGEST_LOG_RATIO = 20.0
"""exp of it is beyond any sensible bound, and finite."""


def log_importance(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, sample_of: torch.Tensor, samples: int,
                   level: str) -> torch.Tensor:
    """[n] log of the ratio between the trainer's and the engine's probability of what was sampled.

        token      log p_train - log p_rollout of the token
        sequence   its sum over the sample
        geometric  its mean over the sample
    """
    d = train - rollout
    if level == "token":
        return d.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return per_sample(d, mask, sample_of, samples, mean=level == "geometric").clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def importance_weights(ratio: torch.Tensor, low: float, high: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [n] of each token's loss, outside [n] bool) from the ratios p_train / p_rollout, which correct for the mismatch of the two.

        truncate   clamp(ratio, low, high)                  TIS (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
                                                            RL Training", 2025); the truncation of IMPALA, arXiv:1802.01561
        mask       ratio where low ≤ ratio ≤ high, else 0   on tokens IcePop (Ring-1T, arXiv:2510.18855), on sequences MIS (Liu et al.,
                                                            "When Speed Kills Stability", 2025)
    """
    outside = (ratio < low) | (ratio > high)
    return ratio.clamp(low, high) if mode == "truncate" else torch.where(outside, 0.0, ratio), outside


def off_policy_sequences(log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                         sample_of: torch.Tensor, samples: int, delta: float) -> torch.Tensor:
    """[n] bool: tokens to leave out of the policy loss, by off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556): those with
    A < 0 in a sample whose mean of log p_old - log p is above delta."""
    drift = per_sample(old_log_probs - log_probs, mask, sample_of, samples)
    return (advantages < 0) & (drift > delta)


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ℓ [n], clipped [n] bool): squared error of the critic (PPO, arXiv:1707.06347, eq. 9), with the clip of its implementation
    (arXiv:2005.12729, §3): ℓ = max((V - R)², (clamp(V, V_old - clip, V_old + clip) - R)²)."""
    plain = (values - returns).square()
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(plain, bounded), bounded > plain


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimators of KL(policy || reference) from one sample of the policy (Schulman, "Approximating KL divergence", 2020).

    With d = log p - log p_ref:  k1 = d;  k2 = d² / 2;  k3 = exp(-d) - 1 + d;  low_var_kl = k3 clamped to ±10.
    """
    d = log_probs - ref_log_probs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind in ("k3", "low_var_kl"):
        k3 = (-d).expm1() + d           # exp(…) - 1 would round a small KL away
        return k3.clamp(-10, 10) if kind == "low_var_kl" else k3
    raise ValueError(f"unknown kl_loss_type {kind!r}")
