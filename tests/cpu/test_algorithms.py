"""Losses and advantages as pure functions: hand-computed cases, and references in plain floats. The whole of them, through the
trainer, is in test_algorithm_worlds.py."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from rlmono.config.schema import Config
from rlmono.config.validate import CHECKS
from rlmono.data.sample import Sample
from rlmono.rollout.batch import overlong_share, rollout_statistics, train_batches
from rlmono.trainer import advantages, losses

T = torch.tensor
F64 = torch.float64


def close(found: torch.Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


# ---------------------------------------------------------------- one value a sample

REWARDS, GROUPS = [1.0, 0.0, 0.0, 5.0, 7.0, 3.0, 3.0, 2.0, 2.0, 8.0], [0, 0, 0, 1, 2, 2, 2, 3, 3, 2]
"""Groups of three, one, four (not side by side) and two, the last of equal rewards."""


def test_grpo_by_hand() -> None:
    third, four = math.sqrt(1 / 3), stdev([7, 3, 3, 8])
    expected = [2 / 3 / third, -1 / 3 / third, -1 / 3 / third, 0, 1.75 / four, -2.25 / four, -2.25 / four, 0, 0, 2.75 / four]
    close(advantages.grpo(REWARDS, GROUPS), expected, 1e-5)


def test_dr_grpo_takes_only_the_mean_off() -> None:
    close(advantages.grpo(REWARDS, GROUPS, divide_by_std=False), [2 / 3, -1 / 3, -1 / 3, 0, 1.75, -2.25, -2.25, 0, 0, 2.75])


def test_rloo_by_hand() -> None:
    """Each less the mean of the others of its group; a group of one has none."""
    close(advantages.rloo(REWARDS, GROUPS), [1, -0.5, -0.5, 0, 7 - 14 / 3, 3 - 18 / 3, 3 - 18 / 3, 0, 0, 8 - 13 / 3])


def test_rloo_of_random_groups_is_its_definition() -> None:
    draw = random.Random(3)
    groups = [draw.randrange(5) for _ in range(40)]
    rewards = [draw.gauss(0, 3) for _ in groups]
    others = [[r for j, (r, h) in enumerate(zip(rewards, groups, strict=True)) if h == g and j != i] for i, g in enumerate(groups)]
    close(advantages.rloo(rewards, groups), [r - mean(o) if o else 0 for r, o in zip(rewards, others, strict=True)], 1e-5)


@pytest.mark.parametrize("estimate", [advantages.grpo, advantages.rloo])
def test_equal_rewards_give_no_advantage_at_all(estimate: Callable[..., torch.Tensor]) -> None:
    assert not estimate([0.1] * 7, [0] * 7).any()         # 0.1 less the mean of seven of them is not 0 in floating point


def test_a_reward_that_is_not_finite_is_not_hidden() -> None:
    assert advantages.rloo([math.nan, 1.0, 2.0], [0, 0, 1]).isnan().tolist() == [True, True, False]


# ---------------------------------------------------------------- one value a token

def test_token_rewards_by_hand() -> None:
    kl, mask = T([0.5, 1.0, 2.0, 4.0]), T([1.0, 0.0, 1.0, 0.0])
    close(advantages.token_rewards(3.0, kl, mask, 0.1), [-0.05, 0, 3 - 0.2, 0])
    close(advantages.token_rewards(3.0, kl, torch.zeros(4), 0.1), [0, 0, 0, 0])
    close(advantages.token_rewards(3.0, kl[:0], mask[:0], 0.1), [])


def test_discounted_by_hand() -> None:
    rewards, mask = T([-0.05, 9.0, 2.8, 9.0, 1.0], dtype=F64), T([1.0, 0.0, 1.0, 0.0, 1.0])
    close(advantages.discounted(rewards, mask, 1.0), [3.75, 0, 3.8, 0, 1])
    close(advantages.discounted(rewards, mask, 0.5), [-0.05 + 0.5 * (2.8 + 0.5 * 1), 0, 3.3, 0, 1])
    close(advantages.discounted(rewards, mask, 0.0), [-0.05, 0, 2.8, 0, 1])
    close(advantages.discounted(rewards[:0], mask[:0], 0.9), [])


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lambd: float) -> list[float]:
    """Schulman's sum over all later δ."""
    delta = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=False)]
    return [sum((gamma * lambd) ** (later - t) * delta[later] for later in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0), (0.0, 0.7)])
