"""On a GPU: what is fused or replayed there against the same written plainly, and the swap of real memory."""

from __future__ import annotations

import math

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 1), (19456, 2560), (4096, 129)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_blocks_are_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from rlmono.weights import fp8
    from rlmono.weights.fp8_kernel import quantise
    x = (torch.randn(shape, device="cuda") * torch.logspace(-6, 3, shape[1], device="cuda")).to(dtype)
    x[0, 0] = 0
    for a, b in zip(quantise(x), fp8.quantise_block_plainly(x), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert fp8._kernel() is not None


def test_rope_is_what_it_is_on_a_cpu() -> None:
    from rlmono.trainer.rope import rotate
    torch.manual_seed(0)
    t, angles = torch.randn(50, 3, 40), torch.randn(30, 16)
    positions = torch.randint(0, 30, (50,))
    outs = []
    for device in ("cpu", "cuda"):
        x = t.clone().to(device).requires_grad_()
        y = rotate(x, angles.cos().to(device), angles.sin().to(device), positions.to(device))
        y.square().mul(torch.arange(40.0, device=device)).sum().backward()
        assert x.grad is not None
        outs.append((y.detach().cpu(), x.grad.cpu()))
    for a, b in zip(*outs, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_are_what_they_are_in_float64(entropy: bool) -> None:
    import os

    import torch.distributed as dist

    from rlmono.trainer.logprobs import logprobs_and_entropy
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    group = dist.new_group([0])
    torch.manual_seed(0)
    t, v, real, temperature = 2500, 1000, 990, 0.7
    logits, targets = torch.randn(t, v, device="cuda") * 5, torch.randint(0, real, (t,), device="cuda")
    weights = torch.randn(2, t, device="cuda")
    x = logits.double()[:, :real].requires_grad_()
    log_p = (x / temperature).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ((expected[0] * weights[0]).sum() + (expected[1] * weights[1]).sum() * entropy).backward()
    y = logits.clone().requires_grad_()
    found = logprobs_and_entropy(y * 1, targets, temperature, real, group, entropy)
    ((found[0] * weights[0]).sum() + ((found[1] * weights[1]).sum() if entropy else 0.0)).backward()
    assert x.grad is not None and y.grad is not None
    for a, b in ((found[0], expected[0]), (found[1], expected[1]), (y.grad[:, :real], x.grad)):
        assert float((a.double() - b).norm() / b.norm()) < 1e-5
    assert not y.grad[:, real:].any()


def test_what_leaves_the_gpu_comes_back() -> None:
    """Sizes across pinned pieces; memory is really free in the meantime."""
    from rlmono.memory.holding import Holding
    from rlmono.memory.host import HostMemory
    n = 600 * 2**20
    tensors = [torch.randint(0, 255, (n,), dtype=torch.uint8, device="cuda") for _ in range(3)] + [torch.randn(1000, device="cuda") for _ in range(5)]
    sums = [t.double().sum().item() for t in tensors]
    holding = Holding("x", tensors, kept=True, together=True)
    torch.cuda.empty_cache()
    memory = HostMemory(holding.nbytes + 2**20, pin=True)
    holding.reserve(memory)
    for _ in range(3):
        before = torch.cuda.mem_get_info()[0]
        holding.leave()
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info()[0] - before > 0.95 * holding.nbytes
        assert math.isclose(holding.come(), holding.nbytes)
        holding.wait()
        assert [t.double().sum().item() for t in tensors] == sums


def test_a_load_plan_replays_on_the_gpu() -> None:
    from torch import nn

    from rlmono.engine.loadplan import LoadPlan
    shapes = {"a": (64, 300), "b": (3000, 500)}
    model = nn.ParameterDict({k: nn.Parameter(torch.zeros(s, device="cuda"), requires_grad=False) for k, s in shapes.items()})

    def load(named: list[tuple[str, torch.Tensor]]) -> None:
        for name, t in named:
            model["a" if name in "xy" else "b"].data.narrow(0, 32 if name == "y" else 0, len(t)).copy_(t)
    plan = LoadPlan(model)
    for seed in range(3):
        torch.manual_seed(seed)
        named = [(n, torch.randn(s, device="cuda")) for n, s in (("x", (32, 300)), ("y", (32, 300)), ("b", (3000, 500)))]
        plan.load(named, load if seed == 0 else fail)
        plan.seal()
        assert plan.why_not == ""
        assert torch.equal(model["a"], torch.cat([named[0][1], named[1][1]])) and torch.equal(model["b"], named[2][1])


def fail(_: object) -> None:
    raise AssertionError("the long way was taken")
