"""HF safetensors straight into Megatron's parameters, and out again."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlmono.checkpoint.folder import appearing
from rlmono.models.mapping import Tensor
from rlmono.weights import fp8
from rlmono.weights.export import BUCKET_BYTES, Groups, Named

log = logging.getLogger(__name__)
SHARD_BYTES = 5 * 2**30
PART = 2**24
"""Numbers that are looked at together."""
# The files beside the weights that make a folder a model: configs, tokenizer, chat template.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
INDEX = "model.safetensors.index.json"
TIED = ("embedding.word_embeddings.weight", "output_layer.weight", "lm_head.weight")
FLOAT32 = ("e_score_correction_bias",)
"""Tensors that are stored in float32 whatever the model's dtype: they only choose experts, by small differences."""
Index = Mapping[str, Path]


class WeightsError(ValueError):
    """A model folder whose weights are not what its config says; the message names file and tensor."""


# ---------------------------------------------------------------- reading

def index_of(folder: Path) -> dict[str, Path]:
    """File of every tensor in an HF folder. Raises WeightsError where there is none, a file is torn, or one that the index lists is missing."""
    listed = _listed(folder)
    files = sorted({folder / f for f in listed.values()}) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no *.safetensors here: give a folder with weights")
    out: dict[str, Path] = {}
    for f in files:
        if not f.exists():
            raise WeightsError(f"{f}: missing, but {INDEX} lists it; the download is not complete")
        try:
            with safe_open(f, "pt") as opened:
                out.update((name, f) for name in opened.keys())
        except SafetensorError as e:
            raise WeightsError(f"{f}: not a whole safetensors file ({e}{_cut_off(f)}); copy it again") from None
    for name, file in listed.items():
        if name not in out:
            raise WeightsError(f"{folder / file}: tensor {name!r} is missing, but {INDEX} lists it")
    return out


