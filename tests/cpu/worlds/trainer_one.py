"""The trainer on one rank, against transformers and a loss written twice. Argument: an empty folder, for models and for what
trainer_two.py compares with."""

from __future__ import annotations

import math
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import reference
import tiny
import torch
from cases import run_cases
from reference import Objective

FOLDER = Path(sys.argv[1])


@cache
def samples() -> list[Any]:
    """With rollout logprobs that are off by enough for every clip case."""
    bare = tiny.make_samples()
    return tiny.with_log_probs(bare, tiny.transformers_log_probs(FOLDER / "untied", bare), noise=0.5)


# ---------------------------------------------------------------- logprobs

def case_models_are_made() -> None:
    tiny.make_models(FOLDER)


def log_probs_agree(name: str, temperature: float) -> dict[str, float]:
    """All eight samples in two packs; the trainer's own metric compares, and is first shown to notice."""
    bare = [tiny.unmasked(s) for s in tiny.make_samples()]
    exact = tiny.transformers_log_probs(FOLDER / name, bare, temperature)
    trainer = tiny.build_trainer(FOLDER / name, rollout_temperature=temperature)

    def difference(given: list[torch.Tensor]) -> float:
        batch = tiny.with_log_probs(bare, given)
        return tiny.run_packs(trainer, batch, [batch[:5], batch[5:]])[0]["train/train_rollout_logprob_abs_diff_max"]
    off = [x.clone() for x in exact]
    off[4][0] -= 0.25               # the response of one token
    assert abs(difference(off) - 0.25) < 1e-4
    value = difference(exact)
    assert 0 < value <= 1e-5, value
    return {"max_abs_logprob_difference": value}


def case_logprobs_of_tied_weights() -> dict[str, float]:
    return log_probs_agree("tied", 1.0)


def case_logprobs_of_untied_weights() -> dict[str, float]:
    return log_probs_agree("untied", 1.0)


def case_logprobs_at_another_temperature() -> dict[str, float]:
    return log_probs_agree("untied", 0.7)


# ---------------------------------------------------------------- losses and gradients

def objective_agrees(o: Objective) -> dict[str, Any]:
    """Loss and all gradients of a step, packed, against the reference objective on transformers' model."""
    trainer = tiny.build_trainer(
        FOLDER / "untied", calculate_per_token_loss=o.per_token, eps_clip=o.eps_low, eps_clip_high=o.eps_high, eps_clip_c=o.dual,
        kl_loss_type=o.kl_type, kl_loss_coef=o.kl_loss_coef, use_kl_loss=o.kl_loss_coef > 0, kl_coef=o.kl_coef, entropy_coef=o.entropy_coef,
        rollout_temperature=o.temperature, use_rollout_logprobs=o.off_policy)
    batch = samples()
    metrics, found = tiny.run_packs(trainer, batch, [batch[:3], batch[3:7], batch[7:]])
    policy, other = tiny.load_transformers(FOLDER / "untied"), tiny.load_transformers(FOLDER / "other")
    expected_loss = reference.loss(policy, other, batch, o)
    expected_loss.backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    scale = max(abs(expected_loss.item()), 0.1)         # advantages of a group sum to zero: a loss may be nearly nothing
    loss_difference = abs(metrics["train/loss"] - expected_loss.item()) / scale
    gradient_difference, name = tiny.worst(found, expected)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert loss_difference <= 1e-6, (metrics["train/loss"], expected_loss.item())
    assert gradient_difference <= 1e-5, (gradient_difference, name)
    assert abs(metrics["train/grad_norm"] / norm - 1) <= 1e-5, (metrics["train/grad_norm"], norm)
    return {"loss": loss_difference, "gradient": gradient_difference, "tensor": name}


def case_grpo_on_policy() -> dict[str, Any]:
    return objective_agrees(Objective())


def case_grpo_on_policy_per_token() -> dict[str, Any]:
    return objective_agrees(Objective(per_token=True))


def clips(o: Objective, *wanted: str) -> dict[str, Any]:
    counts = reference.clipped_share(tiny.load_transformers(FOLDER / "untied"), samples(), o)
    assert all(counts[w] >= 3 for w in (*wanted, "inside")), counts
    return objective_agrees(o)


