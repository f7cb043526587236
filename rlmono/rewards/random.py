"""`--rm-type random`: 0 or 1 by a coin that depends on the seed and the sample's number alone, so that a resumed run tosses the same."""

from __future__ import annotations

import hashlib
from typing import Any

from rlmono.data.sample import Sample


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """0.0 or 1.0, each half of the time."""
    return float(hashlib.blake2b(repr((args.rollout_seed, sample.group_index, sample.index)).encode()).digest()[0] & 1)
