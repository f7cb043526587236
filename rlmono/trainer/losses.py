"""Losses: pure functions on flat vectors with one entry a response token.

The loss of a step is  L = Σ_tokens w · ℓ,  summed over packs and ranks. The weights w are fixed for the step before packs
are made, so no layout and no packing can change L or its gradient:

    per sample (default)   w = m / (G · max(Σ_sample m, 1))     G = samples of the step
    per token              w = m / Σ_step m                     m = loss mask
"""

from __future__ import annotations

from typing import Optional

import torch


def token_weights(masks: list[torch.Tensor], samples: int, tokens: int, per_token: bool) -> torch.Tensor:
    """w for every response token of these samples, concatenated. `samples` and `tokens` (masked-in) count the whole step."""
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
