"""Advantages: pure functions from the rewards of a rollout."""

from __future__ import annotations

from collections import defaultdict
from typing import Sequence

import torch


def grpo(rewards: Sequence[float], groups: Sequence[int], normalize: bool = True, divide_by_std: bool = True) -> torch.Tensor:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, §4.1.2), one a sample, fp32.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)     over the samples of i's own group, unbiased std

    Groups may differ in size; a group of one, or of equal rewards, has A = 0. Without `divide_by_std` only the mean is taken off (Dr. GRPO,
    arXiv:2503.20783); without `normalize` A is the reward. Computed in fp64.
    """
    r = torch.tensor(list(rewards), dtype=torch.float64)
    if not normalize:
        return r.float()
    members: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(groups):
        members[g].append(i)
    out = torch.zeros_like(r)
    for index in members.values():
        x = r[index]
        if x.max() == x.min():
            continue                    # rounding of the mean must not become an advantage
        centred = x - x.mean()
        out[index] = centred / (x.std() + 1e-6) if divide_by_std else centred
    return out.float()
