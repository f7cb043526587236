"""`convert fp8-to-bf16` and `convert bf16-to-fp8`: an HF folder into another, a file of weights at a time."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from safetensors.torch import save_file

from rlmono.checkpoint.folder import appearing, check_output, require_space
from rlmono.config.hf import read_hf_config
from rlmono.observe.bar import Bar
from rlmono.weights.fp8 import FP8, SCALE_SUFFIXES, block_of, is_quantised, quantise, quantization_config
from rlmono.weights.hf import Index, WeightsError, copy_companions, edit_config, headers, index_of, read, read_dequantised, write_index

Named = Iterable[tuple[str, torch.Tensor]]
Change = Callable[[str], Named]
"""From the name of a tensor to what is written for it."""


def run(args: argparse.Namespace) -> None:
    """One of the two tools. Raises ConfigError, FolderError, WeightsError, OSError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))        # so that nothing is left behind
    if args.tool == "fp8-to-bf16":
        to_bf16(args.input, args.output, args.max_workers, args.overwrite)
    else:
        to_fp8(args.model_dir, args.save_dir, args.strategy, args.block_size, args.modules_to_not_convert, args.max_workers, args.overwrite)


def to_bf16(source: Path, output: Path, workers: int = 1, overwrite: bool = False) -> None:
    """Every fp8 tensor times its scales, in bfloat16; all others as they are. config.json loses `quantization_config`."""
    config = read_hf_config(str(source))
    check_output(output, [source], overwrite)
    index, block = index_of(source), block_of(config.get("quantization_config"))
    scales = {name + suffix for name, (dtype, _) in headers(index).items() if dtype == "F8_E4M3" for suffix in SCALE_SUFFIXES}
    if not scales:
        raise WeightsError(f"{source}: no tensor here is fp8 (e4m3)")
    stray = sorted(name for name in index.keys() - scales if name.endswith(tuple(f".weight{suffix}" for suffix in SCALE_SUFFIXES)))
    if stray:
        raise WeightsError(f"{index[stray[0]]}: tensor {stray[0]!r} is a scale, but there is no fp8 tensor for it")

    def change(name: str) -> Named:
        if name not in scales:
            yield name, read_dequantised(index, source, name, block)

    def edit(config: dict[str, Any]) -> None:
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    _convert(source, output, index, change, edit, workers, "fp8 -> bf16", growth=2.0)


def to_fp8(source: Path, output: Path, strategy: str, block: Sequence[int], left_out: Sequence[str] = (), workers: int = 1,
           overwrite: bool = False) -> None:
    """Projections in e4m3 with scales; all else as it is. config.json gets a `quantization_config` that names what was left out."""
    config = read_hf_config(str(source))
    if config.get("quantization_config"):
        raise WeightsError(f"{source}: quantised already (quantization_config in config.json); make a bf16 folder of it first: "
                           "python -m rlmono convert fp8-to-bf16")
    check_output(output, [source], overwrite)
    index = index_of(source)
    chosen = {name for name in index if is_quantised(name, left_out)}
    if not chosen:
        raise WeightsError(f"{source}: no tensor here is one that is quantised (…q_proj.weight, …down_proj.weight and the like)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def change(name: str) -> Named:
        tensor = read(index, source, name)
        if name not in chosen:
            yield name, tensor
            return
        if tensor.dtype == FP8 or tensor.ndim != 2:
            raise WeightsError(f"{index[name]}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, not a matrix of floating point")
        q, scale = quantise(tensor.to(device), strategy, block)
        yield name, q.cpu()
        yield name + SCALE_SUFFIXES[strategy != "block"], scale.cpu()
    matrices = {name for name, (_, shape) in headers(index).items() if len(shape) == 2 and name.endswith(".weight")}
    kept = sorted({name.removesuffix(".weight") for name in matrices - chosen} | set(left_out))
    _convert(source, output, index, change, lambda c: c.update(quantization_config=quantization_config(strategy, block, kept)), workers,
             f"bf16 -> fp8 ({strategy})", growth=1.0)


def _convert(source: Path, output: Path, index: Index, change: Change, edit: Callable[[dict[str, Any]], None], workers: int, title: str,
             growth: float) -> None:
    """Write `change` of every tensor into files of the same names, `workers` at a time."""
    files: dict[Path, list[str]] = {}
    for name, file in index.items():
        files.setdefault(file, []).append(name)
    size = sum(f.stat().st_size for f in files)
    require_space(output, int(size * growth))
    stop = threading.Event()

    def one(partial: Path, file: Path, bar: Bar) -> dict[str, int]:
        """Sizes of what was written, by name."""
        tensors: dict[str, torch.Tensor] = {}
        each, rest = divmod(file.stat().st_size, len(files[file]))
        for name in files[file]:
            if stop.is_set():
                return {}
            tensors.update((new, tensor.contiguous()) for new, tensor in change(name))
            bar.advance(each)
        bar.advance(rest)
        save_file(tensors, partial / file.name, metadata={"format": "pt"})
        return {name: t.nbytes for name, t in tensors.items()}

    with appearing(output) as partial, Bar(title, size) as bar, ThreadPoolExecutor(workers) as pool:
        copy_companions(source, partial)
        jobs = {file: pool.submit(one, partial, file, bar) for file in files}
        try:
            sizes = {file.name: job.result() for file, job in jobs.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        if len(files) > 1:
            write_index(partial, {name: file for file, written in sizes.items() for name in written}, sum(sum(s.values()) for s in sizes.values()))
        edit_config(partial, edit)
