"""Rewards, one file each, and which of them a sample gets. They run in worker processes: see `pool.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlmono.config.rewards import BOXED, REWARD_TYPES, RewardType, reward_type
from rlmono.data.sample import Sample
from rlmono.rewards.load import load_function


class RewardError(ValueError):
    """There is no usable reward; the message names the option and the remedy."""


class RewardFailure(Exception):
    """Raised by a reward function for one sample that it cannot judge: reward 0, counted under `remark`, with `detail` in the log once."""

    def __init__(self, remark: str, detail: str = "") -> None:
        super().__init__(f"{remark}: {detail}" if detail else remark)
        self.remark, self.detail = remark, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.remark, self.detail)


class Judge(NamedTuple):
    """The function for a sample, by its path. `boxed`: it gets the response's box alone. `custom`: it is a user's."""

    path: str
    boxed: bool = False
    custom: bool = False


def judge_of(args: Any, sample: Sample) -> Judge:
    """What judges a sample: its own `custom_rm_path` or `rm_type`, else `--custom-rm-path`, else its metadata's `rm_type`, else `--rm-type`.

    RewardError when there is none, or none of that name.
    """
    if sample.custom_rm_path:
        return Judge(sample.custom_rm_path, custom=True)
    return _judge(sample.rm_type, "rm_type of the sample") if sample.rm_type else default_judge(args, sample.metadata)


def default_judge(args: Any, metadata: Mapping[str, Any] | None = None) -> Judge:
    """`judge_of` without the sample: what the options say, and a prompt's metadata."""
    if args.custom_rm_path:
        return Judge(str(args.custom_rm_path), custom=True)
    name, source = _named(args, metadata)
    if not name:
        raise RewardError("there is no reward: set --rm-type or --custom-rm-path, or give each sample an rm_type in its metadata")
    return _judge(name, source)


def _judge(name: Any, source: str) -> Judge:
    kind = _type(name, source)
    boxed = name.startswith(BOXED)
    return Judge(kind.answer_path if boxed and kind.answer_path else kind.path, boxed)


def label_required(args: Any) -> bool:
    """Whether every prompt must have a label. (A prompt whose metadata names another reward is checked by `check_prompt`.)"""
    return args.custom_rm_path is None and bool(args.rm_type) and _type(args.rm_type, "--rm-type").labelled


def check_prompt(args: Any, label: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt that its shipped reward cannot judge: no label, bad metadata, or an option that is missing."""
    if args.custom_rm_path:
        return
    name, source = _named(args, metadata)
    if not name:
        if args.custom_generate_function_path is None:      # which may give rewards itself
            default_judge(args, metadata)
        return
    kind = _type(name, source)
    if kind.labelled and label in (None, "", []):
        raise RewardError(f"has no label, and the reward {name} ({source}) compares with one: name its key with --label-key")
    if kind.concurrent and args.rm_url is None:
        raise RewardError(f"{source} is {name}, and there is no --rm-url")
    if kind.keys and args.reward_key is None:
        raise RewardError(f"{source} is {name}, which returns a dict: name the key of its number with --reward-key {kind.keys[0]}")
    if kind.check_path:
        load_function(kind.check_path)(label, metadata)


def _named(args: Any, metadata: Mapping[str, Any] | None) -> tuple[Any, str]:
    named = (metadata or {}).get("rm_type")
    return (named, "rm_type of the sample's metadata") if named else (args.rm_type, "--rm-type")


def _type(name: Any, source: str) -> RewardType:
    try:
        return reward_type(name)
    except (KeyError, AttributeError):
        raise RewardError(f"{source} is {name!r}, but must be one of {', '.join(REWARD_TYPES)}, alone or after {BOXED}; "
                          "anything else goes in with --custom-rm-path") from None
