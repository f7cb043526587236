"""The optimizer and checkpoints behind the trainer's back, on two ranks. Argument: a folder with a tiny mixture of experts, `moe`."""

from __future__ import annotations

import math
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import moves
import tiny
import torch
import torch.distributed as dist
from cases import run_cases

FOLDER = Path(sys.argv[1])
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2)
EP2 = dict(expert_model_parallel_size=2)
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": TP2, "tp2+sp": TP2_SP, "pp2": PP2}
LR = 1e-3


def case_models() -> None:
    if dist.get_rank() == 0:
        tiny.make_models(FOLDER)
    dist.barrier()


# ---------------------------------------------------------------- schedules

def line(a: float, b: float, part: float) -> float:
    return a + (b - a) * part


def wave(a: float, b: float, part: float) -> float:
    return line(a, b, (1 - math.cos(math.pi * part)) / 2)


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda n: 1),
    "constant, warm-up": (dict(lr_warmup_iters=4), lambda n: min(n / 4, 1)),
    "warm-up from somewhere": (dict(lr_warmup_iters=4, lr_warmup_init=0.5 * LR), lambda n: line(0.5, 1, min(n / 4, 1))),
    "linear, a fraction of warm-up": (dict(lr_decay_style="linear", lr_warmup_fraction=0.25, min_lr=0.1 * LR),
                                      lambda n: n / 3 if n <= 3 else line(1, 0.1, (n - 3) / 9)),
    "linear, shorter than the run": (dict(lr_decay_style="linear", lr_decay_iters=8, min_lr=0.2 * LR), lambda n: line(1, 0.2, min(n / 8, 1))),
    "cosine": (dict(lr_decay_style="cosine", lr_warmup_iters=2, min_lr=0.1 * LR), lambda n: n / 2 if n < 2 else wave(1, 0.1, (n - 2) / 10)),
    "inverse square root": (dict(lr_decay_style="inverse-square-root", lr_warmup_iters=2), lambda n: n / 2 if n < 2 else math.sqrt(2 / n)),
    "WSD, linear": (dict(lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style="linear", lr_warmup_iters=2, min_lr=0.1 * LR),
                    lambda n: n / 2 if n < 2 else line(1, 0.1, max(n - 8, 0) / 4)),
    "WSD, cosine": (dict(lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style="cosine"), lambda n: wave(1, 0, max(n - 8, 0) / 4)),
    "WSD, exponential": (dict(lr_decay_style="WSD", lr_wsd_decay_iters=4), lambda n: 2 * 0.5 ** (max(n - 8, 0) / 4) - 1),
    "WSD, square root": (dict(lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style="minus_sqrt"),
                         lambda n: 1 - math.sqrt(max(n - 8, 0) / 4)),
}
DECAYS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": (dict(weight_decay=0.1), lambda n: 0.1),
    "linear": (dict(weight_decay_incr_style="linear", start_weight_decay=0.1, end_weight_decay=0.4), lambda n: line(0.1, 0.4, n / 12)),
    "cosine": (dict(weight_decay_incr_style="cosine", start_weight_decay=0.0, end_weight_decay=0.4), lambda n: wave(0, 0.4, n / 12)),
}


def course(**options: Any) -> list[tuple[float, float, float]]:
    """(learning rate / LR, weight decay, weight decay of norms) of the twelve steps of a run."""
    from rlmono.trainer.optimizer import build_schedule
    groups: list[dict[str, Any]] = [{"wd_mult": m, "max_lr": LR, "min_lr": options.get("min_lr", 0.0)} for m in (1.0, 0.0)]
    schedule = build_schedule(tiny.make_config(FOLDER / "untied", **{"lr": LR} | options), SimpleNamespace(param_groups=groups), 12)
    out = []
    for _ in range(12):
        schedule.step(1)
        assert groups[0]["lr"] == groups[1]["lr"]
        out.append((groups[0]["lr"] / LR, groups[0]["weight_decay"], groups[1]["weight_decay"]))
    return out


def case_schedules() -> None:
    for name, (options, expected) in SCHEDULES.items():
        found = [rate for rate, _, _ in course(**options)]
        assert all(abs(rate - expected(n)) < 1e-9 for n, rate in enumerate(found, 1)), (name, found, [expected(n) for n in range(1, 13)])
    for name, (options, expected) in DECAYS.items():
        found = course(**options)
        assert all(abs(decay - expected(n)) < 1e-9 and norms == 0 for n, (_, decay, norms) in enumerate(found, 1)), (name, found)


# ---------------------------------------------------------------- norms of groups

