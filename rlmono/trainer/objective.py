"""The loss of one pack: pure functions put together as the config says.

    loss, parts = policy_objective(config, pack, log_probs, entropy)

`parts` are sums of w · x over the pack's tokens, so that a sum over packs and ranks is the step's mean; the name of one that
begins with `max:` is a maximum. A token whose weight is 0 is not trained on.
"""

from __future__ import annotations

from typing import Optional

import torch

from rlmono.config.schema import Config
from rlmono.trainer import losses
from rlmono.trainer.packs import Pack

Parts = dict[str, torch.Tensor]


def policy_objective(c: Config, p: Pack, log_probs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, Parts]:
    """Policy loss, KL loss and entropy bonus from the logprobs and entropy [n] of the response tokens."""
    w, now = p.weights, log_probs.detach()
    old = now if p.old_log_probs is None else p.old_log_probs
    token_loss, clipped = surrogate(c, p, log_probs, old)
    factor, parts = corrections(c, p, now, old)
    loss = pg_loss = (w * token_loss if factor is None else w * factor * token_loss).sum()
    change = now - old
    parts |= {"train/pg_loss": pg_loss.detach(), "train/pg_clipfrac": (w * clipped).sum(), "train/ppo_kl": (w * (change.expm1() - change)).sum()}
    if c.entropy_coef > 0:
        loss = loss - c.entropy_coef * (w * entropy).sum()
    if p.ref_log_probs is not None:
        kl = (w * losses.kl_estimate(log_probs, p.ref_log_probs, c.kl_loss_type)).sum()
        parts["train/kl_loss"] = kl.detach()
        if c.use_kl_loss:
            loss = loss + c.kl_loss_coef * kl
    if p.teacher_log_probs is not None:
        parts["train/opd_reverse_kl"] = (w * (now - p.teacher_log_probs)).sum()
    return loss, parts | mismatch(c, p, now)


def surrogate(c: Config, p: Pack, log_probs: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ℓ [n], clipped [n] bool). GSPO (arXiv:2507.18071, eq. 5 and 7) is PPO's with one ratio a sample, exp of the mean log ratio of
    its tokens."""
    high = c.eps_clip if c.eps_clip_high is None else c.eps_clip_high
    if c.advantage_estimator == "cispo":
        return losses.cispo_loss(log_probs, old, p.advantages, c.eps_clip, high)
    if c.advantage_estimator == "gspo":
        log_probs, old = (losses.per_sample(x, p.weights > 0, p.sample_of, len(p.samples)) for x in (log_probs, old))
    return losses.policy_loss(log_probs, old, p.advantages, c.eps_clip, high, c.eps_clip_c)


def corrections(c: Config, p: Pack, now: torch.Tensor, old: torch.Tensor) -> tuple[Optional[torch.Tensor], Parts]:
    """(factor [n] of the policy loss, None where it is 1; what to report): the mismatch with the engine, and samples of a policy too old.
    Denominators stay what they are: a token that is masked here counts as a loss of 0."""
    factor: Optional[torch.Tensor] = None
    parts: Parts = {}
    w, kept = p.weights, (p.weights > 0, p.sample_of, len(p.samples))
    if c.use_tis and p.rollout_log_probs is not None:
        ratio = losses.log_importance(old, p.rollout_log_probs, *kept, level=c.tis_level).exp()
        factor, outside = losses.importance_weights(ratio, c.tis_clip_low, c.tis_clip, c.tis_mode)
        parts |= {"train/tis": (w * ratio).sum(), "train/tis_clipfrac": (w * outside).sum()}
    if c.use_opsm:
        dropped = losses.off_policy_sequences(now, old, p.advantages, *kept, delta=c.opsm_delta)
        factor = (~dropped).to(w.dtype) if factor is None else factor * ~dropped
        parts["train/opsm_clipfrac"] = (w * dropped).sum()
    return factor, parts


def mismatch(c: Config, p: Pack, now: torch.Tensor) -> Parts:
    """Trainer against engine, on the weights that sampled: |Δ logprob|, and KL(engine || trainer) by k3."""
    if p.rollout_log_probs is None:
        return {}
    w = p.weights
    d = (now if p.old_log_probs is None or c.use_rollout_logprobs else p.old_log_probs) - p.rollout_log_probs
    return {"train/train_rollout_logprob_abs_diff": (w * d.abs()).sum(), "train/train_rollout_kl": (w * (d.expm1() - d)).sum(),
            "max:train/train_rollout_logprob_abs_diff_max": (d.abs() * (w > 0)).amax() if len(w) else d.abs().sum()}


def value_objective(c: Config, p: Pack, values: torch.Tensor) -> tuple[torch.Tensor, Parts]:
    """The critic's loss from the values [n] of what stands before each response token."""
    assert p.values is not None and p.returns is not None
    token_loss, clipped = losses.value_loss(values, p.values, p.returns, c.value_clip)
    loss = (p.weights * token_loss).sum()
    return loss, {"train/value_loss": loss.detach(), "train/value_clipfrac": (p.weights * clipped).sum(),
                  "train/value": (p.weights * values.detach()).sum(), "train/return": (p.weights * p.returns).sum()}