def case_grpo_clip() -> dict[str, Any]:
    return clips(Objective(off_policy=True), "above", "below")


def case_grpo_clip_higher() -> dict[str, Any]:
    return clips(Objective(off_policy=True, eps_low=0.1, eps_high=0.4), "above", "below")


def case_grpo_dual_clip() -> dict[str, Any]:
    return clips(Objective(off_policy=True, dual=1.5), "above", "below", "dual")


def case_grpo_dual_clip_per_token() -> dict[str, Any]:
    return clips(Objective(off_policy=True, dual=1.5, per_token=True), "above", "below", "dual")


def case_kl_loss_k1() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k1", kl_loss_coef=0.3))


def case_kl_loss_k2() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k2", kl_loss_coef=0.3))


def case_kl_loss_k3() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k3", kl_loss_coef=0.3))


def case_kl_loss_k3_per_token() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k3", kl_loss_coef=0.3, per_token=True))


def case_kl_loss_low_var_kl() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="low_var_kl", kl_loss_coef=0.3, off_policy=True))


def case_kl_in_the_reward() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k1", kl_coef=0.2))


def case_kl_in_the_reward_k3() -> dict[str, Any]:
    return objective_agrees(Objective(kl_type="k3", kl_coef=0.2, off_policy=True))


def case_entropy_bonus() -> dict[str, Any]:
    return objective_agrees(Objective(entropy_coef=0.05))


def case_everything_at_once() -> dict[str, Any]:
    return objective_agrees(Objective(per_token=True, eps_low=0.1, eps_high=0.3, dual=2.0, kl_type="low_var_kl", kl_loss_coef=0.1, entropy_coef=0.02,
                                      temperature=0.8, off_policy=True))


def case_sft() -> dict[str, Any]:
    batch = samples()
    trainer = tiny.build_trainer(FOLDER / "tied", loss_type="sft", rollout_temperature=0.5)         # which SFT does not heed
    metrics, found = tiny.run_packs(trainer, batch, [batch[:4], batch[4:]])
    model = tiny.load_transformers(FOLDER / "tied")
    total = tiny.sft_loss(model, batch)
    total.backward()
    difference, name = tiny.worst(found, {n: p.grad for n, p in model.named_parameters()})
    assert abs(metrics["train/loss"] / total.item() - 1) <= 1e-6
    assert difference <= 1e-5, (difference, name)
    return {"gradient": difference, "tensor": name}


# ---------------------------------------------------------------- layouts: packing and recompute; saves what two ranks compare with

# Advantages that sum to zero make a loss of nearly zero, whose relative difference says nothing: so they are the rewards here.
EVERYTHING: dict[str, Any] = dict(disable_rewards_normalization=True, use_rollout_logprobs=True, use_kl_loss=True, kl_loss_coef=0.1,
                                  kl_loss_type="k3", entropy_coef=0.02, eps_clip_c=2.0, eps_clip_high=0.3)
OBJECTIVES: dict[str, dict[str, Any]] = {"grpo": EVERYTHING, "grpo_per_token": {**EVERYTHING, "calculate_per_token_loss": True},
                                         "sft": {"loss_type": "sft"}}


def case_ten_packings() -> dict[str, Any]:
    """Ten random packings against every sample in a pack of its own."""
    batch, loss, gradient = samples(), 0.0, (0.0, "")
    saved: dict[str, Any] = {}
    for objective, options in OBJECTIVES.items():
        trainer = tiny.build_trainer(FOLDER / "untied", **options)
        metrics, expected = tiny.run_packs(trainer, batch, tiny.one_each(batch))
        saved[objective] = (metrics["train/loss"], expected)
        for packs in tiny.packings(batch, 10, 1):
            again, found = tiny.run_packs(trainer, batch, packs[0])
            loss = max(loss, abs(again["train/loss"] / metrics["train/loss"] - 1))
            gradient = max(gradient, tiny.worst(found, expected))
    assert loss <= 1e-6 and gradient[0] <= 1e-5, (loss, gradient)
    torch.save({"samples": batch, "options": OBJECTIVES, "single": saved}, FOLDER / "single.pt")
    return {"loss": loss, "gradient": gradient[0], "tensor": gradient[1]}