def test_gae_is_its_definition_over_the_tokens_of_the_policy(gamma: float, lambd: float) -> None:
    draw = random.Random(7)
    for n in (0, 1, 2, 13):
        mask = [float(draw.random() < 0.7) for _ in range(n)]
        rewards, values = ([draw.gauss(0, 2) for _ in range(n)] for _ in range(2))
        kept = [i for i in range(n) if mask[i]]
        expected = dict(zip(kept, gae_by_definition([rewards[i] for i in kept], [values[i] for i in kept], gamma, lambd), strict=True))
        found, returns = advantages.gae(T(rewards, dtype=F64), T(values, dtype=F64), T(mask), gamma, lambd)
        close(found, [expected.get(i, 0.0) for i in range(n)], 1e-9)
        close(returns, [expected[i] + values[i] if i in expected else 0.0 for i in range(n)], 1e-9)


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5: δ = (0 + 2 - 1, 0 + 1 - 4, 3 - 2) = (1, -3, 1)."""
    found, returns = advantages.gae(T([0.0, 0.0, 3.0]), T([1.0, 4.0, 2.0]), torch.ones(3), 0.5, 0.5)
    close(found, [1 + 0.25 * (-3 + 0.25), -3 + 0.25, 1])
    close(returns, [1.3125, 1.25, 3])


def test_with_lambda_one_returns_do_not_depend_on_the_critic() -> None:
    rewards, mask = T([1.0, -2.0, 0.5]), torch.ones(3)
    for values in (T([0.0, 0.0, 0.0]), T([5.0, -3.0, 9.0])):
        close(advantages.gae(rewards, values, mask, 0.9, 1.0)[1], advantages.discounted(rewards, mask, 0.9).tolist())


def test_distillation_is_a_cost_of_each_token() -> None:
    close(advantages.distilled(T([1.0, 1.0]), T([-0.5, -3.0]), T([-1.5, -1.0]), 0.5), [0.5, 2.0])


# ---------------------------------------------------------------- whitening

VALUES = [T([1.0, 2.0, 50.0]), T([]), T([4.0, -1.0]), T([7.0])]
MASKS = [T([1.0, 1.0, 0.0]), T([]), T([1.0, 1.0]), T([1.0])]


def whitened() -> list[list[float]]:
    kept = [1.0, 2.0, 4.0, -1.0, 7.0]
    return [[(v - mean(kept)) / stdev(kept) if m else 0.0 for v, m in zip(vs.tolist(), ms.tolist(), strict=True)]
            for vs, ms in zip(VALUES, MASKS, strict=True)]


def test_whitening_leaves_masked_tokens_out() -> None:
    for found, expected in zip(advantages.whiten(VALUES, MASKS, lambda x: x), whitened(), strict=True):
        close(found, expected)


@pytest.mark.parametrize("shares", [([0, 1], [2, 3]), ([0, 1, 2], [3]), ([1], [0, 2, 3])])
def test_whitening_is_over_the_whole_rollout(shares: tuple[list[int], list[int]]) -> None:
    """Two ranks with uneven shares, one of them without a token."""
    meet, given, found = threading.Barrier(2, timeout=30), {}, {}

    def rank(me: int) -> None:
        def total(x: torch.Tensor) -> torch.Tensor:
            given[me] = x
            meet.wait()
            out = given[0] + given[1]
            meet.wait()
            return out
        out = advantages.whiten([VALUES[i] for i in shares[me]], [MASKS[i] for i in shares[me]], total)
        found.update(zip(shares[me], out, strict=True))
    threads = [threading.Thread(target=rank, args=(me,)) for me in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, expected in enumerate(whitened()):
        close(found[i], expected)


def test_whitening_of_one_token_or_none() -> None:
    close(advantages.whiten([T([3.0])], [T([1.0])], lambda x: x)[0], [0])
    close(advantages.whiten([T([3.0])], [T([0.0])], lambda x: x)[0], [0])


# ---------------------------------------------------------------- losses

SAMPLE_OF, MASK = T([0, 0, 0, 1, 2, 2]), T([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
X = [1.0, 10.0, 4.0, 7.0, -2.0, 0.5]


def test_means_and_sums_of_samples() -> None:
    """Sample 1 has no token that counts, and there is a fourth without a token."""
    close(losses.per_sample(T(X), MASK, SAMPLE_OF, 4), [2.5, 2.5, 2.5, 0, -0.75, -0.75])
    close(losses.per_sample(T(X), MASK, SAMPLE_OF, 4, mean=False), [5, 5, 5, 0, -1.5, -1.5])


def test_the_gradient_of_a_sample_mean_reaches_its_tokens() -> None:
    x = T(X, requires_grad=True)
    (losses.per_sample(x, MASK, SAMPLE_OF, 3) * T([1.0, 1.0, 1.0, 1.0, 10.0, 0.0])).sum().backward()
    close(x.grad, [1.5, 0, 1.5, 0, 5, 5])           # type: ignore[arg-type]


def test_weights_of_dr_grpo_know_no_lengths() -> None:
    masks = [T([1.0, 1.0, 0.0]), T([1.0])]
    close(losses.token_weights(masks, 4, 3, per_token=False, budget=10), [1 / 40, 1 / 40, 0, 1 / 40], 1e-9)
    close(losses.token_weights(masks, 4, 3, per_token=False), [1 / 8, 1 / 8, 0, 1 / 4], 1e-9)


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    log_probs = T([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = T([-1.0, -1.0 - math.log(2), -1.0 + math.log(2), -1.0 - math.log(2)])         # ratios 1, 2, 0.5, 2
    a = T([2.0, 3.0, 3.0, -1.0])
    loss, clipped = losses.cispo_loss(log_probs, old, a, 0.2, 0.3)
    loss.sum().backward()
    weights = [1, 1.3, 0.8, 1.3]
    close(loss, [w * advantage for w, advantage in zip(weights, a.tolist(), strict=True)])         # -w · A · -1
    close(log_probs.grad, [-w * advantage for w, advantage in zip(weights, a.tolist(), strict=True)])      # type: ignore[arg-type]
    assert clipped.tolist() == [False, True, True, True]


RATIOS = [0.1, 0.5, 1.0, 1.9, 3.0]


@pytest.mark.parametrize(("mode", "expected"), [("truncate", [0.4, 0.5, 1.0, 1.9, 2.0]), ("mask", [0.0, 0.5, 1.0, 1.9, 0.0])])
def test_importance_weights_by_hand(mode: str, expected: list[float]) -> None:
    weights, outside = losses.importance_weights(T(RATIOS), 0.4, 2.0, mode)
    close(weights, expected)
    assert outside.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize(("level", "expected"), [("token", [0.5, 10, -0.1, 3, 0.3, -0.7]), ("sequence", [0.4, 0.4, 0.4, 0, -0.4, -0.4]),
                                                 ("geometric", [0.2, 0.2, 0.2, 0, -0.2, -0.2])])
def test_log_importance_by_hand(level: str, expected: list[float]) -> None:
    d = T([0.5, 10.0, -0.1, 3.0, 0.3, -0.7])
    close(losses.log_importance(d - 2.0, torch.full((6,), -2.0), MASK, SAMPLE_OF, 3, level), expected, 1e-5)


def test_the_ratio_of_a_long_sequence_stays_finite() -> None:
    train, rollout = torch.full((1000,), -0.1), torch.full((1000,), -1.1)
    sample_of, mask = torch.zeros(1000, dtype=torch.long), torch.ones(1000)
    for a, b in ((train, rollout), (rollout, train)):
        ratio = losses.log_importance(a, b, mask, sample_of, 1, "sequence").exp()
        assert ratio.isfinite().all() and (losses.importance_weights(ratio, 0.5, 2.0, "mask")[0] == 0).all()


def test_off_policy_sequences_by_hand() -> None:
    """Drifts of 0.3 (with its hole left out), nothing, and 0.1; only a negative advantage is left out."""
    old, now = T([0.0, 9.0, 0.0, 5.0, 0.0, 0.0]), T([-0.2, 0.0, -0.4, 0.0, -0.3, 0.1])
    negative = -torch.ones(6)
    dropped = [losses.off_policy_sequences(now, old, a, MASK, SAMPLE_OF, 3, delta).tolist()
               for a, delta in ((negative, 0.2), (negative, 0.05), (negative, 0.4), (-negative, 0.0))]
    assert dropped == [[True] * 3 + [False] * 3, [True] * 3 + [False] + [True] * 2, [False] * 6, [False] * 6]


def test_value_loss_by_hand() -> None:
    """Old values 0, clip 0.5: inside; beyond, towards the return; beyond, away from it; below."""
    values = T([0.3, 2.0, 2.0, -1.0], requires_grad=True)
    loss, clipped = losses.value_loss(values, torch.zeros(4), T([1.0, 3.0, -1.0, -4.0]), 0.5)
    loss.sum().backward()
    close(loss, [0.49, 6.25, 9, 12.25])
    close(values.grad, [-1.4, 0, 6, 0])         # type: ignore[arg-type]
    assert clipped.tolist() == [False, True, False, True]


# ---------------------------------------------------------------- overlong responses

@pytest.mark.parametrize(("length", "share"), [(0, 0), (80, 0), (81, 0.05), (90, 0.5), (100, 1), (130, 1)])
def test_overlong_share_by_hand(length: int, share: float) -> None:
    assert overlong_share(length, limit=100, buffer=20) == pytest.approx(share)


def test_overlong_responses_cost_reward_in_training_and_not_in_raw_reward() -> None:
    config = Config(rollout_max_response_len=8, overlong_buffer_len=4, overlong_penalty_factor=0.5, model={"num_layers": 1})
    group = [Sample(index=i, tokens=[1] * (n + 1), response_length=n, rollout_log_probs=[-1.0] * n, reward=1.0) for i, n in enumerate((2, 6, 8))]
    (batch,) = train_batches(0, [group], 1, config, 1)
    expected = [1.0, 0.75, 0.5]
    assert [r for _, _, r in batch.rewards] == pytest.approx(expected)
    assert [s.reward for pack in batch.steps[0].packs for s in pack] == pytest.approx(expected)
    statistics = rollout_statistics([group], config)
    assert statistics["rollout/raw_reward"] == 1.0 and statistics["rollout/rewards"] == pytest.approx(0.75)
    assert statistics["rollout/zero_std/ratio"] == 0


# ---------------------------------------------------------------- what contradicts

@pytest.mark.parametrize(("options", "words"), [
    ({"advantage_estimator": "dr_grpo", "calculate_per_token_loss": True}, "calculate_per_token_loss"),
    ({"advantage_estimator": "rloo", "disable_rewards_normalization": True}, "disable_rewards_normalization"),
    ({"advantage_estimator": "cispo", "eps_clip_c": 3.0}, "eps_clip_c 3"),
    ({"use_tis": True, "use_rollout_logprobs": True}, "use_rollout_logprobs"),
    ({"use_tis": True, "tis_clip_low": 2.0}, "tis_clip_low 2"),
    ({"tis_mode": "mask"}, "tis_mode mask has no effect without --use-tis"),
    ({"opsm_delta": 1.0}, "opsm_delta 1.0 has no effect without --use-opsm"),
    ({"use_opd": True}, "--opd-teacher-load"),
    ({"overlong_buffer_len": 2000}, "overlong_buffer_len 2000"),
    ({"overlong_penalty_factor": 0.5}, "overlong_penalty_factor 0.5 has no effect without --overlong-buffer-len"),
    ({"critic_load": "/nowhere/at/all"}, "critic_load /nowhere/at/all does not exist"),
])
def test_contradictions_are_named(options: dict[str, Any], words: str) -> None:
    def problems(**given: Any) -> list[str]:
        config = Config(hf_checkpoint="x", num_rollout=1, **given)
        return [p for check in CHECKS for p in check(config)]
    (found,) = set(problems(**options)) - set(problems())
    assert words in found
