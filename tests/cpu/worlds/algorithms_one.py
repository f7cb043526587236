"""Every algorithm through the trainer on one rank, against naive.py on transformers' models. Argument: an empty folder, for models
and for what algorithms_two.py compares with."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import algorithms
import naive
import tiny
import torch
from algorithms import VARIANTS, CriticView
from cases import run_cases

FOLDER = Path(sys.argv[1])
SHIFTS = (0.2, 0.3, 0.05, -0.15, -0.2, 0.1, -0.1, 0.3)


@cache
def samples() -> list[Any]:
    """Three uneven groups, with rollout logprobs off by enough, tokens and whole samples, for clips and bounds to hold in places."""
    bare = tiny.make_samples()
    exact = tiny.transformers_log_probs(FOLDER / "untied", bare)
    return tiny.with_log_probs(bare, [x + shift for x, shift in zip(exact, SHIFTS, strict=True)], noise=0.4)


def case_models_are_made() -> None:
    tiny.make_models(FOLDER)
    algorithms.make_teacher(FOLDER / "teacher")


def expected(c: Any, batch: list[Any]) -> tuple[naive.Answer, tiny.Gradients, tiny.Gradients]:
    """The answer, and the gradients of policy and critic by HF name."""
    load = tiny.load_transformers
    policy, critic = load(FOLDER / "untied"), None
    if c.advantage_estimator == "ppo":
        critic = naive.Critic(load(FOLDER / "untied"), algorithms.value_head().requires_grad_())
    found = naive.answer(c, batch, policy, load(FOLDER / "other") if c.kl_coef else None, load(FOLDER / "teacher") if c.use_opd else None, critic)
    found.loss.backward()
    of_critic = {}
    if critic is not None and found.value_loss is not None:
        found.value_loss.backward()
        of_critic = {n: p.grad for n, p in critic.model.named_parameters() if n != "lm_head.weight"} | {algorithms.HEAD: critic.head.grad}
    return found, {n: p.grad for n, p in policy.named_parameters()}, of_critic


def variant_agrees(name: str) -> dict[str, Any]:
    """The first step: loss, all gradients, and what is reported; then that two rollouts train."""
    batch = samples()
    trainer = algorithms.build(FOLDER, VARIANTS[name] | {"lr": 1e-3})
    before = tiny.exported(trainer)
    metrics, found = tiny.run_packs(trainer, batch, [batch[:3], batch[3:7], batch[7:]])
    answer, gradients, of_critic = expected(trainer.config, batch)
    loss = abs(metrics["train/loss"] - answer.loss.item()) / max(abs(answer.loss.item()), 0.1)
    worst = [tiny.worst(found, gradients)]
    assert loss <= 1e-6, (metrics["train/loss"], answer.loss.item())
    for key, value in answer.metrics.items():
        assert key not in metrics or abs(metrics[key] - value) <= 1e-5 * max(1.0, abs(value)), (key, metrics[key], value)
    if trainer.critic is not None:
        assert answer.value_loss is not None
        assert abs(metrics["train/value_loss"] / answer.value_loss.item() - 1) <= 1e-6, (metrics["train/value_loss"], answer.value_loss)
        worst.append(tiny.worst(tiny.gradients(CriticView(trainer)), of_critic))
    assert max(worst)[0] <= 1e-5, worst
    assert 0 < metrics["train/train_rollout_logprob_abs_diff"] < 1 and metrics["train/train_rollout_kl"] > 0
    trains_on(trainer, before, batch)
    return {"loss": loss, "gradient": max(worst)[0], "tensor": max(worst)[1]} | {
        k: metrics[k] for k in sorted(metrics) if "clipfrac" in k or "tis" in k}


def trains_on(trainer: Any, before: tiny.Gradients, batch: list[Any]) -> None:
    after = tiny.exported(trainer)
    assert any(not torch.equal(x, before[n]) for n, x in after.items()), "the first step changed nothing"
    metrics, _ = tiny.run_packs(trainer, batch, [batch[4:], batch[:4]])
    assert all(math.isfinite(v) for v in metrics.values()) and metrics["train/skipped_steps"] == 0, metrics
    assert any(not torch.equal(x, after[n]) for n, x in tiny.exported(trainer).items()), "the second step changed nothing"


def case_gspo() -> dict[str, Any]:
    found = variant_agrees("gspo")
    assert 0.1 < found["train/pg_clipfrac"] < 0.9, found
    return found


def case_gspo_dual_clip() -> dict[str, Any]:
    return variant_agrees("gspo_dual_clip")


def case_cispo() -> dict[str, Any]:
    found = variant_agrees("cispo")
    assert 0.1 < found["train/pg_clipfrac"] < 0.9, found
    return found


def case_cispo_per_token() -> dict[str, Any]:
    return variant_agrees("cispo_per_token")


def case_dr_grpo() -> dict[str, Any]:
    return variant_agrees("dr_grpo")


def case_rloo() -> dict[str, Any]:
    return variant_agrees("rloo")


def case_rloo_kl() -> dict[str, Any]:
    return variant_agrees("rloo_kl")


def case_grpo_whitened() -> dict[str, Any]:
    return variant_agrees("grpo_whitened")


def case_reinforce_plus_plus() -> dict[str, Any]:
    return variant_agrees("reinforce_plus_plus")


def case_reinforce_plus_plus_without_kl() -> dict[str, Any]:
    return variant_agrees("reinforce_plus_plus_without_kl")


def case_reinforce_plus_plus_baseline() -> dict[str, Any]:
    return variant_agrees("reinforce_plus_plus_baseline")


def case_distillation() -> dict[str, Any]:
    return variant_agrees("distillation")


def case_distillation_off_policy() -> dict[str, Any]:
    return variant_agrees("distillation_off_policy")


def bounded(name: str, key: str = "train/tis_clipfrac") -> dict[str, Any]:
    """A bound that holds nowhere, or everywhere, would show nothing."""
    found = variant_agrees(name)
    assert 0.02 < found[key] < 0.9, found
    return found


def case_tis() -> dict[str, Any]:
    return bounded("tis")


def case_tis_geometric() -> dict[str, Any]:
    return bounded("tis_geometric")


def case_icepop() -> dict[str, Any]:
    return bounded("icepop")


def case_mis_sequence() -> dict[str, Any]:
    return bounded("mis_sequence")


def case_mis_geometric() -> dict[str, Any]:
    return bounded("mis_geometric")


def case_opsm() -> dict[str, Any]:
    return bounded("opsm", "train/opsm_clipfrac")


def case_tis_and_opsm() -> dict[str, Any]:
    return variant_agrees("tis_and_opsm")


def case_ppo() -> dict[str, Any]:
    return variant_agrees("ppo")


def case_ppo_whitened() -> dict[str, Any]:
    return variant_agrees("ppo_whitened")


# ---------------------------------------------------------------- layouts, and the critic's life

def case_packings() -> dict[str, Any]:
    """Three random packings of each variant against every sample in a pack of its own; saved for two ranks."""
    batch, saved, loss, worst = samples(), {}, 0.0, (0.0, "")
    for name, options in VARIANTS.items():
        trainer = algorithms.build(FOLDER, options)
        metrics, gradients = tiny.run_packs(trainer, batch, tiny.one_each(batch))
        of_critic = tiny.gradients(CriticView(trainer)) if trainer.critic else {}
        saved[name] = (metrics["train/loss"], gradients, of_critic)
        for packs in tiny.packings(batch, 3, 1):
            again, found = tiny.run_packs(trainer, batch, packs[0])
            loss = max(loss, abs(again["train/loss"] - metrics["train/loss"]) / max(0.1, abs(metrics["train/loss"])))
            worst = max(worst, tiny.worst(found, gradients), tiny.worst(tiny.gradients(CriticView(trainer)), of_critic) if of_critic else (0.0, ""))
            assert loss <= 1e-6 and worst[0] <= 1e-5, (name, loss, worst)
    torch.save({"samples": batch, "single": saved}, FOLDER / "algorithms.pt")
    return {"loss": loss, "gradient": worst[0], "tensor": worst[1]}


def case_the_critic_learns_values() -> dict[str, Any]:
    """Its loss falls over rollouts that train nothing else, to less than a tenth; the actor stays."""
    batch = samples()
    options = {"advantage_estimator": "ppo", "critic_lr": 3e-3, "lr": 1e-2, "value_clip": 100.0, "num_critic_only_steps": 30}
    trainer = algorithms.build(FOLDER, options, "tied")
    before = tiny.exported(trainer)
    rollouts = [trainer.train(tiny.batch(batch, tiny.step([batch], batch), rollout_id=i)) for i in range(31)]
    losses = [m["train/value_loss"] for m in rollouts]
    assert losses[29] < losses[0] / 10, losses
    assert "train/loss" not in rollouts[29] and "train/loss" in rollouts[30]
    assert rollouts[0]["train/critic_lr"] == 3e-3 and rollouts[30]["train/lr"] == 1e-2
    assert any(not torch.equal(x, before[n]) for n, x in tiny.exported(trainer).items()), "rollout 30 trained no actor"
    return {"first": losses[0], "last": losses[29]}


def case_critic_only_steps_leave_the_actor() -> None:
    batch = samples()
    trainer = algorithms.build(FOLDER, {"advantage_estimator": "ppo", "lr": 1e-2, "num_critic_only_steps": 1})
    actor, critic = tiny.exported(trainer), tiny.exported(CriticView(trainer))
    trainer.train(tiny.batch(batch, tiny.step([batch], batch)))
    assert all(torch.equal(x, actor[n]) for n, x in tiny.exported(trainer).items())
    assert any(not torch.equal(x, critic[n]) for n, x in tiny.exported(CriticView(trainer)).items())


def case_value_clip_holds_in_the_second_step() -> None:
    """Two steps over the same samples: the first moves the values beyond the clip, the second finds them there."""
    batch = samples()
    trainer = algorithms.build(FOLDER, {"advantage_estimator": "ppo", "critic_lr": 3e-2, "value_clip": 1e-3})
    one = tiny.step([batch], batch)
    metrics = trainer.train(tiny.batch(batch, one, one))
    assert metrics["train/value_clipfrac"] > 0.01, metrics


def case_the_critic_is_in_the_checkpoint() -> None:
    """Saved and loaded, with its optimizer: the next step of both runs is the same, bit for bit."""
    from rlmono.checkpoint import torch_dist
    batch, options = samples(), {"advantage_estimator": "ppo", "lr": 1e-2}
    train = lambda t: t.train(tiny.batch(batch, tiny.step([batch], batch)))  # noqa: E731
    trainer = algorithms.build(FOLDER, options)
    train(trainer)
    torch_dist.save(trainer, FOLDER / "with_critic")
    train(trainer)
    actor, critic = tiny.exported(trainer), tiny.exported(CriticView(trainer))
    again = tiny.build_trainer(FOLDER / "other", **options)
    torch_dist.load(again, FOLDER / "with_critic", with_optimizer=True)
    torch_dist.load_critic(again.critic, FOLDER / "with_critic", with_optimizer=True)
    train(again)
    assert all(torch.equal(x, actor[n]) for n, x in tiny.exported(again).items())
    assert all(torch.equal(x, critic[n]) for n, x in tiny.exported(CriticView(again)).items())


def case_a_critic_begins_with_the_actor_of_a_checkpoint_without_one() -> None:
    """Its body is the actor's, its head stays new."""
    from rlmono.checkpoint import torch_dist
    for name in ("tied", "untied"):
        torch_dist.save(tiny.build_trainer(FOLDER / name), FOLDER / f"{name}_without_critic")
        trainer = tiny.build_trainer(FOLDER / name, advantage_estimator="ppo")
        head = tiny.exported(CriticView(trainer))[algorithms.HEAD]
        torch_dist.load_critic(trainer.critic, FOLDER / f"{name}_without_critic", with_optimizer=False)
        body, actor = tiny.exported(CriticView(trainer)), tiny.exported(trainer)
        assert torch.equal(body.pop(algorithms.HEAD), head) and head.any()
        assert all(torch.equal(x, actor[n]) for n, x in body.items()) and body.keys() == actor.keys() - {"lm_head.weight"}


if __name__ == "__main__":
    run_cases(globals())