def case_full_recompute() -> dict[str, Any]:
    batch = samples()
    packs = [batch[:5], batch[5:]]
    plain, expected = tiny.run_packs(tiny.build_trainer(FOLDER / "untied", **EVERYTHING), batch, packs)
    trainer = tiny.build_trainer(FOLDER / "untied", **EVERYTHING, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    calls = []
    trainer.chunks[0].decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    again, found = tiny.run_packs(trainer, batch, packs)
    assert len(calls) == 2 * len(packs), "the layers did not run twice: nothing was recomputed"
    assert again["train/loss"] == plain["train/loss"]
    difference, name = tiny.worst(found, expected)
    assert difference <= 1e-6, (difference, name)
    return {"gradient": difference, "tensor": name}


def case_a_swapped_trainer_trains_the_same() -> None:
    """Weights, optimizer and reference leave and come back between rollouts, gradients are dropped: not a bit changes. Also with fp32 weights beside
    bf16 ones."""
    from rlmono.memory.host import HostMemory
    from rlmono.memory.plan import LEAVES, SwapPlan
    from rlmono.memory.swap import Memory
    batch = samples()
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for rung in ("none", "optimizer", "all"):
            trainer = tiny.build_trainer(FOLDER / "untied", dtype=dtype, lr=1e-3, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3")
            memory = Memory(None, SwapPlan(rung, LEAVES[rung], "a test"), HostMemory(2**24, pin=False))
            memory.adopt(trainer.tagged())
            assert all(h.nbytes for h in memory.holdings.values())
            trainer.before_update(memory.wait)
            for state in ("boot", "sync", "rollout", "train", "sync", "rollout"):
                if state == "train":
                    away = {name for name, h in memory.holdings.items() if not h.here}
                    assert away == set(LEAVES[rung]), away
                    assert all(s.nbytes() == 0 for name in away for s in memory.holdings[name].storages)
                memory.to(state)
                if state == "train":
                    trainer.train(tiny.batch(batch, tiny.step([batch], batch)))
            memory.to("train")
            metrics = trainer.train(tiny.batch(batch, tiny.step([batch], batch)))
            results.append((metrics["train/kl_loss"], metrics["train/grad_norm"], tiny.exported(trainer)))
        for kl, norm, weights in results[1:]:
            assert (kl, norm) == results[0][:2]
            assert all(torch.equal(weights[k], v) for k, v in results[0][2].items())


def case_responses_without_a_token() -> None:
    """A sample that was aborted before its first token counts as a sample, and trains nothing."""
    bare = samples()
    empty = tiny.sample(8, 2, 1.0, [4, 5, 6], 0, [], [])
    trainer = tiny.build_trainer(FOLDER / "untied", **EVERYTHING)
    batch = [*bare, empty]
    policy, other = tiny.load_transformers(FOLDER / "untied"), tiny.load_transformers(FOLDER / "other")
    o = Objective(eps_high=0.3, dual=2.0, kl_type="k3", kl_loss_coef=0.1, entropy_coef=0.02, off_policy=True)
    reference.loss(policy, other, batch, o, [s.reward for s in batch]).backward()
    for packs in ([batch], [batch[:4], batch[4:]], [bare, [empty]]):
        _, found = tiny.run_packs(trainer, batch, packs)
        difference, name = tiny.worst(found, {n: p.grad for n, p in policy.named_parameters()})
        assert difference <= 1e-5, (difference, name)


# ---------------------------------------------------------------- steps

def case_two_steps_of_a_rollout() -> dict[str, Any]:
    """Old logprobs from their own pass: the ratio is 1 in the first step, and not in the second."""
    batch = samples()
    trainer = tiny.build_trainer(FOLDER / "untied", lr=1e-3)
    halves = [batch[::2], batch[1::2]]
    metrics = trainer.train(tiny.batch(batch, *(tiny.step([half[:2], half[2:]], half) for half in halves)))
    first, second = metrics["train/ppo_kl_step1"], metrics["train/ppo_kl_step2"]
    assert abs(first) < 1e-8 and second > 1e-7, (first, second)
    return {"ppo_kl_step1": first, "ppo_kl_step2": second}


def case_an_identical_reference_has_no_kl() -> dict[str, float]:
    batch = samples()
    trainer = tiny.build_trainer(FOLDER / "untied", use_kl_loss=True, kl_loss_type="k3")
    trainer.load_hf(FOLDER / "untied", trainer.reference)
    kl = tiny.run_packs(trainer, batch, [batch])[0]["train/kl_loss"]
    assert abs(kl) < 1e-8, kl
    return {"kl": kl}


def case_rollouts_like_torch_adamw() -> dict[str, Any]:
    """Two rollouts of two steps: clipping, Adam and the schedule as torch's own do them, on the reference objective."""
    batch = samples()
    lr, eps = 2e-3, 1e-3            # a large eps: else rounding decides the sign of an update whose gradient is nearly zero
    trainer = tiny.build_trainer(FOLDER / "untied", total_steps=4, lr=lr, clip_grad=0.2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9,
                                 adam_eps=eps, lr_warmup_iters=2, lr_decay_style="linear", use_rollout_logprobs=True, entropy_coef=0.01)
    policy = tiny.load_transformers(FOLDER / "untied")
    decayed = [p for n, p in policy.named_parameters() if "norm" not in n]
    plain = [p for n, p in policy.named_parameters() if "norm" in n]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.8, 0.9), eps=eps)
    o, rates, losses, norms = Objective(off_policy=True, entropy_coef=0.01), [0.5, 1.0, 0.5, 0.0], [], []
    advantages = dict(zip((s.index for s in batch), reference.normalised(batch, [s.reward for s in batch]), strict=True))
    halves = [batch[::2], batch[1::2]]
    for _ in range(2):
        metrics = trainer.train(tiny.batch(batch, *(tiny.step([half], half) for half in halves)))
        for half in halves:
            reference_loss = reference.loss(policy, policy, half, o, [advantages[s.index] for s in half])
            adam.zero_grad()
            reference_loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.2)))
            for group in adam.param_groups:
                group["lr"] = lr * rates[len(losses)]
            adam.step()
            losses.append(reference_loss.item())
        assert abs(metrics["train/loss"] - sum(losses[-2:]) / 2) <= 1e-6, (metrics["train/loss"], losses)
        assert abs(metrics["train/grad_norm"] - sum(norms[-2:]) / 2) <= 1e-5 * norms[-1], (metrics["train/grad_norm"], norms)
    assert min(norms) > 0.2, f"nothing was clipped: {norms}"
    difference, name = tiny.worst(tiny.exported(trainer), {n: p.data for n, p in policy.named_parameters()})
    assert difference <= 1e-6, (difference, name)
    return {"weights": difference, "tensor": name}


