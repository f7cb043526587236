"""Every layout against one rank: export, routing, loss, logprobs, gradients, one optimizer update; and every family against transformers.

`layouts.py FOLDER [all | speed]`: run on 1 rank first (it writes what the others compare with), then on 2, then on 4. By default in two ways, with
`all` in four; with `speed` in the plainest, and each layout also trains a few steps against the clock.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

import moves
import tiny
import torch
import torch.distributed as dist
from make_families import response_of, sequences

from rlmono.config.schema import Config
from rlmono.models.registry import shape_from_hf
from rlmono.rollout.schedule import plan_step

FOLDER, ALL, SPEED = Path(sys.argv[1]), "all" in sys.argv, "speed" in sys.argv
# Relative, but for log_probs; the last two are ‖Δ‖ / ‖·‖ of the worst tensor.
LIMITS = {"loss": 1e-6, "log_probs": 1e-5, "gradients": 1e-5, "updates": 1e-5}
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
# With experts Megatron wants sequence parallel beside tensor parallel.
EXPERTS = {2: {"dp2": layout(), "ep2": layout(ep=2), "tp2+sp": layout(tp=2), "pp2": layout(pp=2), "pp2·vpp2": layout(pp=2, vpp=2),
               "cp2": layout(cp=2), "tp2·ep2·etp1+sp": layout(tp=2, ep=2, etp=1)},
           4: {"tp2·pp2": layout(tp=2, pp=2), "tp2·cp2": layout(tp=2, cp=2), "pp2·ep2": layout(pp=2, ep=2), "ep4": layout(ep=4),
               "tp2·ep2": layout(tp=2, ep=2), "tp2·ep2·etp1·dp2": layout(tp=2, ep=2, etp=1),
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


def case_lengths_that_need_padding() -> dict[str, Any]:
    """Tensor and context parallel ranks pad each sequence, and routers see the padding too: it must weigh nothing."""
    world, out = dist.get_world_size(), {}
    if world > 1 and not ALL:
        return {}
    odd = [ids[:max(2, len(ids) - 1 - i)] for i, ids in enumerate(sequences())]
    cp, sp = layout(cp=2), layout(tp=2)
    for name in ("qwen3", "glm4_moe", "deepseek_v3"):
        for title, where in {1: {"1": layout()}, 2: {"cp2": cp, "tp2+sp": sp}, 4: {"tp2·cp2": cp | sp}}[world].items():
            found = measure(name, where, False, odd) | {"routed": {}}
            if world == 1:
                torch.save(found, FOLDER / name / "odd.pt")
            out[f"{name} {title}"] = compare(f"{name} {title}", found, torch.load(FOLDER / name / "odd.pt"))
    return out


def case_other_ways_to_recompute() -> dict[str, Any]:
    """Full by blocks, and selective by its default and by name, on two ranks."""
    if dist.get_world_size() != 2 or not ALL:
        return {}
    parts = dict(recompute_granularity="selective")
    out = {}
    for name, title, where in (
            ("qwen3", "pp2 block", layout(pp=2, recompute_granularity="full", recompute_method="block", recompute_num_layers=1)),
            ("qwen3", "tp2 uniform 2", layout(tp=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)),
            ("qwen3", "tp2 selective", layout(tp=2, **parts)), ("qwen3", "cp2 selective", layout(cp=2, **parts)),
            ("glm4_moe", "ep2 selective", layout(ep=2, **parts, megatron={"recompute_modules": ["core_attn", "moe", "layernorm"]})),
            ("deepseek_v3", "tp2 selective", layout(tp=2, **parts, megatron={"recompute_modules": ["core_attn", "mla_up_proj", "mlp"]}))):
        out[f"{name} {title}"] = compare(f"{name} {title}", measure(name, where, False), torch.load(reference(name, False)))
    return out


def case_routers_biases_follow_the_load() -> None:
    """With an update rate: to the same values on every layout."""
    world, file = dist.get_world_size(), FOLDER / "glm4_moe" / "biases.pt"
    if world == 4 or not (ALL or world == 1):
        return
    for title, where in {1: {"1": layout()}, 2: {k: EXPERTS[2][k] for k in ("dp2", "ep2", "pp2", "cp2", "tp2·ep2·etp1+sp")}}[world].items():
        trainer = build("glm4_moe", where, changed={"moe_router_bias_update_rate": 0.01})
        before = biases(trainer)
        trainer.train(share_of(trainer, samples()))
        after = biases(trainer)
        assert len(after) == 3 and all(abs(float((after[k] - x).abs().max()) - 0.01) < 1e-6 for k, x in before.items()), f"{title}: {after}"
        if world == 1:
            torch.save(after, file)
        differing = [k for k, x in torch.load(file).items() if not torch.equal(after[k], x)]
        assert not differing, f"{title}: {differing}"


def case_a_virtual_pipeline_finds_the_same_bits_each_time() -> None:
    """What is being sent must not be let go of: one step in sixty had other gradients."""
    if dist.get_world_size() != 2 or not ALL:
        return
    trainer = build("qwen3", layout(pp=2, vpp=2))
    mine, found = share_of(trainer, samples()), []

    def update() -> dict[str, float]:
        found.append({k: x.clone() for k, x in tiny.gradients(trainer).items()})
        return {"grad_norm": 0.0}
    trainer._update = update
    for _ in range(60):
        trainer.train(mine)
    differing = [i for i, gradients in enumerate(found) if any(not torch.equal(x, found[0][k]) for k, x in gradients.items())]
    assert not differing, f"steps with other gradients than the first: {differing}"


OVERLAP = dict(megatron={"overlap_grad_reduce": True, "bucket_size": 20000})


def case_gradients_are_summed_during_the_backward_pass() -> dict[str, Any]:
    """--overlap-grad-reduce, with several buckets."""
    world = dist.get_world_size()
    if world == 1 or not ALL:
        return {}
    return {f"{name} {title}": compare(f"{name} {title}", measure(name, where | OVERLAP, False), torch.load(reference(name, False)))
            for name, title, where in {2: [("qwen3", "dp2", layout()), ("qwen3_moe", "ep2", layout(ep=2))],
                                       4: [("qwen3", "pp2·dp2", layout(pp=2)), ("qwen3", "pp2·vpp2·dp2", layout(pp=2, vpp=2))]}[world]}


def case_checkpoint_moves() -> dict[str, Any]:
    """From expert to tensor parallel ranks, and from many buckets; every other pair is worlds/checkpoints.py's."""
    if dist.get_world_size() != 2 or not ALL:
        return {}
    store = [tempfile.mkdtemp()]
    dist.broadcast_object_list(store)
    source = Path(store[0]) / "ep2"
    moves.save("qwen3_moe", layout(ep=2), source)
    out = {"ep2 -> tp2+sp": moves.load("qwen3_moe", layout(tp=2), source)}
    moves.save("qwen3", layout(**OVERLAP), source.with_name("dp2"))
    out["dp2, many buckets -> pp2"] = moves.load("qwen3", layout(pp=2), source.with_name("dp2"))
    if dist.get_rank() == 0:
        shutil.rmtree(store[0])
    return out


