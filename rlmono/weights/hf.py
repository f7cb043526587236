"""HF safetensors straight into Megatron's parameters, and out again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlmono.models.mapping import Tensor
from rlmono.weights.export import Groups

SHARD_BYTES = 5 * 2**30
# The files beside the weights that make a folder a model: configs, tokenizer, chat template.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
TIED = ("embedding.word_embeddings.weight", "output_layer.weight", "lm_head.weight")


class WeightsError(ValueError):
    """A model folder whose weights are not what its config says; the message names file and tensor."""


def index_of(folder: Path) -> dict[str, Path]:
    """File of every tensor in an HF folder. Raises WeightsError where there is none, or a file is torn."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no *.safetensors here; give --hf-checkpoint or --ref-load a folder with weights")
    out: dict[str, Path] = {}
    for f in files:
        try:
            with safe_open(f, "pt") as opened:
                out.update((name, f) for name in opened.keys())
        except SafetensorError as e:
            raise WeightsError(f"{f}: not a whole safetensors file ({e}); copy it again") from None
    return out


@torch.no_grad()
def load_hf(folder: Path, held: Mapping[str, torch.Tensor], tensors: Sequence[Tensor], groups: Groups, vocab_size: int) -> None:
    """Fill `held` (what this rank has, by Megatron's names in the whole model) from an HF folder, one tensor at a time.

    Raises WeightsError for a tensor that is missing, of the wrong shape, not finite or of no use, and for a parameter that nothing fills.
    """
    index, left = index_of(folder), dict(held)
    known = {name for t in tensors for name in t.hf_names}
    _refuse_extra(index, folder, known)
    for tensor in tensors:
        wanted = [left.pop(tensor.name)] if tensor.name in left else []
        if tensor.name == TIED[0] and TIED[1] in left and TIED[2] not in known:
            wanted.append(left.pop(TIED[1]))        # the last pipeline stage's copy of tied embeddings
        if not wanted:
            continue                    # another rank's
        group = groups.expert_tp if tensor.expert else groups.tp
        parts = [_read(index, folder, name) for name in tensor.hf_names]
        for name, part, shape in zip(tensor.hf_names, parts, _hf_shapes(tensor, wanted[0], group.size(), vocab_size), strict=True):
            if part.shape != shape:
                raise WeightsError(f"{index[name]}: tensor {name!r} is {tuple(part.shape)}, but config.json makes it {tuple(shape)}")
        shard = tensor.shard(tensor.to_megatron(parts), dist.get_rank(group), group.size())
        for parameter in wanted:
            assert shard.shape == parameter.shape, f"{tensor.name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
            parameter.copy_(shard)
    if left:
        raise WeightsError(f"{folder}: nothing fills {', '.join(sorted(left)[:4])}")


def _refuse_extra(index: Mapping[str, Path], folder: Path, known: set[str]) -> None:
    """Tensors that the model has no place for: layers for multi-token prediction and saved rotary frequencies are left out,
    a head beside tied embeddings must be a copy of them."""
    prediction = tuple(name.removesuffix("eh_proj.weight") for name in index if name.endswith(".eh_proj.weight"))
    extra = sorted(name for name in index.keys() - known if not name.endswith(".inv_freq") and not (prediction and name.startswith(prediction)))
    if extra == [TIED[2]] and (embedding := next((n for n in known if n.endswith("embed_tokens.weight")), None)) in index:
        if torch.equal(_read(index, folder, TIED[2]), _read(index, folder, str(embedding))):
            return
        raise WeightsError(f"{index[TIED[2]]}: {TIED[2]!r} is not {embedding!r}, but config.json has tie_word_embeddings")
    if extra:
        raise WeightsError(f"{folder}: {len(extra)} tensor(s) have no place in the model of config.json: {', '.join(extra[:4])}")


def _hf_shapes(tensor: Tensor, shard: torch.Tensor, size: int, vocab_size: int) -> list[torch.Size]:
    """The shapes that the HF tensors must have to make this rank's part."""
    full = tensor.join([torch.empty_like(shard, device="meta")] * (1 if tensor.replicated else size))
    return [part[:vocab_size].shape if tensor.vocabulary else part.shape for part in tensor.to_hf(full)]


def _read(index: Mapping[str, Path], folder: Path, name: str) -> torch.Tensor:
    if name not in index:
        raise WeightsError(f"{folder}: tensor {name!r} is missing; the weights are not those of config.json")
    with safe_open(index[name], "pt") as opened:
        tensor = opened.get_tensor(name)
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{index[name]}: tensor {name!r} holds values that are not finite")
    return tensor


def save_hf(folder: Path, named: Iterable[tuple[str, torch.Tensor]], source: Path, dtype: torch.dtype) -> None:
    """Write tensors as HF shards with an index, with `source`'s config and tokenizer beside them; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in COMPANIONS:
        for f in source.glob(pattern):
            if not f.name.endswith(".index.json"):
                shutil.copy2(f, partial / f.name)
    _write_shards(partial, named, dtype)
    _set_dtype(partial / "config.json", dtype)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _write_shards(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, total, weight_map = 0, 0, {}
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", dtype).contiguous().clone()
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            _flush(folder, shards)
            size = 0
        shards[-1][name] = tensor
        weight_map[name] = len(shards) - 1
        size, total = size + tensor.nbytes, total + tensor.nbytes
    _flush(folder, shards)
    count = len(shards) - 1
    final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)]
    for i, name in enumerate(final):
        os.replace(folder / f"shard-{i}", folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: final[i] for n, i in weight_map.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _flush(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    save_file(shards[-1], folder / f"shard-{len(shards) - 1}", metadata={"format": "pt"})
    shards[-1] = {}
    shards.append({})


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2))