def sft(folder: Path, **options: Any) -> tuple[Any, dict[str, float]]:
    """A trainer, and its metrics of a step on all samples."""
    trainer, batch = tiny.build_trainer(folder, loss_type="sft", **options), tiny.make_samples()
    return trainer, trainer.train(tiny.batch(batch, tiny.step(tiny.share(trainer, [batch[:3], batch[3:]]), batch)))


def case_norms_of_groups() -> dict[str, float]:
    """Against transformers' gradients, on every layout of two ranks."""
    model = tiny.load_transformers(FOLDER / "untied")
    tiny.sft_loss(model, tiny.make_samples()).backward()
    of: dict[str, list[torch.nn.Parameter]] = {"decayed": [], "not_decayed": []}
    for name, p in model.named_parameters():
        of["not_decayed" if "norm" in name else "decayed"].append(p)
    expected: dict[str, float] = {}
    for name, parameters in of.items():
        expected[f"{name}/grad_norm"] = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
        expected[f"{name}/param_norm"] = math.sqrt(sum(float(p.double().square().sum()) for p in parameters))
    expected |= {"decayed/lr": LR, "not_decayed/lr": LR, "decayed/weight_decay": 0.1, "not_decayed/weight_decay": 0.0}
    total, furthest = math.hypot(*(v for k, v in expected.items() if k.endswith("grad_norm"))), 0.0
    for layout, options in LAYOUTS.items():
        trainer, metrics = sft(FOLDER / "untied", lr=LR, weight_decay=0.1, **options)
        prefix = "train/param_group/"
        found = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
        assert found.keys() == expected.keys(), (layout, found.keys())
        errors = {k: abs(found[k] - v) / max(v, 1e-12) for k, v in expected.items()} | {"all": abs(metrics["train/grad_norm"] / total - 1)}
        assert max(errors.values()) <= 1e-5, (layout, errors)
        furthest = max(furthest, *errors.values())
        assert abs(trainer.optimizer.get_grad_norm() / total - 1) <= 1e-5, "Megatron's own norm is another"
    return {"difference": furthest}


def case_experts_are_a_group_with_and_without_expert_parallelism() -> None:
    found = []
    for options in ({}, EP2):
        _, metrics = sft(FOLDER / "moe", **options)
        found.append({k: v for k, v in metrics.items() if k.startswith("train/param_group/") or k == "train/grad_norm"})
    assert found[0].keys() == found[1].keys() and found[0]["train/param_group/experts/grad_norm"] > 0
    assert all(abs(found[1][k] - v) <= 1e-5 * max(v, 1e-12) for k, v in found[0].items()), found


# ---------------------------------------------------------------- gradients that are not finite

