"""On a GPU: what the swap moves comes back bit for bit, and to pin its host memory disturbs nobody."""

from __future__ import annotations

import pytest
import torch

from rlmono.memory.holding import Holding
from rlmono.memory.host import HostMemory
from rlmono.memory.plan import LEAVES, SwapPlan
from rlmono.memory.swap import Memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GIB = 2**30


def test_graphs_are_captured_while_host_memory_is_pinned() -> None:
    """An engine's CUDA graphs and the swap's memory are made at the same time."""
    memory = HostMemory(8 * GIB, pin=True)
    x, captured = torch.ones(1024, device="cuda"), 0
    while memory._ready < memory.nbytes and memory._error is None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
        graph.replay()
        assert float(y.sum()) == 2048
        captured += 1
    assert memory._error is None and captured > 0
    memory.take(8 * GIB - 4096)


def test_what_leaves_beside_a_rollout_comes_back() -> None:
    """Through all states, several times, with another pattern each time; what was dropped need not."""
    memory = Memory(None, SwapPlan("optimizer", LEAVES["optimizer"], "test"), HostMemory(3 * GIB, pin=True))
    state, gradients = torch.empty(GIB // 2, device="cuda"), torch.empty(1000, device="cuda")
    memory.adopt({"optimizer": [state], "gradients": [gradients]})
    for turn in range(4):
        state.copy_(torch.arange(GIB // 2, device="cuda") * (turn + 1) % 8191)
        total = state.double().sum().item()
        memory.to("sync")
        memory.to("rollout")
        before = torch.cuda.mem_get_info()[0]
        memory.wait()
        assert state.untyped_storage().nbytes() == 0 and torch.cuda.mem_get_info()[0] >= before
        memory.to("train")
        memory.wait()
        assert state.double().sum().item() == total and float(state[12345]) == 12345 * (turn + 1) % 8191


def test_the_pieces_of_a_copy_are_the_whole() -> None:
    holding, memory = Holding("x", [torch.randn(3 * GIB // 4 + 77, device="cuda")], kept=True), HostMemory(4 * GIB, pin=True)
    expected = torch.empty(0, device="cuda").set_(holding.storages[0]).clone()
    holding.reserve(memory)
    holding.leave()
    holding.come()
    holding.wait()
    assert torch.equal(torch.empty(0, device="cuda").set_(holding.storages[0]), expected)
