"""From samples to steps and packs: nothing is lost, cut or dealt unevenly, whatever the lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmono.config.schema import Config
from rlmono.rollout.schedule import balance, first_fit, flops, plan_rollout, round_up

MODEL = dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=100)
VIRTUAL: dict[str, int] = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=40)


def dynamic(room: int, **options: object) -> Config:
    return Config(use_dynamic_batch_size=True, max_tokens_per_gpu=room, model=MODEL, **options)     # type: ignore[arg-type]


# ---------------------------------------------------------------- whole rollouts


@given(data=st.data(), steps=st.integers(1, 4), ranks=st.integers(1, 4), room=st.integers(1, 200), balanced=st.booleans())
@settings(deadline=None)
def test_every_sample_goes_somewhere_once(data: st.DataObject, steps: int, ranks: int, room: int, balanced: bool) -> None:
    size = data.draw(st.integers(1, 6)) * ranks
    lengths = data.draw(st.lists(st.integers(1, 120), min_size=size * steps, max_size=size * steps))
    plan = plan_rollout(lengths, [size] * steps, dynamic(room, balance_data=balanced), ranks)
    assert len(plan) == steps
    for i, step in enumerate(plan):
        assert len(step) == ranks and len({len(packs) for packs in step}) == 1, "ranks must run equally many packs"
        packs = [pack for rank in step for pack in rank]
        assert all(packs), "a pack without samples"
        assert sorted(s for pack in packs for s in pack) == list(range(i * size, (i + 1) * size))
        assert all(sum(lengths[s] for s in pack) <= room or len(pack) == 1 for pack in packs)


@given(data=st.data(), micro=st.integers(1, 3), ranks=st.integers(1, 3), balanced=st.booleans())
@settings(deadline=None)
def test_fixed_packs(data: st.DataObject, micro: int, ranks: int, balanced: bool) -> None:
    size = data.draw(st.integers(1, 5)) * micro * ranks
    lengths = data.draw(st.lists(st.integers(1, 120), min_size=size, max_size=size))
    [step] = plan_rollout(lengths, [size], Config(micro_batch_size=micro, balance_data=balanced, model=MODEL), ranks)
    assert all(len(pack) == micro for rank in step for pack in rank)
    assert sorted(s for rank in step for pack in rank for s in pack) == list(range(size))


def test_plans_by_hand() -> None:
    lengths = [5, 3, 4, 1, 9, 2, 2, 6]
    assert plan_rollout(lengths, [4, 4], dynamic(8), 1) == [[[[0, 1], [2, 3]]], [[[4], [5, 6], [7]]]]
    assert plan_rollout(lengths, [4, 4], dynamic(8), 2) == [[[[0, 1]], [[2, 3]]], [[[4], [6]], [[5], [7]]]]
    assert plan_rollout(lengths, [8], Config(micro_batch_size=2), 2) == [[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]]


def test_context_parallel_ranks_share_a_pack() -> None:
    assert plan_rollout([5, 5, 5, 5], [4], dynamic(10, context_parallel_size=2), 1) == [[[[0, 1, 2, 3]]]]


@pytest.mark.parametrize("sizes, ranks, config, message", [
    ([4, 3], 2, dynamic(10), "3 samples does not divide over 2 data-parallel ranks"),
    ([6], 2, Config(micro_batch_size=2), "packs of --micro-batch-size 2 in multiples of 2"),
    ([6], 2, dynamic(10, **VIRTUAL), "6 samples does not divide over 2 data-parallel ranks x 2 stages of a virtual pipeline"),
    ([12], 2, Config(micro_batch_size=2, **VIRTUAL), "packs of --micro-batch-size 2 in multiples of 4"),     # type: ignore[arg-type]
])
def test_what_does_not_divide_is_refused(sizes: list[int], ranks: int, config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rollout([1] * sum(sizes), sizes, config, ranks)


@given(samples=st.integers(1, 8), room=st.integers(1, 60), ranks=st.integers(1, 3), balanced=st.booleans())
def test_a_virtual_pipeline_goes_round(samples: int, room: int, ranks: int, balanced: bool) -> None:
    """Every rank has a multiple of the stages, and no pack is empty."""
    config = dynamic(room, balance_data=balanced, **VIRTUAL)
    lengths = [1 + (7 * i) % 40 for i in range(samples * 2 * ranks)]
    step, = plan_rollout(lengths, [len(lengths)], config, ranks)
    assert len({len(packs) for packs in step}) == 1 and len(step[0]) % 2 == 0 and all(pack for packs in step for pack in packs)
    assert sorted(i for packs in step for pack in packs for i in pack) == list(range(len(lengths)))


# ---------------------------------------------------------------- its parts


@given(lengths=LENGTHS, room=st.integers(1, 150))
def test_first_fit(lengths: list[int], room: int) -> None:
    packs = first_fit(range(len(lengths)), lengths, room)
    used = [sum(lengths[i] for i in pack) for pack in packs]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(n <= room or len(pack) == 1 for n, pack in zip(used, packs, strict=True))
    # a pack was opened only because no earlier one had room for its first sample
    for k, pack in enumerate(packs):
        for earlier in packs[:k]:
            assert sum(lengths[i] for i in earlier if i < pack[0]) + lengths[pack[0]] > room


@given(lengths=LENGTHS, room=st.integers(1, 150), multiple=st.integers(1, 5))
def test_round_up(lengths: list[int], room: int, multiple: int) -> None:
    lengths = lengths + [1] * (-len(lengths) % multiple)
    packs = first_fit(range(len(lengths)), lengths, room)
    more = round_up(packs, multiple)
    assert len(more) % multiple == 0 and len(more) - len(packs) < multiple and all(more)
    assert sorted(i for pack in more for i in pack) == list(range(len(lengths)))
    assert all(any(set(pack) <= set(old) for old in packs) for pack in more), "splitting must not mix packs"


@given(data=st.data(), parts=st.integers(1, 5))
def test_balance(data: st.DataObject, parts: int) -> None:
    size = parts * data.draw(st.integers(1, 8))
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size))
    dealt = balance(costs, parts)
    assert sorted(i for part in dealt for i in part) == list(range(size))
    assert {len(part) for part in dealt} == {size // parts} and all(part == sorted(part) for part in dealt)
    # Merging the largest with the smallest never widens the spread: it stays within that of neighbours in order of cost.
    ordered = sorted(costs, reverse=True)
    assert spread(costs, dealt) <= max(ordered[k] - ordered[k + parts - 1] for k in range(0, size, parts))


def spread(costs: Sequence[float], dealt: list[list[int]]) -> float:
    sums = [sum(costs[i] for i in part) for part in dealt]
    return max(sums) - min(sums)


def test_balance_by_hand() -> None:
    assert spread([8, 7, 6, 5, 4, 2], balance([8, 7, 6, 5, 4, 2], 2)) == 0      # 8 + 6 + 2 = 7 + 5 + 4
    assert balance([1, 2, 3, 4], 2) == [[0, 3], [1, 2]]
    assert balance([5, 5, 5], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_balanced_ranks_have_nearly_the_same_flops(ranks: int) -> None:
    """Response lengths with a long tail, over many rollouts: how far the slowest rank is above the mean, against dealing packs in turn."""
    draw, slowest = random.Random(ranks), {True: 0.0, False: 0.0}
    for _ in range(20):
        lengths = [min(4000, int(draw.paretovariate(1.2) * 100)) for _ in range(32 * ranks)]
        for balanced in slowest:
            [step] = plan_rollout(lengths, [32 * ranks], dynamic(4096, balance_data=balanced), ranks)
            cost = [sum(flops(lengths[i], MODEL) for pack in rank for i in pack) for rank in step]
            slowest[balanced] += max(cost) * ranks / sum(cost) / 20
    assert slowest[True] - 1 < (slowest[False] - 1) / 2, slowest


def test_flops_count_a_layer() -> None:
    """One token of a model of one layer: 2 a weight, and one position of attention."""
    one = {**MODEL, "num_layers": 1}
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 64 * 100       # q, k and v, o, the gated MLP, the head
    assert flops(1, one) == 2 * weights + 2 * 4 * 16
    assert flops(2000, MODEL) > 2 * flops(1000, MODEL)
