"""Every layout against one rank: loss, routing, gradients, one optimizer update; and every family against transformers.

`layouts.py FOLDER [all]`: run on 1 rank first (it writes what the others compare with), then on 2, then on 4.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from make_families import response_of, sequences

from rlmono.config.schema import Config
from rlmono.models.registry import shape_from_hf
from rlmono.rollout.schedule import plan_step

FOLDER, ALL = Path(sys.argv[1]), "all" in sys.argv
LOSS, GRADIENT, UPDATE = 1e-6, 1e-5, 1e-5       # relative; the last two ‖Δ‖ / ‖·‖ of the worst tensor
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def layout(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, vpp: int | None = None, etp: int | None = None, sp: bool = True,
           **more: Any) -> dict[str, Any]:
    return dict(tensor_model_parallel_size=tp, sequence_parallel=tp > 1 and sp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
                expert_model_parallel_size=ep, virtual_pipeline_model_parallel_size=vpp, expert_tensor_parallel_size=etp, **more)


DENSE = {2: {"dp2": layout(), "tp2": layout(tp=2, sp=False), "tp2+sp": layout(tp=2), "pp2": layout(pp=2), "pp2·vpp2": layout(pp=2, vpp=2),
             "cp2": layout(cp=2)},
         4: {"tp2·pp2": layout(tp=2, pp=2), "tp2·cp2": layout(tp=2, cp=2), "pp2·cp2": layout(pp=2, cp=2), "tp2·dp2": layout(tp=2),
             "pp2·vpp2·dp2": layout(pp=2, vpp=2),
             "pp4": layout(pp=4), "cp4": layout(cp=4)}}
EXPERTS = {2: {"dp2": layout(), "ep2": layout(ep=2), "pp2": layout(pp=2), "pp2·vpp2": layout(pp=2, vpp=2), "cp2": layout(cp=2),
               "tp2·ep2·etp1+sp": layout(tp=2, ep=2, etp=1)},
           4: {"pp2·ep2": layout(pp=2, ep=2), "ep4": layout(ep=4), "tp2·ep2·etp1·dp2": layout(tp=2, ep=2, etp=1),
               "tp2·pp2·ep2·etp1": layout(tp=2, pp=2, ep=2, etp=1),
               "cp2·ep2": layout(cp=2, ep=2), "tp2·cp2·ep4·etp1": layout(tp=2, cp=2, ep=4, etp=1)}}


def case_dense() -> dict[str, Any]:
    return like_one_rank("qwen3", DENSE)


def case_dense_tied() -> dict[str, Any]:
    return like_one_rank("qwen3_tied", DENSE)


def case_uneven_stages() -> dict[str, Any]:
    """Five layers on two stages."""
    uneven = {"2+3": layout(pp=2, decoder_first_pipeline_num_layers=2), "4+1": layout(pp=2, decoder_last_pipeline_num_layers=1)}
    return like_one_rank("qwen3_five", {2: uneven, 4: {}})


def case_experts() -> dict[str, Any]:
    return like_one_rank("qwen3_moe", EXPERTS)


def case_shared_expert_and_sigmoid_router() -> dict[str, Any]:
    return like_one_rank("glm4_moe", EXPERTS)


def case_latent_attention() -> dict[str, Any]:
    return like_one_rank("deepseek_v3", EXPERTS)


def case_logprobs_of_every_family() -> dict[str, Any]:
    """On one rank alone: transformers' logprobs, and the export of what was loaded, bit for bit."""
    if dist.get_world_size() > 1:
        return {}
    out = {}
    for name in sorted(p.name for p in FOLDER.iterdir() if (p / "config.json").exists()):
        trainer = build(name, layout(), False)
        batch = samples()
        found = log_probs_of(trainer, batch)
        expected = torch.load(FOLDER / name / "log_probs.pt")
        out[name] = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        assert out[name] <= 1e-5, f"{name}: logprobs differ by {out[name]:.1e}"
        assert_exports(name, trainer)
    return out


# ---------------------------------------------------------------- the comparison

