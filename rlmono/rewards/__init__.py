"""Rewards, one file each, and which of them a sample gets. They run in worker processes: see `pool.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REWARDS: dict[str, str] = {
    "deepscaler": "rlmono.rewards.deepscaler.reward",
    "math": "rlmono.rewards.math.reward",
}
"""`--rm-type` → the function's path; all of them compare with the sample's label."""


class RewardError(ValueError):
    """There is no usable reward; the message names the option and the remedy."""


def reward_path(args: Any, metadata: Mapping[str, Any] | None = None) -> str:
    """The path of the reward function of a sample: `--custom-rm-path`, else its metadata's `rm_type`, else `--rm-type`."""
    if args.custom_rm_path:
        return str(args.custom_rm_path)
    named = (metadata or {}).get("rm_type")
    rm_type, source = (named, "rm_type of the sample's metadata") if named else (args.rm_type, "--rm-type")
    if not rm_type:
        raise RewardError("there is no reward: set --rm-type or --custom-rm-path, or give each sample an rm_type in its metadata")
    if rm_type not in REWARDS:
        raise RewardError(f"{source} is {rm_type!r}, but must be one of {', '.join(REWARDS)}; anything else goes in with --custom-rm-path")
    return REWARDS[rm_type]
