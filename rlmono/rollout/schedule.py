"""From a rollout's samples to optimizer steps and packs. Pure functions on lengths; indices count along `lengths`.

Denominators of the loss are fixed for a step before packs are made, so nothing here can change loss or gradients.
"""

from __future__ import annotations

import heapq
from itertools import accumulate
from typing import Any, Sequence

from rlmono.config.batches import packs_multiple
from rlmono.config.schema import Config

Packs = list[list[int]]
"""Packs of one data-parallel rank: lists of sample indices."""


def steps_per_rollout(config: Config) -> int:
    """Optimizer steps that a rollout's samples divide into."""
    if config.num_steps_per_rollout is not None:
        return config.num_steps_per_rollout
    return config.rollout_batch_size * config.n_samples_per_prompt // config.global_batch_size if config.global_batch_size else 1


def plan_rollout(lengths: Sequence[int], sizes: Sequence[int], config: Config, data_parallel: int) -> list[list[Packs]]:
    """[step][data-parallel rank] -> packs. Samples go to steps in order, as many as `sizes` says for each; in a step every rank
    gets the same number of packs.

    Raises ValueError when the samples of a step don't divide over the ranks.
    """
    assert sum(sizes) == len(lengths)
    ends = list(accumulate(sizes))
    return [plan_step(list(range(end - size, end)), lengths, config, data_parallel) for size, end in zip(sizes, ends, strict=True)]


def plan_step(indices: Sequence[int], lengths: Sequence[int], config: Config, data_parallel: int) -> list[Packs]:
    """One step: [data-parallel rank] -> packs."""
    if len(indices) % (data_parallel * packs_multiple(config)):
        raise ValueError(f"a step of {len(indices)} samples does not divide over {data_parallel} data-parallel ranks"
                         + (f" x {packs_multiple(config)} stages of a virtual pipeline" if packs_multiple(config) > 1 else ""))
    if config.use_dynamic_batch_size:
        assert config.max_tokens_per_gpu is not None
        packs = first_fit(indices, lengths, config.max_tokens_per_gpu * config.context_parallel_size)
        packs = round_up(packs, data_parallel * packs_multiple(config))
    else:
        packs = _fixed(indices, config.micro_batch_size, data_parallel * packs_multiple(config))
    if not config.balance_data:
        return [packs[rank::data_parallel] for rank in range(data_parallel)]
    cost = [sum(flops(lengths[i], config.model) for i in pack) for pack in packs]
    return [[packs[i] for i in part] for part in balance(cost, data_parallel)]


def first_fit(indices: Sequence[int], lengths: Sequence[int], room: int) -> Packs:
    """Each sample into the first pack with room for it; one that is longer than `room` is alone, never cut."""
    packs: Packs = []
    left: list[int] = []
    for i in indices:
        at = next((k for k, free in enumerate(left) if lengths[i] <= free), None)
        if at is None:
            packs.append([i])
            left.append(room - lengths[i])
        else:
            packs[at].append(i)
            left[at] -= lengths[i]
    return packs


def round_up(packs: Packs, multiple: int) -> Packs:
    """Split the packs with most samples until their number is a multiple; the number of samples is one."""
    packs = list(packs)
    while len(packs) % multiple:
        at = max(range(len(packs)), key=lambda k: len(packs[k]))
        half = len(packs[at]) // 2
        packs[at:at + 1] = [packs[at][:half], packs[at][half:]]
    return packs


def _fixed(indices: Sequence[int], size: int, multiple: int) -> Packs:
    if len(indices) % (size * multiple):
        raise ValueError(f"a step of {len(indices)} samples does not divide into packs of --micro-batch-size {size} in multiples of {multiple}")
    return [list(indices[i:i + size]) for i in range(0, len(indices), size)]


def flops(length: int, model: Any) -> float:
    """Forward FLOPs of one sequence: 2 a weight and token, and causal attention."""
    hidden, ffn, heads, dim = model["hidden_size"], model["ffn_hidden_size"], model["num_attention_heads"], model["kv_channels"]
    layer = hidden * dim * (2 * heads + 2 * model["num_query_groups"]) + 3 * hidden * ffn
    weights = model["num_layers"] * layer + hidden * model["vocab_size"]
    return 2.0 * weights * length + 2.0 * model["num_layers"] * heads * dim * length ** 2


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Split items into `parts` of equal number and nearly equal cost: the largest differencing method (Karmarkar & Karp 1982),
    in its balanced form: each partial solution has the same number of items in all its parts.

    `len(costs)` must be a multiple of `parts`. Items of a part come in ascending order.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for n, at in enumerate(range(0, len(order), parts)):
        subsets = [(costs[i], [i]) for i in order[at:at + parts]]
        heapq.heappush(heap, (subsets[-1][0] - subsets[0][0], n, subsets))
    while len(heap) > 1:
        _, n, a = heapq.heappop(heap)
        _, _, b = heapq.heappop(heap)
        # largest with smallest
        merged = [(x[0] + y[0], x[1] + y[1]) for x, y in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda s: (-s[0], s[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], n, merged))
    return [sorted(items) for _, items in sorted(heap[0][2], key=lambda s: min(s[1]))]
