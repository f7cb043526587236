"""The rewards that `--rm-type` and a prompt's metadata can name: what a configuration, the prompts and the reward pool must know of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

BOXED = "boxed_"
"""Before a reward's name: it gets what stands in the response's last box, and nothing where there is none."""


@dataclass(frozen=True)
class RewardType:
    """One shipped reward. Paths are of functions (args, sample)."""

    path: str
    labelled: bool = False
    """It compares with the sample's label."""
    answer_path: Optional[str] = None
    """The function for a response that is the answer alone, where `path` looks for the answer in a text."""
    keys: tuple[str, ...] = ()
    """It returns a dict with these keys, of which --reward-key must name one."""
    concurrent: bool = False
    """It waits rather than computes, so that many are at work at a time."""
    check_path: Optional[str] = None
    """A function (label, metadata) that raises ValueError for a prompt which the reward cannot judge."""


REWARD_TYPES: dict[str, RewardType] = {
    "deepscaler": RewardType("rlmono.rewards.deepscaler.reward", labelled=True, answer_path="rlmono.rewards.deepscaler.reward_of_answer"),
    "dapo": RewardType("rlmono.rewards.dapo.reward", labelled=True, answer_path="rlmono.rewards.dapo.reward_of_answer", keys=("score", "acc")),
    "math": RewardType("rlmono.rewards.math.reward", labelled=True, answer_path="rlmono.rewards.math.reward_of_answer"),
    "f1": RewardType("rlmono.rewards.f1.reward", labelled=True),
    "gpqa": RewardType("rlmono.rewards.gpqa.reward", check_path="rlmono.rewards.gpqa.check"),
    "ifbench": RewardType("rlmono.rewards.ifbench.reward", check_path="rlmono.rewards.ifbench.check"),
    "remote_rm": RewardType("rlmono.rewards.remote_rm.reward", concurrent=True),
    "random": RewardType("rlmono.rewards.random.reward"),
}
RM_TYPES = (*REWARD_TYPES, *(BOXED + name for name in REWARD_TYPES))


def reward_type(name: str) -> RewardType:
    """The reward of a name, with or without `boxed_`. KeyError for any other."""
    return REWARD_TYPES[name.removeprefix(BOXED)]
