"""Losses, KL estimates, token weights and advantages against the same formulas in plain Python numbers, and logprobs against torch's own."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from rlmono.trainer.advantages import grpo
from rlmono.trainer.logprobs import CHUNK, logprobs_and_entropy
from rlmono.trainer.losses import kl_estimate, policy_loss, token_weights

# ---------------------------------------------------------------- the policy loss


def surrogate(logp: float, old: float, a: float, low: float, high: float, c: float | None) -> float:
    """PPO's clipped objective as its paper has it, case by case; the loss is its negative."""
    ratio = math.exp(logp - old)
    if a >= 0:
        objective = a * min(ratio, 1 + high)
    else:
        objective = a * max(ratio, 1 - low)
        if c is not None:
            objective = max(objective, c * a)
    return -objective


def slope(f: Callable[[float], float], x: float) -> float:
    """Central difference."""
    h = 1e-5
    return (f(x + h) - f(x - h)) / (2 * h)


CLIPS = [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.4, 3.0), (0.2, 0.2, 1.3), (0.0, 0.0, None)]


@pytest.mark.parametrize("low, high, c", CLIPS)
def test_policy_loss_and_its_gradient(low: float, high: float, c: float | None) -> None:
    draw = random.Random(1)
    rows = [(draw.uniform(-3, 0), draw.uniform(-3, 0), draw.choice((-1.5, -0.3, 0.0, 0.7, 2.0))) for _ in range(400)]
    edges = (1 - low, 1 + high, c or 1 - low)
    rows = [r for r in rows if all(abs(math.exp(r[0] - r[1]) - e) > 1e-3 for e in edges)]       # kinks have no slope
    logp = torch.tensor([r[0] for r in rows], dtype=torch.float64, requires_grad=True)
    old, advantages = (torch.tensor([r[i] for r in rows], dtype=torch.float64) for i in (1, 2))
    loss, clipped = policy_loss(logp, old, advantages, low, high, c)
    loss.sum().backward()
    assert logp.grad is not None
    for i, (x, y, a) in enumerate(rows):
        assert loss[i].item() == pytest.approx(surrogate(x, y, a, low, high, c), rel=1e-12, abs=1e-12)
        assert logp.grad[i].item() == pytest.approx(slope(lambda z, y=y, a=a: surrogate(z, y, a, low, high, c), x), rel=1e-6, abs=1e-8)
        ratio = math.exp(x - y)
        assert bool(clipped[i]) == ((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))


@pytest.mark.parametrize("ratio, advantage, c, loss, gradient", [
    (1.0, 2.0, None, -2.0, -2.0),           # on policy
    (1.5, 2.0, None, -2.4, 0.0),            # above the range, good: clipped
    (0.5, 2.0, None, -1.0, -1.0),           # below the range, good: not clipped
    (0.5, -2.0, None, 1.6, 0.0),            # below the range, bad: clipped
    (1.5, -2.0, None, 3.0, 3.0),            # above the range, bad: not clipped
    (5.0, -2.0, 3.0, 6.0, 0.0),             # far above, bad: at most c |A|
    (5.0, 2.0, 3.0, -2.4, 0.0),             # dual clip says nothing of good tokens
])
def test_policy_loss_by_hand(ratio: float, advantage: float, c: float | None, loss: float, gradient: float) -> None:
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found, _ = policy_loss(logp, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), 0.2, 0.2, c)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert logp.grad is not None and logp.grad.item() == pytest.approx(gradient)


def test_the_first_step_has_the_policy_gradient() -> None:
    """Ratio 1: the loss is -A, its gradient too, and nothing counts as clipped, even where rounding would say so."""
    logp = torch.randn(100, requires_grad=True)
    advantages = torch.randn(100)
    loss, clipped = policy_loss(logp, logp.detach(), advantages, 0.2, 0.2)
    loss.sum().backward()
    assert torch.equal(loss.detach(), -advantages) and torch.equal(logp.grad, -advantages) and not clipped.any()


# ---------------------------------------------------------------- KL


KLS: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.expm1(-d) + d,
    "low_var_kl": lambda d: min(10.0, max(-10.0, math.expm1(-d) + d))}


@pytest.mark.parametrize("kind", KLS)
def test_kl_estimates_and_their_gradients(kind: str) -> None:
    draw = random.Random(2)
    pairs = [(draw.uniform(-4, 0), draw.uniform(-4, 0)) for _ in range(200)]
    pairs += [(-9.0, -1.0), (-1.0, -9.0)]       # k3 of the first is e^8: the clamp holds
    logp = torch.tensor([p for p, _ in pairs], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(logp, torch.tensor([q for _, q in pairs], dtype=torch.float64), kind)
    found.sum().backward()
    assert logp.grad is not None
    for i, (p, q) in enumerate(pairs):
        assert found[i].item() == pytest.approx(KLS[kind](p - q), rel=1e-9, abs=1e-12)
        assert logp.grad[i].item() == pytest.approx(slope(lambda z, q=q: KLS[kind](z - q), p), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind, expected", [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2)),
                                            ("low_var_kl", 0.5 - 1 + math.log(2))])
