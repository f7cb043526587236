"""The trainer on two ranks, on every layout that two ranks have. Argument: the folder that trainer_one.py filled."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from cases import run_cases
from torch.utils._python_dispatch import TorchDispatchMode

FOLDER = Path(sys.argv[1])
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def saved() -> dict[str, Any]:
    """The samples, and each objective's loss and gradients on one rank with every sample in a pack of its own."""
    return torch.load(FOLDER / "single.pt", weights_only=False)


def like_one_rank(packings: int, **layout: Any) -> dict[str, Any]:
    """Each objective on this layout, in random packings, against one rank."""
    single = saved()
    batch, loss, gradient = single["samples"], 0.0, (0.0, "")
    for objective, options in single["options"].items():
        trainer = tiny.build_trainer(FOLDER / "untied", **options, **layout)
        rank, ranks = trainer.data_parallel
        for packs in tiny.packings(batch, packings, ranks):
            metrics, found = tiny.run_packs(trainer, batch, packs[rank])
            expected_loss, expected = single["single"][objective]
            if trainer.reports:
                loss = max(loss, abs(metrics["train/loss"] / expected_loss - 1))
            gradient = max(gradient, tiny.worst(found, expected))
    assert loss <= 1e-6 and gradient[0] <= 1e-5, (loss, gradient)
    return {"loss": loss, "gradient": gradient[0], "tensor": gradient[1]}


def case_ten_packings_dp2() -> dict[str, Any]:
    return like_one_rank(10)


def case_tp2() -> dict[str, Any]:
    return like_one_rank(2, **TP2)


def case_tp2_with_sequence_parallel() -> dict[str, Any]:
    return like_one_rank(2, **TP2_SP)


def case_tp2_with_sequence_parallel_and_full_recompute() -> dict[str, Any]:
    return like_one_rank(1, **TP2_SP, **FULL_RECOMPUTE)


def log_probs_agree(name: str, **layout: Any) -> dict[str, float]:
    """Against transformers, by the trainer's own metric, over all ranks."""
    bare = [tiny.unmasked(s) for s in tiny.make_samples()]
    batch = tiny.with_log_probs(bare, tiny.transformers_log_probs(FOLDER / name, bare))
    trainer = tiny.build_trainer(FOLDER / name, **layout)
    metrics, _ = tiny.run_packs(trainer, batch, tiny.share(trainer, [batch[:2], batch[2:3], batch[3:6], batch[6:]]))
    value = metrics["train/train_rollout_logprob_abs_diff_max"]
    assert 0 < value <= 1e-5, value
    return {"max_abs_logprob_difference": value}


def case_logprobs_dp2_tied() -> dict[str, float]:
    return log_probs_agree("tied")


def case_logprobs_tp2_tied() -> dict[str, float]:
    return log_probs_agree("tied", **TP2)


def case_logprobs_tp2_untied() -> dict[str, float]:
    return log_probs_agree("untied", **TP2)


def case_logprobs_tp2_with_sequence_parallel_tied() -> dict[str, float]:
    return log_probs_agree("tied", **TP2_SP)


def case_logprobs_tp2_with_sequence_parallel_untied() -> dict[str, float]:
    return log_probs_agree("untied", **TP2_SP)


def case_tied_gradients_tp2() -> dict[str, Any]:
    """Tied embeddings get their gradient from both ends, on both ranks."""
    batch = saved()["samples"]
    trainer = tiny.build_trainer(FOLDER / "tied", loss_type="sft", **TP2_SP)
    _, found = tiny.run_packs(trainer, batch, [batch[:3], batch[3:]])
    model = tiny.load_transformers(FOLDER / "tied")
    tiny.sft_loss(model, batch).backward()
    difference, name = tiny.worst(found, {n: p.grad for n, p in model.named_parameters()})
    assert difference <= 1e-5, (difference, name)
    return {"gradient": difference, "tensor": name}


def two_steps(**layout: Any) -> dict[str, float]:
    batch = saved()["samples"]
    trainer = tiny.build_trainer(FOLDER / "untied", lr=1e-3, **layout)
    halves = [batch[::2], batch[1::2]]
    metrics = trainer.train(tiny.batch(batch, *(tiny.step(tiny.share(trainer, [half[:2], half[2:]]), half) for half in halves)))
    first, second = metrics["train/ppo_kl_step1"], metrics["train/ppo_kl_step2"]
    assert abs(first) < 1e-8 and second > 1e-7, (first, second)
    return {"ppo_kl_step1": first, "ppo_kl_step2": second}


def case_two_steps_of_a_rollout_dp2() -> dict[str, float]:
    return two_steps()


def case_two_steps_of_a_rollout_tp2() -> dict[str, float]:
    return two_steps(**TP2_SP)


def trained(**layout: Any) -> tiny.Gradients:
    """Weights after two rollouts, with clipping, and what two tensors more a step would need: a large eps (see trainer_one.py)."""
    batch = saved()["samples"]
    trainer = tiny.build_trainer(FOLDER / "untied", lr=2e-3, clip_grad=0.2, adam_eps=1e-3, weight_decay=0.1, use_kl_loss=True, kl_loss_coef=0.1,
                                 kl_coef=0.0, **layout)
    for i in range(2):
        trainer.train(tiny.batch(batch, tiny.step(tiny.share(trainer, [batch[:3], batch[3:]]), batch), rollout_id=i))
    return tiny.exported(trainer)