def everything(trainer: Any) -> list[torch.Tensor]:
    """Weights, fp32 weights, and Adam's moments and step counts on this rank."""
    adam = [t for o in trainer.optimizers for p, state in o.optimizer.state.items() for t in (p, *state.values())]
    return [t.detach().clone() for t in (*(p for c in trainer.chunks for p in c.parameters()), *adam)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def poisoned(trainer: Any, rank: int, value: float, copies: bool) -> Callable[[], bool]:
    """`prepare_grads` with one number of one gradient broken, on one rank; `copies`: in a weight that the other rank has too."""
    prepare = trainer.optimizer.prepare_grads

    def broken() -> bool:
        found = prepare()
        if dist.get_rank() == rank:
            shard = next(m.shard for m in trainer.norms._members if m.counted != copies)
            shard.grad.view(-1)[-1] = value
        return bool(found)
    return broken


def case_a_gradient_that_is_not_finite_on_one_rank() -> None:
    """No rank takes the step, to the bit; it is counted; the next one is as if nothing had been."""
    kinds: dict[str, tuple[str, dict[str, Any], bool]] = {
        **{name: ("untied", options, False) for name, options in LAYOUTS.items()},
        "tp2, in a copy": ("untied", TP2, True), "ep2": ("moe", EP2, False)}
    for (name, (folder, options, copies)), value in zip(kinds.items(), (math.nan, math.inf) * 3, strict=True):
        trainer, first = sft(FOLDER / folder, lr=LR, **options)
        before = everything(trainer)
        batch = tiny.make_samples()
        again = tiny.batch(batch, tiny.step(tiny.share(trainer, [batch[:3], batch[3:]]), batch))
        prepare = trainer.optimizer.prepare_grads
        trainer.optimizer.prepare_grads = poisoned(trainer, 1, value, copies)
        metrics = trainer.train(again)
        trainer.optimizer.prepare_grads = prepare
        assert metrics["train/skipped_steps"] == trainer.skipped_steps == 1 and not math.isfinite(metrics["train/grad_norm"]), (name, metrics)
        assert same(before, everything(trainer)), f"{name}: a step that is not finite changed something"
        metrics = trainer.train(again)
        undisturbed, _ = sft(FOLDER / folder, lr=LR, **options)
        undisturbed.train(again)
        assert metrics["train/skipped_steps"] == 1 and math.isfinite(metrics["train/grad_norm"])
        assert same(everything(undisturbed), everything(trainer)), f"{name}: the step after it is another"


# ---------------------------------------------------------------- Adam in host memory

def bf16(steps: int, **options: Any) -> Any:
    """A trainer in bf16 after so many steps."""
    from megatron.core import parallel_state

    from rlmono.trainer.trainer import Trainer
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config = tiny.make_config(FOLDER / "untied", loss_type="sft", lr=1e-2, adam_eps=1e-3, weight_decay=0.1, clip_grad=1.0, **options)
    trainer = Trainer(config, torch.bfloat16, 10)
    trainer.load_hf(FOLDER / "untied")
    step_on(trainer, steps)
    return trainer


def step_on(trainer: Any, steps: int) -> list[dict[str, float]]:
    batch = tiny.make_samples()
    again = tiny.batch(batch, tiny.step(tiny.share(trainer, [batch[:3], batch[3:]]), batch))
    return [trainer.train(again) for _ in range(steps)]


def as_if_on_gpus(plain: Any) -> Any:
    """Megatron's hybrid optimizer deals weights by where they are; here all of them are to count as weights of a GPU."""
    def dealt(self: Any, fraction: float) -> Any:
        on_cpu, on_gpu, _, _, fp32 = plain(self, fraction)
        return on_cpu, on_gpu, dict(fp32), {copy: p for p, copy in fp32.items()}, fp32
    return dealt


def case_adam_in_host_memory() -> dict[str, float]:
    """The road of the GPU, but for the copies: the steps of Adam beside the weights, and a checkpoint that either goes on from."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    from rlmono.checkpoint import torch_dist
    from rlmono.trainer import optimizer
    kept = optimizer.in_host_memory, HybridDeviceOptimizer._get_sub_optimizer_param_groups
    offload, furthest = dict(optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=True), 0.0
    try:
        optimizer.in_host_memory = lambda config: config.optimizer_cpu_offload
        HybridDeviceOptimizer._get_sub_optimizer_param_groups = as_if_on_gpus(kept[1])
        for name, layout in {"dp2": {}, "tp2": TP2_SP}.items():
            start, beside, hosted = bf16(0, **layout), bf16(3, **layout), bf16(3, **layout, **offload)
            assert isinstance(hosted.optimizers[0].optimizer, HybridDeviceOptimizer)
            first, expected, found = (torch_dist.adam_tensors(t) for t in (start, beside, hosted))
            moved = max(float((x - first[k]).norm() / first[k].norm()) for k, x in expected.items() if ".param." in k)
            furthest = max(furthest, *(float((x - expected[k]).norm() / expected[k].norm()) for k, x in found.items()))
            assert moved > 1e-2 and furthest <= 1e-4, (name, moved, furthest)
            torch_dist.save(hosted, FOLDER / f"hosted-{name}")
            saved = {k: x.clone() for k, x in found.items()}
            step_on(hosted, 1)
            for again in (bf16(0, **layout, **offload), bf16(0, **layout)):
                torch_dist.load(again, FOLDER / f"hosted-{name}", with_optimizer=True)
                assert all(torch.equal(x, saved[k]) for k, x in torch_dist.adam_tensors(again).items()), f"{name}: not what was saved"
                step_on(again, 1)
                after = torch_dist.adam_tensors(again)
                apart = max(float((x - after[k]).norm() / x.norm()) for k, x in torch_dist.adam_tensors(hosted).items())
                assert apart <= (1e-4 if again.config.optimizer_cpu_offload is False else 0), (name, apart)
    finally:
        optimizer.in_host_memory, HybridDeviceOptimizer._get_sub_optimizer_param_groups = kept
    return {"difference": furthest}


# ---------------------------------------------------------------- checkpoints in the background

def case_a_checkpoint_is_of_the_moment_of_its_copy() -> None:
    """While a thread writes, the trainer steps on; what is loaded is what was copied, to the bit."""
    from rlmono.checkpoint import torch_dist
    group = dist.new_group(backend="gloo")
    for name, (model, options) in {"dp2": ("untied", {}), "tp2": ("tied", TP2_SP), "ep2": ("moe", EP2)}.items():
        trainer, _ = sft(FOLDER / model, lr=LR, **options)
        copied, folder = everything(trainer), FOLDER / f"behind-{name}"
        parts = torch_dist.stage(trainer, folder, torch_dist.HostCopies())
        batch = tiny.make_samples()
        again = tiny.batch(batch, tiny.step(tiny.share(trainer, [batch[:3], batch[3:]]), batch))
        trainer.train(again)                # before a byte is written
        writer = threading.Thread(target=lambda: [part.write(group) for part in parts])     # noqa: B023 - joined below
        writer.start()
        trainer.train(again)                # collectives on both sides
        writer.join(60)
        assert not writer.is_alive() and not torch.equal(copied[0], everything(trainer)[0])
        fresh = tiny.build_trainer(FOLDER / model, loss_type="sft", lr=LR, **options)
        torch_dist.load(fresh, folder, with_optimizer=True)
        assert same(copied, everything(fresh)), f"{name}: another moment was saved"


def case_each_rank_saves_its_share_of_the_optimizer() -> None:
    """A parameter is saved by one data-parallel rank, also where a border runs through it; the other's piece is in its place."""
    from rlmono.checkpoint import adam, torch_dist
    trainer, _ = sft(FOLDER / "tied", lr=LR)
    part, = torch_dist.stage(trainer, FOLDER / "shares")
    mine = {(item.index.fqn, item.index.offset) for item, _ in part.tensors if item.index.fqn.startswith("optimizer.")}
    part.write()
    saved: list[set[Any]] = [set(), set()]
    dist.all_gather_object(saved, mine)
    assert saved[0] and saved[1] and not saved[0] & saved[1], "both save, and not the same"
    stored, (single,) = moves.stored(FOLDER / "shares"), trainer.optimizers
    names = {p: name for name, p in torch_dist.held_tensors(trainer.chunks).items()}
    shares, about = adam.shares(single), adam._by_parameter(torch_dist._chunks(trainer.chunks))
    for share in shares:
        if dist.get_rank() in share.pieces:
            a, b = share.pieces[dist.get_rank()]
            for key, piece in adam.live(single, share.parameter).items():
                whole, layer = stored[f"optimizer.state.{key}.{about[id(share.parameter)].key}"], re.search(r"layers\.(\d+)", names[share.parameter])
                whole = whole[int(layer[1])] if layer else whole            # layers lie in one tensor
                assert piece.any() and torch.equal(whole.flatten()[a:b], piece), names[share.parameter]
    assert any(len(share.pieces) == 2 for share in shares), "no border runs through a parameter"


def case_a_checkpoint_that_is_not_finite_is_refused_by_name() -> None:
    from rlmono.checkpoint import torch_dist
    from rlmono.checkpoint.store import CheckpointError
    name = "decoder.layers.1.mlp.linear_fc1.weight"

    def refused(what: str, break_it: Callable[[Any], torch.Tensor], word: str) -> None:
        trainer, _ = sft(FOLDER / "untied", **TP2)
        if dist.get_rank() == 1:
            break_it(trainer).view(-1)[7] = math.nan
        torch_dist.save(trainer, FOLDER / what)
        fresh = tiny.build_trainer(FOLDER / "untied", loss_type="sft", **TP2)
        error = ""
        try:
            torch_dist.load(fresh, FOLDER / what, with_optimizer=True)
        except CheckpointError as e:
            error = str(e)
        if dist.get_rank() == 1:
            assert f"{FOLDER / what / 'trainer'}: tensor '{word}' holds values that are not finite" in error, error
        dist.barrier()
    held = lambda t: torch_dist.held_tensors(t.chunks)[name].data  # noqa: E731
    refused("nan-weight", held, name)
    refused("nan-moment", lambda t: torch_dist.adam_tensors(t)[f"optimizer.state.exp_avg.{name}"], f"optimizer.state.exp_avg.{name}")


def case_a_rank_that_can_not_write_fails_on_all() -> None:
    from rlmono.checkpoint import torch_dist
    trainer, _ = sft(FOLDER / "untied", **TP2)
    part, = torch_dist.stage(trainer, FOLDER / "fails")
    if dist.get_rank() == 1:
        part.path = FOLDER / "nowhere" / "file"
    try:
        part.write()
    except OSError as e:
        assert dist.get_rank() == 1 and "nowhere" in str(e), e
    except RuntimeError as e:
        assert dist.get_rank() == 0 and f"{FOLDER / 'fails'}" in str(e) and "trainer 1: FileNotFoundError" in str(e), e
    else:
        raise AssertionError("a file that could not be written was passed over")
    dist.barrier()
    assert not (FOLDER / "fails" / "trainer" / ".metadata").exists()


if __name__ == "__main__":
    run_cases(globals())
