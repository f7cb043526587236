"""What the worlds share: tiny Qwen3 models, samples, transformers' answers, a Trainer on any layout, its gradients."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any, Iterator

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from rlmono.config.schema import Config
from rlmono.models.registry import shape_from_hf
from rlmono.world.messages import TrainBatch, TrainSample, TrainStep

VOCABULARY = 97         # odd, so that two tensor-parallel ranks pad it
Gradients = dict[str, torch.Tensor]


# ---------------------------------------------------------------- models

def make_models(folder: Path) -> None:
    """folder/{tied, untied, other}: three-layer models with random weights, norms too; `other` is for references. On rank 0 alone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    for name, tied, seed in (("tied", True, 0), ("untied", False, 1), ("other", False, 2)):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            intermediate_size=128, rms_norm_eps=1e-6, tie_word_embeddings=tied, initializer_range=0.1, max_position_embeddings=4096,
            eos_token_id=2, bos_token_id=None, pad_token_id=0)).float()
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name:
                torch.nn.init.normal_(p, 1.0, 0.2)
        if name == "other":
            near(model, folder / "untied")
        model.save_pretrained(folder / name)


@torch.no_grad()
def near(model: Any, folder: Path) -> None:
    """Move the model nearly all the way to another: a reference is where the policy comes from."""
    for p, q in zip(model.parameters(), load_transformers(folder).parameters(), strict=True):
        p.lerp_(q, 0.9)


