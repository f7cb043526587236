"""From the rewards of a rollout to the advantages on its packs, as `--advantage-estimator` says."""

from __future__ import annotations

from typing import Any, Sequence

import torch
import torch.distributed as dist

from rlmono.config.schema import Config
from rlmono.trainer import advantages
from rlmono.trainer.losses import kl_estimate
from rlmono.trainer.packs import Pack

Rewards = Sequence[tuple[int, int, float]]
"""(group, index, reward) of every sample of the rollout."""
TOKEN_LEVEL = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
"""Estimators with rewards of their own for each token; the KL penalty is one of them."""


def assign(c: Config, rewards: Rewards, packs: list[Pack], group: dist.ProcessGroup) -> None:
    """Set `advantages` (and the critic's `returns`) of packs that have their logprobs. `group`: the data-parallel ranks, which share the rollout."""
    by_token = c.advantage_estimator in TOKEN_LEVEL
    kl = _kl_of_samples(c, packs, group) if c.kl_coef > 0 and not by_token else {}
    scores = sample_scores(c, [(g, i, r - c.kl_coef * kl.get(i, 0.0)) for g, i, r in rewards])
    for p in packs:
        if by_token:
            _set_per_token(c, p, scores)
        else:
            p.set_per_sample(scores)
        if c.use_opd:
            assert p.old_log_probs is not None and p.teacher_log_probs is not None
            p.advantages = advantages.distilled(p.advantages, p.old_log_probs, p.teacher_log_probs, c.opd_kl_coef)
    if c.normalize_advantages or c.advantage_estimator.startswith("reinforce_plus_plus"):
        _whiten(packs, group)


def sample_scores(c: Config, rewards: Rewards) -> dict[int, float]:
    """Sample index -> its advantage; or, for an estimator on tokens, its score, which is then the reward of its last token."""
    values, groups, name = [r for _, _, r in rewards], [g for g, _, _ in rewards], c.advantage_estimator
    normalize = not c.disable_rewards_normalization
    if name in ("ppo", "reinforce_plus_plus"):
        out = advantages.grpo(values, groups, normalize=False)
    elif name == "rloo":
        out = advantages.rloo(values, groups)
    elif name in ("dr_grpo", "reinforce_plus_plus_baseline"):
        out = advantages.grpo(values, groups, normalize, divide_by_std=False)
    else:
        out = advantages.grpo(values, groups, normalize, not c.disable_grpo_std_normalization)
    return {index: float(a) for (_, index, _), a in zip(rewards, out, strict=True)}


def _set_per_token(c: Config, p: Pack, scores: dict[int, float]) -> None:
    lengths, device = [s.response_length for s in p.samples], p.advantages.device
    kl = torch.zeros_like(p.advantages)
    if c.kl_coef > 0:
        assert p.old_log_probs is not None and p.ref_log_probs is not None
        kl = kl_estimate(p.old_log_probs, p.ref_log_probs, c.kl_loss_type)
    given = [advantages.token_rewards(scores[s.index], k, m, c.kl_coef) for s, k, m in zip(p.samples, kl.cpu().split(lengths), p.masks, strict=True)]
    if c.advantage_estimator == "ppo":
        assert p.values is not None
        values = p.values.cpu().split(lengths)
        made = [advantages.gae(r, v, m, c.gamma, c.lambd) for r, v, m in zip(given, values, p.masks, strict=True)]
        p.advantages, p.returns = (torch.cat(x).float().to(device) for x in zip(*made, strict=True))
    else:
        p.advantages = torch.cat([advantages.discounted(r, m, c.gamma) for r, m in zip(given, p.masks, strict=True)]).float().to(device)


def _whiten(packs: list[Pack], group: dist.ProcessGroup) -> None:
    def total(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group)
        return x
    masks = [torch.cat(p.masks).to(p.advantages.device) for p in packs]
    for p, value in zip(packs, advantages.whiten([p.advantages for p in packs], masks, total), strict=True):
        p.advantages = value


def _kl_of_samples(c: Config, packs: list[Pack], group: dist.ProcessGroup) -> dict[int, float]:
    """Σ_t m · kl of every sample of the rollout, over all data-parallel ranks; the penalty goes into the reward before it is normalised."""
    mine: dict[int, float] = {}
    for p in packs:
        assert p.old_log_probs is not None and p.ref_log_probs is not None
        kl = kl_estimate(p.old_log_probs, p.ref_log_probs, c.kl_loss_type).double()
        for s, part, mask in zip(p.samples, kl.split([s.response_length for s in p.samples]), p.masks, strict=True):
            mine[s.index] = float((part.cpu() * mask).sum())
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return {k: v for part in parts for k, v in part.items()}