def case_sixty_one_layers() -> None:
    """DeepSeek-R1's stages, as Megatron deals them: 16 + 16 + 16 + 13."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from rlmono.trainer.model import transformer_config
    shape = shape_from_hf(json.loads((FOLDER / "deepseek_v3" / "config.json").read_text()))
    shape |= {"num_layers": 61, "moe_layer_freq": [int(i >= 3) for i in range(61)]}
    config = transformer_config(Config(model=shape, **layout(pp=4, decoder_last_pipeline_num_layers=13)), torch.bfloat16)
    stages = [(get_transformer_layer_offset(config, pp_rank=i), get_num_layers_to_build(config, pp_rank=i)) for i in range(4)]
    assert stages == [(0, 16), (16, 16), (32, 16), (48, 13)], stages


def case_layers_for_next_token_prediction() -> None:
    """On one rank alone: skipped with a note, and in the export as they were."""
    if dist.get_world_size() > 1:
        return
    from safetensors.torch import load_file, save_file

    from rlmono.weights.hf import save_hf
    for name in ("glm4_moe", "deepseek_v3"):
        with tempfile.TemporaryDirectory() as tmp, notes("rlmono.weights.hf") as lines:
            source, target = Path(tmp) / "source", Path(tmp) / "target"
            shutil.copytree(FOLDER / name, source, ignore=shutil.ignore_patterns("*.pt", "answers"))
            tensors = load_file(source / "model.safetensors")
            layer = {k.replace(".3.", ".4.", 1): x + 1 for k, x in tensors.items() if k.startswith("model.layers.3.")}
            layer |= {f"model.layers.4.{k}.weight": torch.randn(64, 64) for k in ("eh_proj", "enorm", "embed_tokens", "shared_head.head")}
            save_file(layer, source / "prediction.safetensors")
            trainer = build(name, layout())
            trainer.load_hf(source)
            save_hf(target, assert_exports(name, trainer).items(), source, torch.float32)
            written = {k: x for f in target.glob("*.safetensors") for k, x in load_file(f).items()}
            assert written.keys() == (tensors | layer).keys() and all(torch.equal(written[k], x) for k, x in (tensors | layer).items())
            assert [f"{len(layer)} tensors of layers for next-token prediction are {done}" in line
                    for done, line in zip(("skipped", "carried through"), lines, strict=True)] == [True, True], lines


@contextlib.contextmanager
def notes(logger: str) -> Iterator[list[str]]:
    """What a logger says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())     # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    logging.getLogger(logger).setLevel(logging.INFO)
    yield lines
    logging.getLogger(logger).removeHandler(handler)


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
    """What `compare` found, by layout. On one rank: write the references."""
    world, out = dist.get_world_size(), {}
    kinds = list(itertools.product((False, True), ({}, RECOMPUTE))) if ALL else [(False, {}), *([] if SPEED else [(True, RECOMPUTE)])]
    if world == 1:
        for per_token in {k for k, _ in kinds}:
            found = measure(name, layout(), per_token)
            torch.save(found, reference(name, per_token))
            out[f"{name} 1{' per token' if per_token else ''}"] = {"tokens_per_s": found["tokens_per_s"]}
        return out
    for (title, where), (per_token, recompute) in itertools.product(layouts[world].items(), kinds):
        label = f"{name} {title}{' per token' if per_token else ''}{' recompute' if recompute else ''}"
        out[label] = compare(label, measure(name, where | recompute, per_token), torch.load(reference(name, per_token)))
    return out