def load_transformers(folder: Path) -> Any:
    from transformers import Qwen3ForCausalLM
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def build_trainer(folder: Path, total_steps: int = 10, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Trainer on the model in `folder`, in place of the one before. Its steps change nothing unless `lr` is given."""
    from megatron.core import parallel_state

    from rlmono.trainer.trainer import Trainer
    gc.collect()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    trainer = Trainer(make_config(folder, **options), dtype, total_steps)
    trainer.load_hf(folder)
    if trainer.needs_reference():
        trainer.load_hf(folder.parent / "other", trainer.add_reference())
    return trainer


def leave_layout() -> None:
    """Let go of the layout of the trainer before, so that another can be built; its groups are kept for layouts that want the same ones.

    A process group's threads go on for as long as anything holds it, and Megatron's modules do: a few dozen layouts would have thousands of them.
    """
    from megatron.core import parallel_state
    gc.collect()
    if not hasattr(parallel_state.create_group, "kept"):
        parallel_state.create_group = _keeping(parallel_state.create_group)
    if parallel_state.model_parallel_is_initialized():
        for name in [n for n in vars(parallel_state) if "_GROUP" in n and n.endswith("_GLOO")]:
            setattr(parallel_state, name, None)         # it would end these
        parallel_state.destroy_model_parallel()


def _keeping(create: Any) -> Any:
    """Megatron's create_group, which makes a group of the same ranks for the same purpose once."""
    kept: dict[Any, Any] = {}

    def create_group(ranks: Any = None, *args: Any, group_desc: Any = None, **options: Any) -> Any:
        key = (tuple(ranks), options.get("backend"), group_desc if len(ranks) > 1 else None)
        if key not in kept:
            kept[key] = create(ranks, *args, group_desc=group_desc, **options)
        return kept[key]
    create_group.kept = kept        # type: ignore[attr-defined]
    return create_group


def make_config(folder: Path, **options: Any) -> Config:
    model = shape_from_hf(json.loads((folder / "config.json").read_text()))
    return Config(hf_checkpoint=str(folder), model=model, colocate=True, **({"lr": 0.0, "clip_grad": 0.0} | options))


# ---------------------------------------------------------------- samples

def make_samples(seed: int = 0) -> list[TrainSample]:
    """Eight samples of three uneven groups; responses from one token to all but one, masks with holes, one masked out."""
    draw = random.Random(seed)
    # group, reward, length, of which response
    rows = ((0, 1.0, 17, 8), (0, 0.5, 5, 1), (0, 2.0, 64, 63), (1, -0.5, 33, 10), (1, 1.0, 2, 1), (2, 0.5, 40, 20), (2, 2.0, 9, 4), (2, 1.0, 21, 1))
    out = []
    for i, (group, reward, length, response) in enumerate(rows):
        mask = [int(draw.random() < 0.8) for _ in range(response)]
        if i in (1, 2):
            mask = [i - 1] * response           # sample 1 trains nothing, sample 2 all
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        out.append(sample(i, group, reward, tokens, response, mask, [0.0] * response))
    return out


def sample(index: int, group: int, reward: float, tokens: list[int], response: int, mask: list[int], log_probs: list[float]) -> TrainSample:
    return TrainSample(index, group, reward, np.asarray(tokens, np.int32).tobytes(), response, np.asarray(mask, np.uint8).tobytes(),
                       np.asarray(log_probs, np.float32).tobytes())


def unmasked(s: TrainSample) -> TrainSample:
    """With every token of the response trained on."""
    return msgspec.structs.replace(s, loss_mask=b"\1" * s.response_length)


def rewarded(s: TrainSample, reward: float) -> TrainSample:
    return msgspec.structs.replace(s, reward=reward)


def tokens_of(s: TrainSample) -> list[int]:
    return np.frombuffer(s.tokens, np.int32).tolist()


def mask_of(s: TrainSample) -> list[int]:
    return np.frombuffer(s.loss_mask, np.uint8).tolist()


def rollout_log_probs_of(s: TrainSample) -> list[float]:
    return np.frombuffer(s.rollout_log_probs, np.float32).tolist()


def with_log_probs(samples: list[TrainSample], log_probs: list[torch.Tensor], noise: float = 0.0, seed: int = 5) -> list[TrainSample]:
    """The samples as an engine with these logprobs would have sent them, off by `noise`, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(seed)
    noisy = [(x + noise * torch.randn(len(x), generator=generator)).clamp(max=0) for x in log_probs]
    return [msgspec.structs.replace(s, rollout_log_probs=x.numpy().tobytes()) for s, x in zip(samples, noisy, strict=True)]


def response_log_probs(model: Any, s: TrainSample, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers: (logprob [r], entropy [r]) of the response tokens of one sample, with gradients."""
    ids = torch.tensor(tokens_of(s))
    first = len(ids) - s.response_length
    log_p = (model(ids[None]).logits[0] / temperature).log_softmax(-1)[first - 1:-1]
    return log_p.gather(1, ids[first:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def transformers_log_probs(folder: Path, samples: list[TrainSample], temperature: float = 1.0) -> list[torch.Tensor]:
    model = load_transformers(folder)
    return [response_log_probs(model, s, temperature)[0] for s in samples]


def sft_loss(model: Any, samples: list[TrainSample]) -> torch.Tensor:
    """The mean over samples of the mean negative logprob of the tokens that the mask lets through."""
    total = torch.zeros(())
    for s in samples:
        mask = torch.tensor(mask_of(s))
        total = total - (response_log_probs(model, s)[0] * mask).sum() / max(1, int(mask.sum())) / len(samples)
    return total


# ---------------------------------------------------------------- batches

def one_each(samples: list[TrainSample]) -> list[list[TrainSample]]:
    return [[s] for s in samples]


def packings(samples: list[TrainSample], number: int, ranks: int) -> Iterator[list[list[list[TrainSample]]]]:
    """Random packings, each [rank] -> packs: whole samples in any order, equally many packs a rank."""
    for seed in range(number):
        draw = random.Random(seed)
        order = draw.sample(samples, len(samples))
        packs = draw.randint(1, len(samples) // ranks) * ranks
        cuts = sorted(draw.sample(range(1, len(samples)), packs - 1))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
        yield [parts[r::ranks] for r in range(ranks)]


def step(packs: list[list[TrainSample]], samples: list[TrainSample]) -> TrainStep:
    """A step over `samples`, of which `packs` is this rank's share."""
    return TrainStep(packs, len(samples), sum(sum(mask_of(s)) for s in samples))


def batch(samples: list[TrainSample], *steps: TrainStep, rollout_id: int = 0) -> TrainBatch:
    return TrainBatch(rollout_id, list(steps), [(s.group_index, s.index, s.reward) for s in samples])


def run_packs(trainer: Any, samples: list[TrainSample], packs: list[list[TrainSample]]) -> tuple[dict[str, float], Gradients]:
    """One rollout of one step: (metrics, gradients by HF name)."""
    metrics = trainer.train(batch(samples, step(packs, samples)))
    return metrics, gradients(trainer)


def share(trainer: Any, packs: list[list[TrainSample]]) -> list[list[TrainSample]]:
    """This data-parallel rank's part."""
    rank, size = trainer.data_parallel
    return packs[rank::size]


# ---------------------------------------------------------------- gradients

@torch.no_grad()
def gradients(trainer: Any) -> Gradients:
    """The step's gradients as full tensors by HF name: gathered over data- and tensor-parallel ranks. Collective."""
    for chunk in trainer.ddp:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:       # each rank has reduced its own part
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    return exported(trainer, {p: p.main_grad for chunk in trainer.chunks for p in chunk.parameters()})


@torch.no_grad()
def exported(trainer: Any, values: dict[torch.nn.Parameter, torch.Tensor] | None = None) -> Gradients:
    """What the trainer exports, by HF name; with `values` in place of its parameters' own. Collective."""
    kept = {p: p.data for p in values or ()}
    try:
        for p, value in (values or {}).items():
            p.data = value
        return {name: x.clone() for bucket in trainer.export() for name, x in bucket}
    finally:
        for p, data in kept.items():
            p.data = data


def worst(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """(‖Δ‖ / ‖g‖, name) of the tensor that differs most."""
    assert found.keys() == expected.keys(), f"other tensors: {sorted(found.keys() ^ expected.keys())}"
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in expected.values()), "an expected gradient is zero or not finite"
    return max((float((found[k].double() - g.double()).norm() / g.double().norm()), k) for k, g in expected.items())