def case_weights_after_training_agree() -> dict[str, Any]:
    """Optimizer states over two data-parallel ranks, or over two tensor-parallel ones: the same weights come out."""
    data, tensor = trained(), trained(**TP2_SP)
    start = tiny.exported(tiny.build_trainer(FOLDER / "untied"))
    moved, _ = tiny.worst(data, start)
    assert moved > 1e-3, f"training changed hardly anything: {moved}"
    difference, name = tiny.worst(data, tensor)
    assert difference <= 1e-6, (difference, name)
    return {"weights": difference, "tensor": name}


def case_kl_in_the_reward_dp2() -> None:
    """Each rank's advantages need the KL of samples that the other one has."""
    batch = saved()["samples"]
    options = dict(kl_coef=0.2, kl_loss_type="k3", use_rollout_logprobs=True)
    found = {}
    for name, layout in (("dp2", {}), ("tp2", TP2)):
        trainer = tiny.build_trainer(FOLDER / "untied", **options, **layout)
        found[name] = tiny.run_packs(trainer, batch, tiny.share(trainer, tiny.one_each(batch)))
    difference, name = tiny.worst(found["dp2"][1], found["tp2"][1])
    assert difference <= 1e-5, (difference, name)


def case_a_step_that_is_not_finite_on_one_rank() -> None:
    """All ranks skip it."""
    batch = saved()["samples"]
    trainer = tiny.build_trainer(FOLDER / "untied", lr=1e-2)
    before = tiny.exported(trainer)
    broken = [tiny.rewarded(s, math.nan) if s.group_index == 2 else s for s in batch]
    packs = [[s for s in broken if s.group_index != 2], [s for s in broken if s.group_index == 2]]
    metrics, _ = tiny.run_packs(trainer, broken, tiny.share(trainer, packs))
    assert trainer.skipped_steps == 1 and metrics["train/skipped_steps"] == 1
    assert all(torch.equal(x, before[n]) for n, x in tiny.exported(trainer).items()), "a step that is not finite changed weights"


class WholeLogits(TorchDispatchMode):
    """Notes every fp32 tensor with so many rows of logits."""

    def __init__(self, rows: int, columns: set[int]):
        super().__init__()
        self.rows, self.columns, self.found, self.seen = rows, columns, list[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in (out if isinstance(out, (tuple, list)) else [out]):
            if isinstance(t, torch.Tensor) and t.ndim > 1 and t.shape[-1] in self.columns:
                self.seen += t.numel() >= self.rows * t.shape[-1]
                if t.dtype == torch.float32 and t.numel() >= self.rows * t.shape[-1]:
                    self.found.append(f"{func}: {tuple(t.shape)}")
        return out


def case_logits_are_never_whole_in_fp32() -> None:
    """bf16, all passes over logits that there are: reference, old policy, training with an entropy bonus; and SFT."""
    from megatron.core import parallel_state

    from rlmono.trainer import logprobs
    from rlmono.trainer.trainer import Trainer
    batch, chunk = [tiny.rewarded(s, float(i)) for i, s in enumerate(tiny.make_samples())], logprobs.CHUNK
    logprobs.CHUNK = 16
    try:
        for layout, columns in (({}, {97}), (TP2_SP, {48, 49})):
            for options in ({"loss_type": "sft"}, {"entropy_coef": 0.01, "use_kl_loss": True}):
                tiny.build_trainer(FOLDER / "untied", **layout)         # ends the trainer before
                parallel_state.destroy_model_parallel()
                trainer = Trainer(tiny.make_config(FOLDER / "untied", **options, **layout), torch.bfloat16, 2)
                trainer.load_hf(FOLDER / "untied")
                if trainer.needs_reference():
                    trainer.load_hf(FOLDER / "other", trainer.add_reference())
                halves = [batch[::2], batch[1::2]]
                steps = [tiny.step(tiny.share(trainer, [half[:2], half[2:]]), half) for half in halves]
                with WholeLogits(rows=38, columns=columns) as watch:        # packs have 81, 38, 61 tokens, and 11: less than a chunk
                    trainer.train(tiny.batch(batch, *steps))
                assert watch.seen and not watch.found, (layout, options, watch.seen, watch.found[:5])
    finally:
        logprobs.CHUNK = chunk


def case_hf_round_trip() -> None:
    """TP2: load → export → load is bit-equal, with a padded vocabulary and tied embeddings too."""
    from safetensors.torch import load_file

    from rlmono.weights.hf import save_hf
    for name in ("tied", "untied"):
        trainer = tiny.build_trainer(FOLDER / name, **TP2)
        first, original, target = tiny.exported(trainer), load_file(FOLDER / name / "model.safetensors"), FOLDER / f"{name}_two"
        assert first.keys() == original.keys() and all(torch.equal(x, original[n]) for n, x in first.items())
        if dist.get_rank() == 0:
            save_hf(target, first.items(), FOLDER / name, torch.float32)
        dist.barrier()
        again = tiny.exported(tiny.build_trainer(target, **TP2))
        assert all(torch.equal(x, first[n]) for n, x in again.items())


def case_weights_that_do_not_fit_are_refused_by_name() -> None:
    """On a cut tensor too: the padded vocabulary must not hide a row too few."""
    from safetensors.torch import load_file, save_file

    from rlmono.weights.hf import WeightsError
    trainer = tiny.build_trainer(FOLDER / "untied", **TP2)
    good, broken, name = load_file(FOLDER / "untied" / "model.safetensors"), FOLDER / "short", "model.embed_tokens.weight"
    if dist.get_rank() == 0:
        broken.mkdir()
        save_file({**good, name: torch.cat([good[name], good[name][:1]])}, broken / "model.safetensors")
    dist.barrier()
    try:
        trainer.load_hf(broken)
    except WeightsError as e:
        assert name in str(e), e
    else:
        raise AssertionError("98 rows were loaded into a vocabulary of 97")


if __name__ == "__main__":
    run_cases(globals())