def like_one_rank(name: str, layouts: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Worst differences a layout. On one rank: write the references."""
    world, out = dist.get_world_size(), {}
    kinds = list(itertools.product((False, True), ({}, RECOMPUTE))) if ALL else [(False, {}), (True, RECOMPUTE)]
    if world == 1:
        for per_token in {k for k, _ in kinds}:
            torch.save(measure(name, layout(), per_token), reference(name, per_token))
        return {}
    for (title, where), (per_token, recompute) in itertools.product(layouts[world].items(), kinds):
        found, expected = measure(name, where | recompute, per_token), torch.load(reference(name, per_token))
        label = f"{name} {title}{' per token' if per_token else ''}{' recompute' if recompute else ''}"
        if found["loss"] is not None:           # the rank that reports
            off = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
            assert off <= LOSS, f"{label}: loss off by {off:.1e}"
            assert recompute or found["routed"] == expected["routed"], f"{label}: tokens went to other experts"
        out[label] = [worst(label, found, expected, "gradients", GRADIENT), worst(label, found, expected, "updates", UPDATE)]
    return out


def worst(label: str, found: dict[str, Any], expected: dict[str, Any], what: str, limit: float) -> float:
    """‖Δ‖ / ‖·‖ of the worst tensor. An expert that no token went to must have exactly none here too."""
    unused = [k for k, x in expected[what].items() if not x.any()]
    assert all(".experts." in k and not found[what][k].any() for k in unused), f"{label}: {what} of {unused} should be zero"
    used = expected[what].keys() - set(unused)
    off, at = tiny.worst({k: found[what][k] for k in used}, {k: expected[what][k] for k in used})
    assert off <= limit, f"{label}: {what} of {at} off by {off:.1e}"
    return off


def measure(name: str, where: dict[str, Any], per_token: bool) -> dict[str, Any]:
    trainer = build(name, where, per_token)
    before = tiny.exported(trainer)
    batch, routed = samples(), count_routed(trainer)
    kept: dict[str, Any] = {}
    step = trainer._update

    def update() -> Any:
        kept["gradients"] = tiny.gradients(trainer)
        return step()
    trainer._update = update
    rank, size = trainer.data_parallel
    packs = [[batch[i] for i in pack] for pack in plan_step(range(len(batch)), [len(tiny.tokens_of(s)) for s in batch], trainer.config, size)[rank]]
    metrics = trainer.train(tiny.batch(batch, tiny.step(packs, batch)))
    after = tiny.exported(trainer)
    moved = {k: after[k] - before[k] for k in after if "e_score_correction_bias" not in k}
    gradients = {k: g for k, g in kept["gradients"].items() if "e_score_correction_bias" not in k}
    return {"loss": metrics.get("train/loss") if trainer.reports else None, "routed": total(routed), "gradients": gradients, "updates": moved}


def build(name: str, where: dict[str, Any], per_token: bool) -> Any:
    from megatron.core import parallel_state

    from rlmono.trainer.trainer import Trainer
    gc.collect()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    shape = shape_from_hf(json.loads((FOLDER / name / "config.json").read_text()))
    # A large eps: otherwise Adam makes whole steps of gradients that are only rounding; a large lr: updates are differences of weights near 1.
    config = Config(hf_checkpoint=str(FOLDER / name), model=shape, colocate=True, loss_type="sft", use_dynamic_batch_size=True,
                    max_tokens_per_gpu=64 // where["context_parallel_size"], calculate_per_token_loss=per_token,
                    lr=0.3, adam_eps=1e-3, weight_decay=0.0, **where)
    trainer = Trainer(config, torch.float32, 10)
    trainer.load_hf(FOLDER / name)
    return trainer


def samples() -> list[Any]:
    return [tiny.sample(i, i // 4, 0.0, ids, response_of(len(ids)), [1] * response_of(len(ids)), []) for i, ids in enumerate(sequences())]


def log_probs_of(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    from rlmono.trainer.packs import make_pack
    packs = [make_pack(batch[:4], trainer.device, 1), make_pack(batch[4:], trainer.device, 1)]
    trainer._set_log_probs(trainer.ddp, packs, "old_log_probs")
    return [x for p in packs for x in p.old_log_probs.split([s.response_length for s in p.samples])]


def count_routed(trainer: Any) -> dict[str, torch.Tensor]:
    """Tokens that went to each expert, by layer in the whole model; filled as the model runs."""
    from megatron.core.transformer.moe.router import TopKRouter
    counts: dict[str, torch.Tensor] = {}

    def hook(module: Any, _: Any, out: Any) -> None:
        key = str(module.layer_number)
        counts[key] = counts.get(key, 0) + out[1].sum(0).double().cpu()
    for chunk in trainer.chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(hook)
    return counts


def total(counts: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {k: v.tolist() for k, v in counts.items()})
    out: dict[str, list[float]] = {}
    for part in parts:
        for key, values in part.items():
            out[key] = [a + b for a, b in zip(out.get(key, [0.0] * len(values)), values, strict=True)]
    return out


def reference(name: str, per_token: bool) -> Path:
    return FOLDER / name / f"one_rank_{int(per_token)}.pt"


def assert_exports(name: str, trainer: Any) -> None:
    from safetensors.torch import load_file
    exported, source = tiny.exported(trainer), load_file(FOLDER / name / "model.safetensors")
    assert exported.keys() == source.keys(), f"{name}: other tensors: {sorted(exported.keys() ^ source.keys())[:4]}"
    differing = [k for k in source if not torch.equal(exported[k].float(), source[k].float())]
    assert not differing, f"{name}: {differing[0]} has changed on its way through Megatron"


if __name__ == "__main__":
    from cases import run_cases
    run_cases(globals(), 600)
