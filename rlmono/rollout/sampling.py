"""Sampling parameters of rollouts and of evaluation."""

from __future__ import annotations

from rlmono.config.schema import Config
from rlmono.world.messages import Sampling


def rollout_sampling(c: Config, eos_ids: tuple[int, ...]) -> Sampling:
    """How rollouts are sampled. `eos_ids` are the model's own."""
    return Sampling(c.rollout_max_response_len, c.rollout_temperature, c.rollout_top_p, c.rollout_top_k, _stops(c, eos_ids),
                    stop=c.rollout_stop or ())


def _stops(c: Config, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*eos_ids, *(c.rollout_stop_token_ids or ())}))


def eval_sampling(c: Config, eos_ids: tuple[int, ...]) -> Sampling:
    """How evaluations are sampled: what is unset falls back to the rollout's."""
    def either(value: float | None, fallback: float) -> float:
        return fallback if value is None else value
    return Sampling(int(either(c.eval_max_response_len, c.rollout_max_response_len)), either(c.eval_temperature, c.rollout_temperature),
                    either(c.eval_top_p, c.rollout_top_p), int(either(c.eval_top_k, c.rollout_top_k)), _stops(c, eos_ids),
                    stop=c.rollout_stop or ())
