"""From finished groups to what trainers get, and to the rollout's statistics."""

from __future__ import annotations

from collections import Counter
from typing import Any, Sequence

import numpy as np

from rlmono.config.batches import packs_multiple
from rlmono.config.schema import Config
from rlmono.data.sample import TRUNCATED, Group, Sample
from rlmono.rollout.schedule import plan_rollout
from rlmono.world.messages import TrainBatch, TrainSample, TrainStep


def train_batches(rollout_id: int, groups: Sequence[Group], steps: int, config: Config, data_parallel: int) -> list[TrainBatch]:
    """One batch for each data-parallel rank. Samples go in order of (group, sample), whatever order they finished in.

    Their number is not fixed: samples fail, and a generate function may return several for one. The steps are then as equal as can be, each
    divides by its own samples, and is filled up with samples that weigh nothing until it divides over the ranks
    (and, with a virtual pipeline, over its stages).
    Raises ValueError when there is nothing to train on.
    """
    samples = sorted((s for g in groups for s in g), key=lambda s: (s.group_index, s.index))
    if not samples:
        raise ValueError(f"rollout {rollout_id} has no sample to train on: all have failed")
    packed = [_train_sample(config, i, s) for i, s in enumerate(samples)]      # the index: several may be of one sample
    cuts = [len(samples) * k // steps for k in range(steps + 1)]
    multiple = data_parallel * packs_multiple(config) * (1 if config.use_dynamic_batch_size else config.micro_batch_size)
    filled = [_filled(packed[a:b], multiple) for a, b in zip(cuts, cuts[1:], strict=False)]
    flat = [s for step in filled for s in step]
    plan = plan_rollout([len(s.tokens) // TOKEN_BYTES for s in flat], [len(step) for step in filled], config, data_parallel)
    rewards = [(s.group_index, s.index, s.reward) for s in [*packed, *([FILLER] if len(flat) > len(packed) else [])]]
    totals = [(b - a, sum(s.trained_length for s in samples[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)]
    return [TrainBatch(rollout_id, [TrainStep([[flat[i] for i in pack] for pack in plan[k][rank]], max(n, 1), tokens)
                                    for k, (n, tokens) in enumerate(totals)], rewards) for rank in range(data_parallel)]


TOKEN_BYTES = 4
FILLER = TrainSample(-1, -1, 0.0, np.zeros(2, np.int32).tobytes(), 1, np.zeros(1, np.uint8).tobytes(), np.zeros(1, np.float32).tobytes())
"""Weighs nothing: its one response token is masked out, and it is a group of its own."""


def _filled(step: list[TrainSample], multiple: int) -> list[TrainSample]:
    return step + [FILLER] * (-len(step) % multiple or multiple * (not step))


def _train_sample(config: Config, index: int, s: Sample) -> TrainSample:
    mask = b"\1" * s.response_length if s.loss_mask is None else np.asarray(s.loss_mask, np.uint8).tobytes()
    log_probs = Sample.rollout_log_probs
    if len(mask) != s.response_length or (not log_probs.is_none(s) and log_probs.count(s) != s.response_length):
        raise ValueError(f"sample {s.index}: a response of {s.response_length} tokens with {len(mask)} mask entries and "
                         f"{log_probs.count(s)} logprobs")
    return TrainSample(index, s.group_index, 0.0 if config.loss_type == "sft" else training_reward(config, s),
                       Sample.tokens.bytes_of(s), s.response_length, mask, log_probs.bytes_of(s))


def training_reward(config: Config, s: Sample) -> float:
    """The reward that trains: the reward function's, less the cost of a response that comes near the limit."""
    reward = s.get_reward_value(config)
    if config.overlong_buffer_len is None:
        return reward
    return reward - config.overlong_penalty_factor * overlong_share(s.response_length, config.rollout_max_response_len, config.overlong_buffer_len)


def overlong_share(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), as a cost from 0 to 1: it grows linearly over the last `buffer` tokens
    before `limit`, and is 1 from there on."""
    return min(max((length - (limit - buffer)) / buffer, 0.0), 1.0)


def _mean_log_prob(s: Sample) -> float:
    """Of the tokens that are trained on."""
    return float(np.average(np.asarray(Sample.rollout_log_probs.view(s), np.float64), weights=s.loss_mask))


def rollout_statistics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """rollout/*: rewards, lengths, truncation, repetition, groups without variance, and counted remarks."""
    samples = [s for g in groups for s in g]
    raw, rewards = np.array([s.get_reward_value(config) for s in samples]), np.array([training_reward(config, s) for s in samples])
    lengths = np.array([s.response_length for s in samples])
    out: dict[str, Any] = {"rollout/raw_reward": raw.mean(), "rollout/rewards": rewards.mean(), "rollout/reward_std": rewards.std(),
           "rollout/response_len/mean": lengths.mean(), "rollout/response_len/max": lengths.max(), "rollout/response_len/min": lengths.min(),
           "rollout/response_len/median": np.median(lengths), "rollout/truncated_ratio": np.mean([s.status == TRUNCATED for s in samples]),
           "rollout/repetition_frac": np.mean([has_repetition(s.response) for s in samples]), "rollout/samples": len(samples),
           "rollout/log_probs": np.mean([_mean_log_prob(s) for s in samples if Sample.rollout_log_probs.count(s) and s.trained_length] or [0.0])}
    if any(s.loss_mask is not None for s in samples):
        out["rollout/trained_tokens_ratio"] = sum(s.trained_length for s in samples) / max(int(lengths.sum()), 1)
    out |= _zero_std(groups, config)
    out |= {f"rollout/remarks/{name}": n for name, n in Counter(r for s in samples for r in s.remarks).items()}
    return {k: float(v) for k, v in out.items()}


def _zero_std(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Groups whose rewards are all equal train nothing: how many, and how many at each reward."""
    flat = [values[0] for g in groups if len(values := [training_reward(config, s) for s in g]) > 1 and max(values) == min(values)]
    counts = Counter(f"rollout/zero_std/count_{v:g}" for v in flat)
    return {"rollout/zero_std/ratio": len(flat) / max(len(groups), 1), **{k: float(n) for k, n in counts.items()}}


def has_repetition(text: str) -> bool:
    """The text ends with one passage of 20 to 200 characters, four times or more."""
    end = text[-800:]
    return any(end[-4 * n:-n] == end[-3 * n:] for n in range(20, min(200, len(end) // 4) + 1))


def eval_statistics(name: str, groups: Sequence[Group], config: Config) -> dict[str, float]:
    """eval/<name> and its companions: mean reward, pass@k, truncation, length."""
    samples = [s for g in groups for s in g]
    lengths = np.array([s.response_length for s in samples])
    out = {f"eval/{name}": np.mean([s.get_reward_value(config) for s in samples]),
           f"eval/{name}/truncated_ratio": np.mean([s.status == TRUNCATED for s in samples]),
           f"eval/{name}/response_len": lengths.mean(), f"eval/{name}/samples": len(samples)}
    k = 2
    while k <= min(map(len, groups)):
        out[f"eval/{name}/pass_at_{k}"] = np.mean([pass_at_k([s.get_reward_value(config) for s in g], k) for g in groups])
        k *= 2
    out |= {f"eval/{name}/remarks/{remark}": n for remark, n in Counter(r for s in samples for r in s.remarks).items()}
    return {key: float(v) for key, v in out.items()}


def pass_at_k(rewards: Sequence[float], k: int) -> float:
    """Unbiased estimate that one of k samples is right, from n ≥ k of them (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Right is a reward of 1 or more.
    """
    n, c = len(rewards), sum(r >= 1 for r in rewards)
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
