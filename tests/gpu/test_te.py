"""On a GPU with Transformer Engine: a packed model with its attention and norms against the same with rlmono's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as e:
        return f"Transformer Engine does not import here: {type(e).__name__}: {e}"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Of one rank, with Megatron."""
    import torch.distributed as dist

    from rlmono.trainer import compat
    sys.path[:0] = [str(ROOT / "tests" / "cpu" / "worlds")]
    compat.prepare()
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    yield
    sys.path.remove(str(ROOT / "tests" / "cpu" / "worlds"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of random_model.py, whose norms are not all 1."""
    from safetensors.torch import load_file, save_file
    out = {}
    for name in ("tiny", "moe", "deepseek"):
        folder = tmp_path_factory.mktemp(name)
        subprocess.run([sys.executable, "tests/bench/random_model.py", name, str(folder)], cwd=ROOT, check=True, timeout=120)
        path = folder / "model" / "model.safetensors"
        torch.manual_seed(0)
        weights = {k: torch.randn(w.shape).mul(0.2).add(1).to(w.dtype) if "norm" in k else w for k, w in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
        out[name] = folder / "model"
    return out


def passes(model: Path, impl: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """(trainer, logprobs of two packs of unequal sequences, fp32 gradients of their weighted sum)."""
    import tiny

    from rlmono.trainer import learner
    from rlmono.trainer.packs import make_pack
    trainer = tiny.build_trainer(model, dtype=dtype, transformer_impl=impl, **options)
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 1000, (length,), generator=draw).tolist() for length in (700, 129, 64, 33, 2, 1500, 257)]
    samples = [tiny.sample(i, i, 1.0, t, len(t) - 1, [1] * (len(t) - 1), []) for i, t in enumerate(texts)]
    packs = [make_pack(part, trainer.device, 1) for part in (samples[:4], samples[4:])]
    trainer._set_log_probs(trainer.ddp, packs, "old_log_probs")
    for chunk in trainer.ddp:
        chunk.zero_grad_buffer()

    def loss(p: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, _ = trainer._response_logprobs(p, logits)
        weights = torch.linspace(-1, 1, len(log_probs), device=log_probs.device)
        return (weights * log_probs).sum(), torch.zeros((), dtype=torch.int, device=log_probs.device), {}
    learner.run(trainer.ddp, packs, loss, forward_only=False)
    return trainer, torch.cat([p.old_log_probs for p in packs]), {n: p.main_grad.clone() for n, p in trainer.chunks[0].named_parameters()}


def off(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(relative difference of all gradients, of the worst tensor)."""
    parts = {n: ((gradients[n] - g).double().norm(), g.double().norm()) for n, g in exact.items()}
    whole = [torch.stack(x).norm() for x in zip(*parts.values(), strict=True)]
    return float(whole[0] / whole[1]), max(float(a / b) for a, b in parts.values() if b > 0)


def keys(trainer: Any) -> list[str]:
    """What a checkpoint has, and what engines get."""
    return sorted(trainer.chunks[0].sharded_state_dict()) + [name for bucket in trainer.export() for name, _ in bucket]


@pytest.mark.parametrize("name, options", [("tiny", {}), ("moe", {}), ("deepseek", {}),
                                           ("tiny", dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1))])
def test_it_is_the_same_model(models: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    """As far from fp32 as our own kernels in bf16 are. Names, shapes and what is exported are the same."""
    from rlmono.trainer import te
    model = models[name]
    trainer, exact, exact_gradients = passes(model, "local", torch.float32, **options)
    del trainer
    ours, plain, gradients = passes(model, "local", **options)
    kinds, names = {type(m) for m in ours.chunks[0].modules()}, keys(ours)
    assert not kinds & {te.Norm, te.Attention}
    del ours
    theirs, found, others = passes(model, "transformer_engine", **options)
    kinds = {type(m) for m in theirs.chunks[0].modules()}
    assert te.Norm in kinds and (te.Attention in kinds) == (name != "deepseek") and keys(theirs) == names
    bound, value = ((x - exact).abs().mean() for x in (plain, found))
    (whole_bound, worst_bound), (whole, worst) = off(gradients, exact_gradients), off(others, exact_gradients)
    print(f"{name}: mean |logprob - fp32| {value:.2e} (ours {bound:.2e}), gradients {whole:.2e} (ours {whole_bound:.2e}), "
          f"the worst tensor's {worst:.2e} (ours {worst_bound:.2e})")
    assert not torch.equal(found, plain), "they were not used"
    assert value < 1.5 * bound + 1e-4 and whole < 1.5 * whole_bound + 1e-3 and worst < 3 * worst_bound + 1e-2


def test_auto_takes_it_and_deterministic_does_not(models: dict[str, Path]) -> None:
    from rlmono.config.schema import Config
    from rlmono.config.validate import on_device
    from rlmono.trainer import te
    model = models["tiny"]
    for options, taken in (({}, True), (dict(deterministic=True), False)):
        trainer = passes(model, "auto", **options)[0]
        assert any(type(m) is te.Norm for m in trainer.chunks[0].modules()) == taken
    assert "Transformer Engine's, version" in on_device(Config(), "cuda").notes[-1]
