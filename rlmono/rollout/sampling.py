"""Sampling parameters of rollouts and of evaluation."""

from __future__ import annotations

from rlmono.config.evals import EvalSet
from rlmono.config.schema import Config
from rlmono.world.messages import Sampling


def rollout_sampling(c: Config, eos_ids: tuple[int, ...]) -> Sampling:
    """How rollouts are sampled. `eos_ids` are the model's own."""
    return Sampling(c.rollout_max_response_len, c.rollout_temperature, c.rollout_top_p, c.rollout_top_k, _stops(c, eos_ids),
                    stop=c.rollout_stop or ())


def _stops(c: Config, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*eos_ids, *(c.rollout_stop_token_ids or ())}))


def eval_sampling(s: EvalSet, eos_ids: tuple[int, ...]) -> Sampling:
    """How an evaluation set is sampled."""
    return Sampling(s.max_response_len, s.temperature, s.top_p, s.top_k, tuple(sorted({*eos_ids, *s.stop_token_ids})), stop=s.stop)
