"""Load plans: what a model's own loader did once is replayed as copies, to the bit; what is more than copies is left to the loader."""

from __future__ import annotations

from typing import Any, Callable, Iterable

import pytest
import torch
from torch import nn

from rlmono.engine.loadplan import LoadPlan

H, F, V, EXPERTS = 8, 12, 10, 4


class Model(nn.Module):
    """Loaders as inference engines write them: parts of a stacked parameter, a rank's rows or columns, experts, a head that is tied."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype = torch.float32, derived: bool = False):
        super().__init__()
        self.rank, self.size, self.derived = rank, size, derived
        new = lambda *shape: nn.Parameter(torch.full(shape, float("nan"), dtype=dtype), requires_grad=False)  # noqa: E731 - shorter than its uses
        self.embed, self.head, self.norm = new(V + 2, H), new(V, H), new(H)
        self.gate_up, self.down = new(2 * F // size, H), new(H, F // size)
        self.w13, self.w2 = new(EXPERTS, 2 * F // size, H), new(EXPERTS, H, F // size)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        params = dict(self.named_parameters())
        for name, t in named:
            part, n, r = name.split("."), F // self.size, self.rank
            if name == "embed":
                for p in (params["embed"], params["head"]):
                    p[:V].data.copy_(t)
                    p[V:].data.fill_(0)
            elif part[0] == "experts":
                place = self.w2.data[int(part[1])] if part[2] == "down" else self.w13.data[int(part[1])].narrow(0, n * (part[2] == "up"), n)
                place.copy_(t.narrow(1, r * n, n) if part[2] == "down" else t.narrow(0, r * n, n))
            elif name == "down":
                self.down.data.copy_(t.narrow(1, r * n, n))
            elif name in ("gate", "up"):
                self.gate_up.data.narrow(0, n * (name == "up"), n).copy_(t.narrow(0, r * n, n))
            elif name == "norm":
                self.norm.data.copy_(t.squeeze())
            else:
                raise KeyError(name)
        if self.derived:
            self.twice = self.down * 2


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    out = [("embed", torch.randn(V, H)), ("norm", torch.randn(1, H)), ("down", torch.randn(H, F))]
    both = torch.randn(2 * F, H)        # one storage for two tensors, as Megatron has them
    out += [("gate", both[:F]), ("up", both[F:])]
    for e in range(EXPERTS):
        out += [(f"experts.{e}.gate", torch.randn(F, H)), (f"experts.{e}.up", torch.randn(F, H)), (f"experts.{e}.down", torch.randn(H, F))]
    return out


def loader(model: Model, calls: list[Any]) -> Callable[[Any], None]:
    def load(named: Any) -> None:
        calls.append(len(named))
        model.load_weights(named)
    return load


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_copies_are_what_the_loader_does(rank: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmono.engine.loadplan.SMALL", 300)        # some alone, some together
    model, calls = Model(rank, size, dtype), []     # type: ignore[var-annotated]
    plan = LoadPlan(model)
    with torch.inference_mode():
        for seed in range(3):
            new = weights(seed)
            plan.load(new[:4], loader(model, calls))        # buckets
            plan.load(new[4:], loader(model, calls))
            plan.seal()
            expected = Model(rank, size, dtype)
            expected.load_weights(new)
            for name, p in expected.named_parameters():
                assert torch.equal(dict(model.named_parameters())[name], p), (seed, name)
                assert not torch.isnan(p).any()
    assert plan.why_not == "" and calls == [4, len(new) - 4], "the loader has run once"


def test_a_model_that_derives_something_is_loaded_the_long_way() -> None:
    model, calls = Model(0, 1, derived=True), []        # type: ignore[var-annotated]
    plan = LoadPlan(model)
    for seed in range(2):
        plan.load(weights(seed), loader(model, calls))
        assert torch.equal(model.twice, 2 * model.down)
    assert "aten.mul" in plan.why_not and "down" in plan.why_not and len(calls) == 2


def test_other_memory_other_shapes_and_new_names_are_recorded_anew() -> None:
    model, calls = Model(0, 1), []      # type: ignore[var-annotated]
    plan = LoadPlan(model)
    plan.load(weights(0), loader(model, calls))
    model.down.data = torch.zeros_like(model.down.data)
    plan.load(weights(1), loader(model, calls))
    assert torch.equal(model.down, dict(weights(1))["down"]) and len(calls) == 2
    with pytest.raises(KeyError, match="elsewhere"):
        plan.load([*weights(2), ("elsewhere", torch.zeros(1))], loader(model, calls))
    transposed = [(n, t.T.contiguous().T if n == "down" else t) for n, t in weights(3)]
    plan.load(transposed, loader(model, calls))
    assert torch.equal(model.down, dict(weights(3))["down"]) and len(calls) == 4
    plan.load(weights(4), loader(model, calls))
    assert torch.equal(model.down, dict(weights(4))["down"])


def test_a_copy_that_was_not_seen_is_missed() -> None:
    """As of a loader that copies in threads of its own."""
    model, calls = Model(0, 1), []      # type: ignore[var-annotated]
    plan = LoadPlan(model)
    plan.load([(n, t) for n, t in weights(0) if n != "down"], loader(model, calls))
    plan.seal()
    assert plan.why_not == "no copy was seen into a part of down"


def test_padding_is_filled_once_and_nothing_else_is_filled() -> None:
    model, calls = Model(0, 1), []      # type: ignore[var-annotated]
    plan = LoadPlan(model)
    plan.load(weights(0), loader(model, calls))
    plan.seal()
    assert plan.why_not == "" and not model.embed[V:].any()

    def first_zero(named: Any) -> None:
        model.load_weights(named)
        model.down.data.zero_()
    other = LoadPlan(model)
    other.load(weights(0), first_zero)
    assert other.why_not == "a part of down is filled anew"