def test_kl_by_hand(kind: str, expected: float) -> None:
    assert kl_estimate(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), kind).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind: str) -> None:
    """Their mean under the policy is the KL, which can be summed exactly here."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    mean = (p * kl_estimate(p.log(), q.log(), kind)).sum().item()
    assert mean == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))


def test_k3_keeps_small_differences_in_fp32() -> None:
    d = torch.tensor([1e-4, -1e-4, 1e-3])
    assert kl_estimate(d, torch.zeros(3), "k3").tolist() == pytest.approx([5e-9, 5e-9, 5e-7], rel=1e-3)
    assert kl_estimate(d, d, "k3").tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_kl_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# ---------------------------------------------------------------- weights of tokens

MASKS = [[1, 1, 1, 1], [1, 0, 1], [0, 0], [1], []]


def test_weights_a_sample_by_hand() -> None:
    found = token_weights([torch.tensor(m, dtype=torch.float32) for m in MASKS], samples=5, tokens=7, per_token=False)
    assert found.tolist() == pytest.approx([0.05] * 4 + [0.1, 0.0, 0.1] + [0.0, 0.0] + [0.2])


def test_weights_a_token_by_hand() -> None:
    found = token_weights([torch.tensor(m, dtype=torch.float32) for m in MASKS], samples=5, tokens=7, per_token=True)
    assert found.tolist() == pytest.approx([1 / 7] * 4 + [1 / 7, 0.0, 1 / 7] + [0.0, 0.0] + [1 / 7])


@pytest.mark.parametrize("per_token", [False, True])
def test_weights_do_not_depend_on_what_is_together(per_token: bool) -> None:
    masks = [torch.tensor(m, dtype=torch.float32) for m in MASKS]
    apart = torch.cat([token_weights([m], 5, 7, per_token) for m in masks])
    assert torch.equal(apart, token_weights(masks, 5, 7, per_token))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_step_without_tokens_has_no_loss(per_token: bool) -> None:
    assert token_weights([torch.zeros(3), torch.zeros(2)], 2, 0, per_token).tolist() == [0.0] * 5


# ---------------------------------------------------------------- advantages


def normalised(rewards: list[float], groups: list[int], by_std: bool = True) -> list[float]:
    out = []
    for r, g in zip(rewards, groups, strict=True):
        own = [x for x, other in zip(rewards, groups, strict=True) if other == g]
        centred = r - statistics.fmean(own)
        out.append((centred / (statistics.stdev(own) + 1e-6) if by_std else centred) if len(set(own)) > 1 else 0.0)
    return out


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_of_uneven_groups(by_std: bool) -> None:
    draw = random.Random(3)
    groups = [0] * 8 + [1] * 2 + [2] * 5 + [3] + [4] * 8
    draw.shuffle(groups)                # members need not stand together
    rewards = [draw.choice((0.0, 0.25, 1.0)) if g != 4 else 1.0 for g in groups]
    found = grpo(rewards, groups, divide_by_std=by_std)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(normalised(rewards, groups, by_std), rel=1e-6, abs=1e-7)
    assert all(found[i] == 0 for i, g in enumerate(groups) if g in (3, 4)), "one sample, or equal rewards, teach nothing"


def test_grpo_by_hand() -> None:
    assert grpo([1, 0, 0, 1], [7, 7, 7, 7]).tolist() == pytest.approx([0.8660239, -0.8660239, -0.8660239, 0.8660239], rel=1e-6)
    assert grpo([3, 1], [0, 0], divide_by_std=False).tolist() == [1.0, -1.0]
    assert grpo([3, 1, 5], [0, 0, 1], normalize=False).tolist() == [3.0, 1.0, 5.0]


def test_equal_rewards_have_no_advantage_however_they_round() -> None:
    """0.1 has no exact mean: an advantage of 1e-17 / 1e-6 would be a gradient."""
    assert grpo([0.1] * 7, [0] * 7).tolist() == [0.0] * 7


# ---------------------------------------------------------------- logprobs


@pytest.fixture(scope="module")
def one_rank() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_are_torchs(one_rank: dist.ProcessGroup, rows: int, temperature: float) -> None:
    """Forward and backward; 5 columns are padding that must get no probability and no gradient."""
    torch.manual_seed(rows)
    vocabulary, padded = 37, 42
    logits = (torch.randn(rows, padded) * 3).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    gradients = torch.randn(2, rows)
    logp, entropy = logprobs_and_entropy(logits * 1.0, targets, temperature, vocabulary, one_rank, with_entropy_grad=True)
    (gradients[0] * logp + gradients[1] * entropy).sum().backward()
    exact = logits.detach().double().requires_grad_()
    log_p = (exact[:, :vocabulary] / temperature).log_softmax(-1)
    wanted, wanted_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (gradients[0] * wanted + gradients[1] * wanted_entropy).sum().backward()
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, wanted.float(), rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy, wanted_entropy.float(), rtol=0, atol=3e-6)
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=0, atol=1e-5)
    assert not logits.grad[:, vocabulary:].any()


def test_entropy_has_a_gradient_only_where_it_is_asked_for(one_rank: dist.ProcessGroup) -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    logp, entropy = logprobs_and_entropy(logits * 1.0, torch.zeros(5, dtype=torch.long), 1.0, 11, one_rank)
    assert logp.requires_grad and not entropy.requires_grad


def test_large_logits_neither_overflow_nor_round_away(one_rank: dist.ProcessGroup) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    logp, entropy = logprobs_and_entropy(logits * 1.0, torch.tensor([0, 1]), 1.0, 3, one_rank, with_entropy_grad=True)
    (logp + entropy).sum().backward()
    assert logp.tolist() == pytest.approx([0.0, -math.log(3)], abs=1e-6) and entropy.tolist() == pytest.approx([0.0, math.log(3)], abs=1e-6)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_bf16_logits_are_reduced_in_fp32(one_rank: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 1000).bfloat16()
    logp, _ = logprobs_and_entropy(logits.clone(), torch.arange(50), 1.0, 1000, one_rank)
    torch.testing.assert_close(logp, logits.float().log_softmax(-1)[torch.arange(50), torch.arange(50)], rtol=0, atol=5e-6)
