"""`convert hf-to-torch-dist` and `convert torch-dist-to-hf`: Megatron's model on every rank's CPU, its weights in, its weights out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rlmono.checkpoint.folder import FolderError, appearing, check_output, partial_of, require_space
from rlmono.checkpoint.store import CheckpointError, fail, find_checkpoint, seal, weights_only_state
from rlmono.config.hf import changed_values
from rlmono.config.option import ConfigError
from rlmono.config.schema import Config, Parallel
from rlmono.config.sources import resolve
from rlmono.config.validate import layout_only
from rlmono.convert.main import REFUSED, refuse
from rlmono.loop.start import die_with_parent
from rlmono.models.registry import family
from rlmono.observe.bar import Bar
from rlmono.weights.hf import WeightsError, headers, index_of, load_hf, save_hf
from rlmono.world.groups import init_pool
from rlmono.world.launch import Launch, WorldError, read_launch
from rlmono.world.store import join_attempt, open_store

KNOWN = (ConfigError, WorldError, FolderError, WeightsError, CheckpointError, OSError)
"""What a user can cause: told in a sentence."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""What weights may be stored as here, by safetensors' names."""
LAYOUT = {f.name for f in dataclasses.fields(Parallel)} | {"hf_checkpoint", "start_timeout_s", "phase_timeout_s"}


def run(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """One of the two tools, on this rank; ends the process where it has met others. The exit status."""
    try:
        launch = _find_launch()
        job = make_job(args, flags, launch.world_size)
    except KNOWN as e:
        return refuse(str(e))
    if launch.agent:
        die_with_parent()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rlmono").setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
    status = 1
    try:
        store = _join(launch, job.config)
        status = _work(job, launch.rank, store)
    except (TimeoutError, dist.DistError) as e:
        print(f"rlmono: rank {launch.rank}: {e}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)                # gloo can hang in its destructors


def _work(job: Job, rank: int, store: dist.Store) -> int:
    try:
        job.run(rank)
        return 0
    except KNOWN as e:
        if store.add("failed", 1) == 1:         # others may have found the same
            print(f"rlmono: rank {rank}: {e}", file=sys.stderr)
        return REFUSED


def _find_launch() -> Launch:
    """This process's place; alone where it was started by itself."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return read_launch(os.environ)
    return Launch(0, 1, 0, 1, "", 0, False)


def _join(launch: Launch, config: Config) -> dist.Store:
    """Meet the others in Megatron's default group; the store of this attempt."""
    from rlmono.trainer import compat
    warnings.filterwarnings("ignore", module=r"megatron\.")         # what it does without Transformer Engine is no matter here
    warnings.filterwarnings("ignore", "Please use DTensor")         # torch to Megatron
    compat.prepare()                    # before any process group
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world_size))
    store: dist.Store = dist.HashStore()
    if launch.world_size > 1:
        store = join_attempt(open_store(launch, config.start_timeout_s), launch.rank, launch.world_size, config.start_timeout_s)[1]
    init_pool(store, range(launch.world_size), launch.rank, "cpu", config.phase_timeout_s)
    return store


# ---------------------------------------------------------------- layout

def _resolve(args: argparse.Namespace, flags: Sequence[str], ranks: int) -> Config:
    """The model's shape and the layout, from the HF folder and the flags that say something about them. Raises ConfigError."""
    config = resolve([*flags, "--hf-checkpoint", str(args.hf_checkpoint)], {}, layout_only)
    foreign = [source for name, source in config.origin.items()
               if source.startswith("flag") and (name.startswith("sglang.") or ("." not in name and name not in LAYOUT))]
    if foreign:
        raise ConfigError([f"{source} says nothing about the model or its layout, so it has no place in convert: leave it out" for source in foreign])
    if not any(config.origin[f.name] != "default" for f in dataclasses.fields(Parallel)):
        config = dataclasses.replace(config, **deal_layers(config.model["num_layers"], ranks))
    if config.tensor_model_parallel_size == 1:
        config = dataclasses.replace(config, sequence_parallel=False)
    _refuse_layout(config, ranks)
    # Nothing is trained, and every weight is loaded.
    return dataclasses.replace(config, megatron={**config.megatron, "perform_initialization": False})