def compare(label: str, found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The differences, and the tensors that differ most. Raises AssertionError for one above its limit; routing comes first, all else follows."""
    assert found["routed"] == expected["routed"], f"{label}: tokens went to other experts"
    out = {"loss": abs(found["loss"] - expected["loss"]) / abs(expected["loss"]),
           "log_probs": max(float((found["log_probs"][i] - x).abs().max()) for i, x in expected["log_probs"].items())}
    for what in ("gradients", "updates"):
        out[what], out[f"worst_of_{what}"] = worst(label, found[what], expected[what])
    for what, limit in LIMITS.items():
        assert out[what] <= limit, f"{label}: {what}{' of ' + out[f'worst_of_{what}'] if f'worst_of_{what}' in out else ''} off by {out[what]:.1e}"
    return out | {"tokens_per_s": found["tokens_per_s"]}


def worst(label: str, found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """‖Δ‖ / ‖·‖ of the worst tensor. An expert that no token went to must have exactly none here too."""
    unused = [k for k, x in expected.items() if not x.any()]
    assert all(".experts." in k and not found[k].any() for k in unused), f"{label}: {unused} should be zero"
    used = expected.keys() - set(unused)
    return tiny.worst({k: found[k] for k in used}, {k: expected[k] for k in used})


def measure(name: str, where: dict[str, Any], per_token: bool, ids: list[list[int]] | None = None) -> dict[str, Any]:
    """One training step on this layout, on these sequences: what the ranks found, put together."""
    trainer = build(name, where, per_token)
    before = assert_exports(name, trainer)
    mine = share_of(trainer, samples(ids))
    packs = mine.steps[0].packs
    log_probs = gathered_log_probs(trainer, mine)
    routed, calls = count_routed(trainer), count_attention(trainer)
    kept: dict[str, Any] = {}
    step = trainer._update

    def update() -> Any:
        kept["gradients"] = tiny.gradients(trainer)
        return step()
    trainer._update = update
    metrics = trainer.train(mine)
    trainer._update = step
    assert max(calls.values()) == len(packs) * (2 if where.get("recompute_granularity") else 1), f"{name}: {calls} with {len(packs)} packs"
    after = tiny.exported(trainer)
    moved = {k: after[k] - before[k] for k in after if "e_score_correction_bias" not in k}
    gradients = {k: g for k, g in kept["gradients"].items() if "e_score_correction_bias" not in k}
    loss = next(x for x in everywhere(metrics.get("train/loss") if trainer.reports else None) if x is not None)
    return {"loss": loss, "log_probs": log_probs, "routed": total(routed), "gradients": gradients, "updates": moved,
            "tokens_per_s": speed(trainer, mine) if SPEED else None}


def biases(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: x for k, x in tiny.exported(trainer).items() if "e_score_correction_bias" in k}


def share_of(trainer: Any, batch: list[Any]) -> Any:
    """What this rank trains on of a step."""
    rank, size = trainer.data_parallel
    packs = [[batch[i] for i in pack] for pack in plan_step(range(len(batch)), [len(tiny.tokens_of(s)) for s in batch], trainer.config, size)[rank]]
    return tiny.batch(batch, tiny.step(packs, batch))


def speed(trainer: Any, batch: Any) -> float:
    """Tokens a second and rank, over three steps after the first."""
    started = time.perf_counter()
    for _ in range(3):
        trainer.train(batch)
    dist.barrier()
    return 3 * sum(map(len, sequences())) / (time.perf_counter() - started) / dist.get_world_size()


def build(name: str, where: dict[str, Any], per_token: bool = False, dtype: torch.dtype = torch.float32, changed: dict[str, Any] | None = None,
          **options: Any) -> Any:
    from rlmono.trainer.trainer import Trainer
    tiny.leave_layout()
    shape = shape_from_hf(json.loads((FOLDER / name / "config.json").read_text())) | (changed or {})
    # A large eps: otherwise Adam makes whole steps of gradients that are only rounding; a large lr: updates are differences of weights near 1.
    values = dict(lr=0.3, adam_eps=1e-3, weight_decay=0.0) | options
    config = Config(hf_checkpoint=str(FOLDER / name), model=shape, colocate=True, loss_type="sft", use_dynamic_batch_size=True,
                    max_tokens_per_gpu=64 // where["context_parallel_size"], calculate_per_token_loss=per_token, **values, **where)
    trainer = Trainer(config, dtype, 10)
    trainer.load_hf(FOLDER / name)
    return trainer


def samples(of: list[list[int]] | None = None) -> list[Any]:
    return [tiny.sample(i, i // 4, 0.0, ids, n, [1] * n, []) for i, ids in enumerate(of or sequences()) for n in [response_of(len(ids))]]


def log_probs_of(trainer: Any, batch: list[Any]) -> list[torch.Tensor]:
    from rlmono.trainer.packs import make_pack
    packs = [make_pack(batch[:4], trainer.device, 1), make_pack(batch[4:], trainer.device, 1)]
    trainer._set_log_probs(trainer.ddp, packs, "old_log_probs")
    return [x for p in packs for x in p.old_log_probs.split([s.response_length for s in p.samples])]


def gathered_log_probs(trainer: Any, batch: Any) -> dict[int, torch.Tensor]:
    """[r] logprobs of every sample of all ranks, by its index."""
    packs = trainer._packs(batch)[0]
    trainer._set_log_probs(trainer.ddp, packs, "old_log_probs")
    mine = {s.index: x for p in packs if p.old_log_probs is not None
            for s, x in zip(p.samples, p.old_log_probs.split([s.response_length for s in p.samples]), strict=True)}
    return {i: x for part in everywhere(mine) for i, x in part.items()}


def count_routed(trainer: Any) -> dict[str, torch.Tensor]:
    """Tokens that went to each expert, by layer in the whole model; filled as the model trains (once a token, also with recompute)."""
    from megatron.core.transformer.moe.router import TopKRouter
    counts: dict[str, torch.Tensor] = {}

    def hook(module: Any, _: Any, out: Any) -> None:
        key = str(module.layer_number)
        if not torch.is_grad_enabled():
            return
        counts[key] = counts.get(key, 0) + out[1].sum(0).double().cpu()
    for chunk in trainer.chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(hook)
    return counts


def count_attention(trainer: Any) -> dict[int, int]:
    """How often attention runs in each layer here, filled as the model trains: twice a pack where it is recomputed."""
    from rlmono.trainer.attention import VarlenAttention
    calls: dict[int, int] = {}

    def hook(module: Any, *_: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
    for chunk in trainer.chunks:
        for module in chunk.modules():
            if isinstance(module, VarlenAttention):
                module.register_forward_hook(hook)
    return calls


def total(counts: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for part in everywhere({k: v.tolist() for k, v in counts.items()}):
        for key, values in part.items():
            out[key] = [a + b for a, b in zip(out.get(key, [0.0] * len(values)), values, strict=True)]
    return out


def everywhere(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def reference(name: str, per_token: bool) -> Path:
    return FOLDER / name / f"one_rank_{int(per_token)}.pt"


def assert_exports(name: str, trainer: Any) -> dict[str, torch.Tensor]:
    """What the trainer exports, which is what was loaded, by name and bit by bit."""
    from safetensors.torch import load_file
    exported, source = tiny.exported(trainer), load_file(FOLDER / name / "model.safetensors")
    assert exported.keys() == source.keys(), f"{name}: other tensors: {sorted(exported.keys() ^ source.keys())[:4]}"
    differing = [k for k in source if not torch.equal(exported[k].float(), source[k].float())]
    assert not differing, f"{name}: {differing[0]} has changed on its way through Megatron"
    return exported


if __name__ == "__main__":
    from cases import run_cases
    run_cases(globals(), 600)