def case_steps_that_are_not_finite() -> None:
    """Skipped and counted; the next one is taken."""
    batch = samples()
    for bad in (math.nan, math.inf):
        trainer = tiny.build_trainer(FOLDER / "untied", lr=1e-2, use_rollout_logprobs=True)
        before, moments = tiny.exported(trainer), adam_state(trainer)
        broken = [tiny.rewarded(batch[0], bad), *batch[1:]]
        metrics, _ = tiny.run_packs(trainer, broken, [broken])
        assert metrics["train/skipped_steps"] == 1
        assert all(torch.equal(x, before[n]) for n, x in tiny.exported(trainer).items()), "a step that is not finite changed weights"
        assert all(torch.equal(x, y) for x, y in zip(adam_state(trainer), moments, strict=True)), "it changed Adam's moments"
        metrics, _ = tiny.run_packs(trainer, batch, [batch])
        assert metrics["train/skipped_steps"] == 1 and math.isfinite(metrics["train/loss"])
        assert any(not torch.equal(x, before[n]) for n, x in tiny.exported(trainer).items()), "the step after it changed nothing"


def adam_state(trainer: Any) -> list[torch.Tensor]:
    singles = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return [x.clone() for single in singles for state in single.optimizer.state.values() for x in state.values()]


def case_learning_rates() -> None:
    batch = samples()[:2]

    def rates(**options: Any) -> list[float]:
        trainer = tiny.build_trainer(FOLDER / "untied", total_steps=8, lr=1e-3, **options)
        return [tiny.run_packs(trainer, batch, [batch])[0]["train/lr"] * 1e3 for _ in range(8)]
    half = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(1, 7)]
    expected = {
        "constant": ({}, [1.0] * 8),
        "constant, warm-up": ({"lr_warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        "linear": ({"lr_decay_style": "linear", "lr_warmup_iters": 2, "min_lr": 1e-4},
                   [0.5, 1, *(1 - 0.9 * i / 6 for i in range(1, 7))]),
        "linear, short": ({"lr_decay_style": "linear", "lr_decay_iters": 4}, [0.75, 0.5, 0.25, 0, 0, 0, 0, 0]),
        "cosine": ({"lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 1e-4}, [0.5, 1, *(0.1 + 0.9 * x for x in half)]),
        "inverse square root": ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 2}, [0.5, 1, *((2 / n) ** 0.5 for n in range(3, 9))]),
    }
    for name, (options, wanted) in expected.items():
        found = rates(**options)
        assert all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True)), (name, found, wanted)


