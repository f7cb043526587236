"""Updates without HF tensors: the copies put every number where the way through HF tensors would. (On ranks: worlds/engine.py.)"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rlmono.engine.loadplan import LoadPlan, _block
from rlmono.models.mapping import Columns, GatedRows, QkvRows, Replicated, Rows, Tensor
from rlmono.weights.direct import _boxes, _pairs, _views, box_of, meet

HIDDEN, DIM, GROUPS = 6, 2, 4
SHAPE = dict(num_query_groups=GROUPS, kv_channels=DIM, num_attention_heads=3 * GROUPS)
KINDS: list[tuple[Tensor, tuple[int, ...], list[tuple[int, ...]]]] = [
    (Replicated("norm", "n"), (HIDDEN,), [(HIDDEN,)]),
    (Rows("q", "q"), (8, HIDDEN), [(8, HIDDEN)]),
    (Rows("words", "w", vocabulary=True), (12, HIDDEN), [(11, HIDDEN)]),
    (Columns("o", "o"), (HIDDEN, 8), [(HIDDEN, 8)]),
    (GatedRows("fc1", "gate", "up"), (16, HIDDEN), [(8, HIDDEN), (8, HIDDEN)]),
    (QkvRows("qkv", "q", "k", "v", shape=SHAPE), (5 * DIM * GROUPS, HIDDEN), [(3 * DIM * GROUPS, HIDDEN)] + [(DIM * GROUPS, HIDDEN)] * 2),
    (QkvRows("bias", "q", "k", "v", shape=SHAPE), (5 * DIM * GROUPS,), [(3 * DIM * GROUPS,)] + [(DIM * GROUPS,)] * 2),
]


def shards(t: Tensor, full: torch.Tensor, size: int) -> list[torch.Tensor]:
    """As Megatron holds them."""
    if t.replicated:
        return [full] * size
    if isinstance(t, GatedRows):
        return [torch.cat([half.chunk(size)[r] for half in full.chunk(2)]) for r in range(size)]
    return list(full.chunk(size, t.cut_dimension))


@pytest.mark.parametrize("trainer_tp", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=[k[0].name for k in KINDS])
def test_every_part_of_every_tensor_comes_from_the_shards(kind: Any, trainer_tp: int) -> None:
    """Every block of an HF tensor that an engine might want, also across groups of queries and in the middle of one."""
    t, megatron, hf = kind
    full = torch.randn(megatron)
    expected = [x[:shape[0]] for x, shape in zip(t.to_hf(full), hf, strict=True)]
    places: dict[str, Any] = {name: (torch.Size(shape), []) for name, shape in zip(t.hf_names, hf, strict=True)}
    blocks = 0
    for i, (name, shape) in enumerate(zip(t.hf_names, hf, strict=True)):
        for wanted in itertools.product(*([(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape)):
            blocks += 1
            place = torch.full([b - a for a, b in wanted], float("nan"))
            for rank, shard in enumerate(shards(t, full, trainer_tp)):
                boxes = _boxes(t, places, rank, trainer_tp)
                for to, part in _pairs(_views(t, shard, boxes)[i], boxes[i], [(wanted, place)]):
                    assert part.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr(), "a copy was made"
                    to.copy_(part)
            assert torch.equal(place, expected[i][tuple(slice(*r) for r in wanted)]), (name, wanted)
    assert blocks > 10


def test_boxes_that_touch_do_not_meet() -> None:
    assert meet(((0, 4), (0, 2)), ((2, 6), (0, 2))) == ((2, 4), (0, 2))
    assert meet(((0, 4),), ((4, 6),)) is None
    assert box_of((7, 3), (slice(4, 8),)) == ((4, 7), (0, 3))


def test_blocks_of_a_tensor_are_told_from_other_parts() -> None:
    t = torch.arange(24.).view(4, 6)
    for part, expected in ((t[1:3], ((1, 3), (0, 6))), (t[:, 2:5], ((0, 4), (2, 5))), (t[2:3, 3:], ((2, 3), (3, 6))), (t.T, None), (t[::2], None),
                           (t[1], None)):
        assert _block(t.shape, (tuple(part.shape), part.stride(), int(part.storage_offset()))) == expected


def test_places_are_known_after_an_update_and_only_then() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    model = Model()
    plan = LoadPlan(model)

    def load(named: Any) -> None:
        for name, x in named:
            model.w[2 * (name == "b"):][:2].copy_(x[:, 3:])
    plan.load([(n, torch.randn(2, 6)) for n in "ab"], load)
    assert plan.places() is None, "other tensors may follow"
    plan.seal()
    found = plan.places()
    assert found is not None and {n: (s, [box for box, _ in places]) for n, (s, places) in found.items()} == {
        n: (torch.Size((2, 6)), [((0, 2), (3, 6))]) for n in "ab"}
    found["b"][1][0][1].fill_(7)
    assert model.w[2:].eq(7).all() and model.w[:2].ne(7).all()
    model.w.data = torch.zeros(4, 3)
    assert plan.places() is None, "the model has other memory"