def deal_layers(layers: int, ranks: int) -> dict[str, Any]:
    """Pipeline options that deal layers over as many of the ranks as divide their number; the first and the last stage may have less."""
    for stages in (n for n in range(ranks, 1, -1) if ranks % n == 0):
        each = -(-layers // stages)
        rest = layers - (stages - 2) * each
        if rest >= 2:
            return {"pipeline_model_parallel_size": stages, "decoder_first_pipeline_num_layers": -(-rest // 2),
                    "decoder_last_pipeline_num_layers": rest // 2}
    return {}


def _refuse_layout(config: Config, ranks: int) -> None:
    c = config
    sizes = {"tensor x pipeline x context": c.tensor_model_parallel_size * c.pipeline_model_parallel_size * c.context_parallel_size}
    experts = c.model.get("num_moe_experts")
    if experts:
        sizes["expert tensor x expert x pipeline"] = ((c.expert_tensor_parallel_size or c.tensor_model_parallel_size) * c.expert_model_parallel_size
                                                      * c.pipeline_model_parallel_size)
    problems = [f"{ranks} rank(s) are no multiple of {name} parallel = {size}: start another number, or give another layout"
                for name, size in sizes.items() if ranks % size]
    if experts and experts % c.expert_model_parallel_size:
        problems.append(f"expert_model_parallel_size {c.expert_model_parallel_size} does not divide the model's {experts} experts")
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------- the tools

def make_job(args: argparse.Namespace, flags: Sequence[str], ranks: int) -> Job:
    """What `args` and the flags beside them ask for, on so many ranks. Raises one of KNOWN."""
    config = _resolve(args, flags, ranks)
    return ToTorchDist(args, config) if args.tool == "hf-to-torch-dist" else ToHf(args, config)


class Job:
    """What both have: the model's part on this rank. Made, and its arguments checked, before ranks meet."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.config, self.source, self.output = config, args.hf_checkpoint, args.save
        self.dtype: Optional[torch.dtype] = None if args.dtype == "auto" else getattr(torch, args.dtype)
        self.tensors = family(config.model["architecture"]).tensors(config.model)

    def run(self, rank: int) -> None:
        """Collective over all ranks. Raises one of KNOWN."""
        raise NotImplementedError

    def build(self, dtype: torch.dtype) -> list[Any]:
        """The bare model, not initialised."""
        from rlmono.trainer import model
        model.init_parallel(self.config)
        return model.build_chunks(self.config, model.transformer_config(self.config, dtype))


class ToTorchDist(Job):
    """HF -> torch_dist."""

    def __init__(self, args: argparse.Namespace, config: Config):
        super().__init__(args, config)
        if config.model.get("quantization_config"):
            raise WeightsError(f"{self.source}: quantised (quantization_config in config.json); make a bf16 folder of it first: "
                               f"python -m rlmono convert fp8-to-bf16 --input {self.source} --output …")
        check_output(self.output, [self.source], args.overwrite)
        about = headers(index_of(self.source))
        mine = [about[name] for t in self.tensors for name in t.hf_names if name in about]
        self.numbers = sum(math.prod(shape) for _, shape in mine)
        kinds = {kind for kind, shape in mine if len(shape) > 1}
        if self.dtype is None and not kinds <= DTYPES.keys():
            raise ConfigError([f"{self.source} holds {', '.join(sorted(kinds))} weights: say --dtype float32 (nothing is lost) or --dtype bfloat16"])
        self.dtype = self.dtype or (torch.float32 if "F32" in kinds else torch.bfloat16)

    def run(self, rank: int) -> None:
        from rlmono.checkpoint import torch_dist
        from rlmono.trainer.layout import Layout, held_tensors
        assert self.dtype is not None
        total = self.numbers * self.dtype.itemsize
        if rank == 0:
            require_space(self.output, total)
        chunks = self.build(self.dtype)
        held = held_tensors(chunks)
        with Bar(f"reading {self.source} (rank 0's part)", sum(t.nbytes for t in held.values()), rank == 0) as bar:
            load_hf(self.source, held, self.tensors, Layout.current(), self.config.model["vocab_size"], bar.advance)
        with appearing(self.output) if rank == 0 else contextlib.nullcontext(partial_of(self.output.resolve())) as partial:
            dist.barrier()
            if not partial.is_dir():
                raise FolderError(f"{partial}: not seen on this rank's node; --save must be on a file system that all nodes share")
            with Bar(f"writing {self.output}", total, rank == 0) as bar, bar.following(partial):
                try:
                    torch_dist.save_weights(chunks, partial)
                except (OSError, RuntimeError, CheckpointException) as e:
                    fail(partial, e)
                dist.barrier()
            if rank == 0:
                seal(partial, weights_only_state(self.config.model))
        dist.barrier()
        if rank == 0:
            print(f"{self.output}: {total / 2**30:.3g} GiB of {str(self.dtype).removeprefix('torch.')}, for --ref-load or --load")


class ToHf(Job):
    """torch_dist -> HF."""

    def __init__(self, args: argparse.Namespace, config: Config):
        super().__init__(args, config)
        self.load = args.load
        if not self.load.is_dir():
            raise CheckpointError(f"{self.load}: --load is not a folder")
        if (self.load / "config.json").exists():
            raise CheckpointError(f"{self.load}: --load is an HF folder already")
        check_output(self.output, [self.source, self.load], args.overwrite)

    def run(self, rank: int) -> None:
        from rlmono.checkpoint import torch_dist
        from rlmono.trainer.layout import Layout, held_tensors
        from rlmono.weights.export import export
        folder = self.agree_on_folder(rank)
        stored = torch_dist.weights_dtype(folder)
        dtype = self.dtype or stored
        chunks = self.build(stored)
        torch_dist.load_weights(chunks, folder)
        total = torch_dist.weights_count(folder) * dtype.itemsize
        buckets = export(held_tensors(chunks), self.tensors, Layout.current(), self.config.model["vocab_size"])
        if rank == 0:
            require_space(self.output, total)
            with Bar(f"writing {self.output}", total, True) as bar:
                save_hf(self.output, _told(buckets, bar, dtype), self.source, dtype, changed_values(str(self.source), self.config.model))
            print(f"{self.output}: {total / 2**30:.3g} GiB of {str(dtype).removeprefix('torch.')}")
        else:
            for _ in buckets:           # the export is collective
                pass
        dist.barrier()

    def agree_on_folder(self, rank: int) -> Path:
        """The checkpoint to read: rank 0 looks, and checks every byte of it."""
        answer = [""]
        if rank == 0:
            checkpoint = find_checkpoint(self.load, self.config.model)
            if checkpoint is None:
                raise CheckpointError(f"{self.load}: no checkpoint here")
            answer = [str(checkpoint.folder)]
        dist.broadcast_object_list(answer, 0)
        return Path(answer[0])


def _told(buckets: Any, bar: Bar, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        for name, tensor in bucket:
            yield name, tensor
            bar.advance(tensor.numel() * dtype.itemsize)
