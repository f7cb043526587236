"""Which groups count: filters for `--dynamic-sampling-filter-path`, and what takes groups out of the data buffer.

    def my_filter(args, samples, **kwargs) -> bool                      # or a Verdict, or any object with `keep` and `reason`
    def my_buffer_filter(args, rollout_id, buffer, num_samples) -> list[list[Sample]]      # takes its groups out of `buffer`

A filter sees the finished and rewarded samples of one prompt; `args` is the config with flat names. A dropped group is counted as
`rollout/dynamic_filter/drop_<reason>`, where a filter that answers with a bool has its own name as the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from rlmono.config.schema import Config
from rlmono.data.sample import TRUNCATED, Group
from rlmono.rewards.load import load_function
from rlmono.rollout.failures import unjudged

STD = 1e-6
"""Rewards of a group whose standard deviation is not above it are equal."""


class Verdict(NamedTuple):
    """Whether a group counts, and if not, why: a few words that become a metric's name."""

    keep: bool
    reason: Optional[str] = None


Filter = Callable[..., Any]


def check_reward_nonzero_std(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Keep groups whose rewards differ (unbiased std in fp64 above 1e-6): where all are equal every advantage is 0. DAPO, arXiv:2503.14476."""
    rewards = _rewards(args, samples)
    keep = len(rewards) > 1 and float(rewards.std(ddof=1)) > STD
    return Verdict(keep, None if keep else f"zero_std_{round(float(rewards[0]), 1)}")


def check_not_all_correct(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop prompts that the model has mastered: every sample right, that is with a reward of 1 or more."""
    return _unless(bool((_rewards(args, samples) >= 1).all()), "all_correct")


def check_not_all_wrong(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop prompts that are beyond the model: no sample right, that is with a reward of 1 or more."""
    return _unless(not (_rewards(args, samples) >= 1).any(), "all_wrong")


def check_no_truncated(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop groups with a sample that ran into a length limit."""
    return _unless(any(s.status == TRUNCATED for s in samples), "truncated")


def check_not_all_truncated(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop groups in which every sample ran into a length limit."""
    return _unless(all(s.status == TRUNCATED for s in samples), "all_truncated")


def check_no_overlong(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop groups with a response in the last --overlong-buffer-len tokens of --rollout-max-response-len (without the option: at its end)."""
    limit = args.rollout_max_response_len - (args.overlong_buffer_len or 1)
    return _unless(any(s.response_length > limit for s in samples), "overlong")


def check_reward_failed(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    """Drop groups with a sample whose reward is no judgement: it raised, timed out or crashed, or its server is gone, and counts as 0."""
    remark = next(filter(None, map(unjudged, samples)), None)
    return Verdict(remark is None, remark)


def all_of(*filters: Filter) -> Filter:
    """A filter that keeps what all of these keep; the reason is the first one's that drops. `keep = all_of(a, b)` in a file of your own."""
    def every(args: Any, samples: Group, **kwargs: Any) -> Verdict:
        verdicts = (_verdict(f, f(args, samples, **kwargs)) for f in filters)
        return next((v for v in verdicts if not v.keep), Verdict(True))
    return every


def pop_first(args: Any, rollout_id: int, buffer: list[Group], num_samples: int) -> list[Group]:
    """The groups that came back first."""
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken


# ---------------------------------------------------------------- calling a user's

def load_filter(config: Config) -> Optional[Filter]:
    """The run's filter. Raises LoadError (a ValueError) when there is no such function."""
    path = config.dynamic_sampling_filter_path
    return load_function(path) if path is not None else None


def judge(filter: Optional[Filter], config: Config, group: Group) -> Verdict:
    """What the filter says of a group; one whose samples have all failed is dropped where others come for those that are.
    Raises RuntimeError that names the option when the filter fails or answers with nothing."""
    if not group and (filter is not None or config.over_sampling_batch_size is not None):
        return Verdict(False, "all_failed")
    if filter is None:
        return Verdict(True)
    where = f"--dynamic-sampling-filter-path {config.dynamic_sampling_filter_path}, on group {group[0].group_index}"
    try:
        answer = filter(config, group)
        if answer is None:
            raise TypeError("it returned None; a filter returns a bool, or an object with keep and reason")
        return _verdict(filter, answer)
    except Exception as e:
        raise RuntimeError(f"{where}: {type(e).__name__}: {e}") from e


def _verdict(filter: Filter, answer: Any) -> Verdict:
    """Of a bool (Python's, numpy's or torch's), or of an object with `keep` and perhaps `reason`."""
    keep = bool(getattr(answer, "keep", answer))
    reason = getattr(answer, "reason", None) or getattr(filter, "__name__", "filter")
    return Verdict(keep, None if keep else re.sub(r"[^\w.+-]+", "_", str(reason))[:64])


def _rewards(args: Any, samples: Group) -> np.ndarray:
    return np.array([s.get_reward_value(args) for s in samples], np.float64)


def _unless(bad: bool, reason: str) -> Verdict:
    return Verdict(not bad, reason if bad else None)