# ---------------------------------------------------------------- weights

def case_hf_round_trip() -> None:
    for name in ("tied", "untied"):
        round_trip(FOLDER / name, FOLDER / f"{name}_again")


def round_trip(source: Path, target: Path) -> None:
    """Load → export → load is bit-equal, and transformers reads the export as the same model."""
    from safetensors.torch import load_file

    from rlmono.weights.hf import save_hf
    trainer = tiny.build_trainer(source)
    first = tiny.exported(trainer)
    original = load_file(source / "model.safetensors")
    assert first.keys() == original.keys() and all(torch.equal(x, original[n]) for n, x in first.items())
    save_hf(target, first.items(), source, torch.float32)
    trainer = tiny.build_trainer(target)
    assert all(torch.equal(x, first[n]) for n, x in tiny.exported(trainer).items())
    batch = tiny.make_samples()
    pairs = zip(tiny.transformers_log_probs(source, batch), tiny.transformers_log_probs(target, batch), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def case_weights_that_do_not_fit_are_refused_by_name() -> None:
    from safetensors.torch import load_file, save_file

    from rlmono.weights.hf import WeightsError
    good = load_file(FOLDER / "untied" / "model.safetensors")
    trainer, broken = tiny.build_trainer(FOLDER / "untied"), FOLDER / "broken"
    shutil.copytree(FOLDER / "untied", broken)

    def error(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        try:
            trainer.load_hf(broken)
        except WeightsError as e:
            return str(e)
        raise AssertionError("it was loaded")
    layer = "model.layers.1."
    q, k, gate, up = (f"{layer}{x}.weight" for x in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"))
    nan, infinite = good[k].clone(), good["lm_head.weight"].clone()
    nan[3, 5], infinite[0, 0] = math.nan, math.inf
    refused = {
        "missing": (q, {n: x for n, x in good.items() if n != q}),
        "extra": (f"{layer}mlp.shared.weight", {**good, f"{layer}mlp.shared.weight": torch.ones(2)}),
        "too few rows": (gate, {**good, gate: good[gate][:-1].clone()}),
        "one that makes up for another": (gate, {**good, gate: good[gate][:-2].clone(), up: torch.cat([good[up], good[up][:2]])}),
        "queries as keys": (q, {**good, q: good[q][:96].clone(), k: torch.cat([good[k], good[k][:32]])}),
        "another rank": (f"{layer}input_layernorm.weight", {**good, f"{layer}input_layernorm.weight": torch.ones(64, 1)}),
        "a short vocabulary": ("model.embed_tokens.weight", {**good, "model.embed_tokens.weight": good["model.embed_tokens.weight"][:-1].clone()}),
        "nan": (k, {**good, k: nan}),
        "infinite": ("lm_head.weight", {**good, "lm_head.weight": infinite}),
    }
    for what, (name, tensors) in refused.items():
        message = error(tensors)
        assert name in message and str(broken) in message, (what, message)
    tied_head(broken)


def tied_head(broken: Path) -> None:
    """Where embeddings are tied, a head of its own in the file is a copy, or an error."""
    from safetensors.torch import load_file, save_file

    from rlmono.weights.hf import WeightsError
    good = load_file(FOLDER / "tied" / "model.safetensors")
    trainer = tiny.build_trainer(FOLDER / "tied")
    head = good["model.embed_tokens.weight"].clone()
    save_file({**good, "lm_head.weight": head}, broken / "model.safetensors", metadata={"format": "pt"})
    trainer.load_hf(broken)
    head[0, 0] += 1
    save_file({**good, "lm_head.weight": head}, broken / "model.safetensors", metadata={"format": "pt"})
    try:
        trainer.load_hf(broken)
    except WeightsError as e:
        assert "lm_head.weight" in str(e)
    else:
        raise AssertionError("a head that is not the embeddings was ignored")


# ---------------------------------------------------------------- Transformer Engine

def case_transformer_engine_is_seen_by_nobody() -> None:
    """One lies on the path that breaks when it is imported (see cases.py): Megatron has not tried, whichever of its modules are loaded by now."""
    from importlib.util import find_spec
    assert find_spec("transformer_engine") is not None and "transformer_engine" not in sys.modules
    megatron = [m for name, m in sys.modules.items() if name.startswith("megatron.core")]
    assert len(megatron) > 100 and not [m for m in megatron if vars(m).get("HAVE_TE") or vars(m).get("tex")]


def case_transformer_engine_that_does_not_import() -> None:
    """Is one message where it was asked for by name, and otherwise a warning. The CPU asks for none."""
    from rlmono.config.schema import Config
    from rlmono.trainer import te
    assert not te.check(Config()) and "transformer_engine" not in sys.modules
    failed = te._library()
    te._tell(Config(), failed, "does not import")
    try:
        te._tell(Config(transformer_impl="transformer_engine"), failed, "does not import")
    except te.Unusable as e:
        assert str(e) == ("Transformer Engine does not import: RuntimeError: libtransformer_engine.so: undefined symbol. --transformer-impl auto "
                          "or local does without it"), e
    else:
        raise AssertionError("it was taken for usable")


class AsIf:
    """`transformer_engine.pytorch` as far as te.py uses it, in plain torch: modules with parameters and keys of their own."""

    class RMSNorm(torch.nn.RMSNorm):
        def get_extra_state(self) -> str:
            return "a key in the checkpoint"

    class DotProductAttention(torch.nn.Module):
        def __init__(self, heads: int, dim: int, num_gqa_groups: int, attention_dropout: float, qkv_format: str, attn_mask_type: str,
                     softmax_scale: float | None):
            super().__init__()
            assert (heads, num_gqa_groups, dim, attention_dropout, qkv_format, attn_mask_type) == (4, 2, 32, 0.0, "thd", "padding_causal")
            self.scale = softmax_scale

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
                    max_seqlen_q: int, max_seqlen_kv: int, pad_between_seqs: bool) -> torch.Tensor:
            from rlmono.trainer.attention import varlen_attention
            return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, self.scale).flatten(1)


def case_its_modules_add_nothing_to_the_model() -> None:
    """With others in the place of attention and norms: the same logprobs and gradients, and the same names in checkpoints and exports."""
    from rlmono.trainer import te
    batch, found = samples(), []
    library, usable = te._library, te.usable
    for used in (False, True):
        te._library, te.usable = lambda: AsIf, lambda *_, used=used: used
        try:
            trainer = tiny.build_trainer(FOLDER / "untied")
            kinds = {type(m) for m in trainer.chunks[0].modules()}
            assert used == (te.Norm in kinds) == (te.Attention in kinds)
            metrics, gradients = tiny.run_packs(trainer, batch, [batch[:5], batch[5:]])
            found.append((metrics["train/loss"], gradients, sorted(trainer.chunks[0].sharded_state_dict()),
                          kinds & {AsIf.RMSNorm, AsIf.DotProductAttention}))
        finally:
            te._library, te.usable = library, usable
    (loss, expected, names, none), (value, gradients, others, own) = found
    assert abs(loss - value) <= 1e-6 * abs(loss) and tiny.worst(gradients, expected)[0] <= 1e-5
    assert names == others and not own and not none


if __name__ == "__main__":
    run_cases(globals())