def _cut_off(file: Path) -> str:
    """The first tensor that a file ends within or before, in words; empty where its head can't be read."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            head = json.loads(f.read(length))
        ends = {name: 8 + length + about["data_offsets"][1] for name, about in head.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return ""
    beyond = [(end, name) for name, end in ends.items() if end > size]
    return f": tensor {min(beyond)[1]!r} is cut off" if beyond else ""


def _listed(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{path}: damaged; copy it again") from None


def headers(index: Index) -> dict[str, tuple[str, list[int]]]:
    """(dtype by safetensors' name, shape) of every tensor, from the heads of the files."""
    out: dict[str, tuple[str, list[int]]] = {}
    for file in set(index.values()):
        with open(file, "rb") as f:
            head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        out.update((name, (about["dtype"], about["shape"])) for name, about in head.items() if index.get(name) == file)
    return out


def read(index: Index, folder: Path, name: str, shape: Optional[Sequence[int]] = None, part: tuple[slice, ...] = ()) -> torch.Tensor:
    """A tensor, or a part of it: only that is read. Raises WeightsError when it is missing, of another shape, or not finite."""
    if name not in index:
        raise WeightsError(f"{folder}: tensor {name!r} is missing; the weights are not those of config.json")
    with safe_open(index[name], "pt") as opened:
        stored = opened.get_slice(name)
        if shape is not None and tuple(stored.get_shape()) != tuple(shape):
            raise WeightsError(f"{index[name]}: tensor {name!r} is {tuple(stored.get_shape())}, but config.json makes it {tuple(shape)}")
        tensor: torch.Tensor = stored[part] if part else opened.get_tensor(name)
    if not is_finite(tensor):
        raise WeightsError(f"{index[name]}: tensor {name!r} holds values that are not finite")
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """No infinity and no NaN; e4m3 has only NaN, with all bits but the sign's set. A part at a time: torch's own needs as much memory again."""
    if tensor.dtype != fp8.FP8 and not tensor.is_floating_point():
        return True
    parts = tensor.reshape(-1).split(PART)
    if tensor.dtype == fp8.FP8:
        return not any(bool((part.view(torch.uint8) & 0x7F == 0x7F).any()) for part in parts)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def read_dequantised(index: Index, folder: Path, name: str, block: Sequence[int]) -> torch.Tensor:
    """A tensor that one can compute with: fp8 times its scales, in bfloat16. Raises WeightsError for scales that are missing or don't fit, too."""
    tensor = read(index, folder, name)
    if tensor.dtype != fp8.FP8:
        return tensor
    scale = next((name + s for s in fp8.SCALE_SUFFIXES if name + s in index), None)
    if scale is None:
        raise WeightsError(f"{index[name]}: tensor {name!r} is fp8, but there is no {name + fp8.SCALE_SUFFIXES[0]!r}")
    try:
        return fp8.dequantise(tensor, read(index, folder, scale), block)
    except ValueError as e:
        raise WeightsError(f"{index[scale]}: tensor {scale!r}: {e}") from None


def prediction_tensors(names: Iterable[str]) -> list[str]:
    """Tensors of layers for next-token prediction (DeepSeek-V3 and GLM-4.5 have one after the last), found by the projection that each of them has.

    Megatron's model has no place for them; exports carry them through.
    """
    names = list(names)
    prefixes = tuple(name.removesuffix("eh_proj.weight") for name in names if name.endswith(".eh_proj.weight"))
    return sorted(name for name in names if prefixes and name.startswith(prefixes))


@torch.no_grad()
def load_hf(folder: Path, held: Mapping[str, torch.Tensor], tensors: Sequence[Tensor], groups: Groups, vocab_size: int,
            done: Callable[[int], None] = lambda nbytes: None) -> None:
    """Fill `held` (what this rank has, by Megatron's names in the whole model) from an HF folder, one tensor at a time, reading this rank's part.

    `done` is told the bytes of every tensor that is filled. fp8 tensors are multiplied by their scales. Raises WeightsError for a tensor that
    is missing, of the wrong shape, not finite, of no use or in fp8 without scales, and for a parameter that nothing fills.
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
        shard = _read_shard(tensor, index, folder, wanted[0], groups.expert_tp if tensor.expert else groups.tp, vocab_size)
        for parameter in wanted:
            assert tensor.vocabulary or shard.shape == parameter.shape, f"{tensor.name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
            parameter[:len(shard)].copy_(shard)
            parameter[len(shard):].zero_()          # Megatron's padding of the vocabulary
            done(parameter.nbytes)
    if left:
        raise WeightsError(f"{folder}: nothing fills {', '.join(sorted(left)[:4])}")


def _read_shard(tensor: Tensor, index: Index, folder: Path, parameter: torch.Tensor, group: dist.ProcessGroup, vocab_size: int) -> torch.Tensor:
    parts = []
    for name, shape in zip(tensor.hf_names, _hf_shapes(tensor, parameter, group.size(), vocab_size), strict=True):
        parts.append(read(index, folder, name, shape, tensor.part(shape, dist.get_rank(group), group.size())))
        if parts[-1].dtype == fp8.FP8:
            parts[-1] = _dequantised_part(index, folder, name, tensor.part(shape, dist.get_rank(group), group.size()))
    return tensor.to_megatron(parts)


def _dequantised_part(index: Index, folder: Path, name: str, part: tuple[slice, ...]) -> torch.Tensor:
    """What an fp8 tensor and its scales stand for, of which this rank takes a part; blocks may lie across parts."""
    if not any(name + s in index for s in fp8.SCALE_SUFFIXES):
        raise WeightsError(f"{index[name]}: tensor {name!r} is fp8, without scales; make a bf16 folder first: "
                           f"python -m rlmono convert fp8-to-bf16 --input {folder} --output …")
    block = fp8.block_of(json.loads((folder / "config.json").read_text()).get("quantization_config"))
    return read_dequantised(index, folder, name, block)[part]


def _refuse_extra(index: Index, folder: Path, known: set[str]) -> None:
    """Tensors that the model has no place for: layers for next-token prediction and saved rotary frequencies are left out,
    a head beside tied embeddings must be a copy of them."""
    skipped = set(prediction_tensors(index)) - known
    if skipped:
        log.info("%s: %d tensors of layers for next-token prediction are skipped (%s, …)", folder, len(skipped), min(skipped))
    scales = {name + suffix for name in known for suffix in fp8.SCALE_SUFFIXES}
    extra = sorted(name for name in index.keys() - known - skipped - scales if not name.endswith(".inv_freq"))
    if extra == [TIED[2]] and (embedding := next((n for n in known if n.endswith("embed_tokens.weight")), None)) in index:
        if torch.equal(read(index, folder, TIED[2]), read(index, folder, str(embedding))):
            return
        raise WeightsError(f"{index[TIED[2]]}: {TIED[2]!r} is not {embedding!r}, but config.json has tie_word_embeddings")
    if extra:
        raise WeightsError(f"{index[extra[0]]}: {len(extra)} tensor(s) have no place in the model of config.json: {', '.join(extra[:4])}")


def _hf_shapes(tensor: Tensor, shard: torch.Tensor, size: int, vocab_size: int) -> list[torch.Size]:
    """The shapes that the HF tensors must have to make this rank's part."""
    full = tensor.join([torch.empty_like(shard, device="meta")] * (1 if tensor.replicated else size))
    return [part[:vocab_size].shape if tensor.vocabulary else part.shape for part in tensor.to_hf(full)]


class Folder:
    """An HF folder that gives its weights to an engine as a trainer does: `weights.update.Exporter`."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype, self.index = folder, dtype, index_of(folder)

    def export(self) -> Iterator[Named]:
        """Buckets of (HF name, full tensor), layer by layer: an engine takes some of a layer's tensors only together. Layers for next-token
        prediction and saved rotary frequencies are left out."""
        left_out = set(prediction_tensors(self.index))
        names = sorted((n for n in self.index if n not in left_out and not n.endswith(".inv_freq")), key=_layer)
        bucket: Named = []
        for _, layer in itertools.groupby(names, key=_layer):
            if sum(t.nbytes for _, t in bucket) >= BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket += [(name, self._as_trained(name, read(self.index, self.folder, name))) for name in layer]
        yield bucket

    def sources(self) -> None:
        """Files are read once."""

    def _as_trained(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.dtype == fp8.FP8 or not tensor.is_floating_point() or name.endswith((*FLOAT32, *fp8.SCALE_SUFFIXES))
        return tensor if kept else tensor.to(self.dtype)


def _layer(name: str) -> tuple[str, int]:
    """What comes before the layer's number, and the number; -1 where there is none."""
    found = re.match(r"(.*?\.)(\d+)\.", name)
    return (found[1], int(found[2])) if found else ("", -1)


# ---------------------------------------------------------------- writing

def save_hf(folder: Path, named: Iterable[tuple[str, torch.Tensor]], source: Path, dtype: torch.dtype,
            changed: Optional[Mapping[str, Any]] = None) -> None:
    """Write tensors as HF shards with an index, with `source`'s config (but for the values in `changed`) and tokenizer beside them, and its
    layers for next-token prediction as they are there; the folder appears whole or not at all."""
    with appearing(folder) as partial:
        copy_companions(source, partial)
        _write_shards(partial, _with_prediction(named, source), dtype)
        edit_config(partial, lambda config: _rewrite(config, dtype, changed or {}))


def copy_companions(source: Path, folder: Path) -> None:
    """Config, tokenizer and what else belongs to a model besides its weights."""
    for pattern in COMPANIONS:
        for f in source.glob(pattern):
            if not f.name.endswith(".index.json"):
                shutil.copy2(f, folder / f.name)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a folder with more than one file of weights."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _with_prediction(named: Iterable[tuple[str, torch.Tensor]], source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    written = set()
    for name, tensor in named:
        written.add(name)
        yield name, tensor
    index = index_of(source) if any(source.glob("*.safetensors")) else {}
    carried = [name for name in prediction_tensors(index) if name not in written and not name.endswith(fp8.SCALE_SUFFIXES)]
    if carried:
        log.info("%d tensors of layers for next-token prediction are carried through from %s (%s, …)", len(carried), source, carried[0])
        block = fp8.block_of(json.loads((source / "config.json").read_text()).get("quantization_config"))
        yield from ((name, read_dequantised(index, source, name, block)) for name in carried)


def _write_shards(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, total, weight_map = 0, 0, {}
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", torch.float32 if name.endswith(FLOAT32) else dtype).contiguous().clone()
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
        write_index(folder, {n: final[i] for n, i in weight_map.items()}, total)


def _flush(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    save_file(shards[-1], folder / f"shard-{len(shards) - 1}", metadata={"format": "pt"})
    shards[-1] = {}
    shards.append({})


def _rewrite(config: dict[str, Any], dtype: torch.dtype, changed: Mapping[str, Any]) -> None:
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    config.update(changed, dtype=str(dtype).removeprefix("torch."))
