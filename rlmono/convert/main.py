"""Tools that turn a checkpoint into one of another format.

    torchrun --nproc-per-node 8 -m rlmono convert hf-to-torch-dist --hf-checkpoint HF --save DIST
        HF safetensors -> torch_dist, for --ref-load or --load. Any number of ranks and nodes (a shared file system; no host
        ranks, no GPUs), or one process without torchrun. Layers are dealt over the ranks, or as layout flags say
        (--tensor-model-parallel-size, --expert-model-parallel-size, …); training may take another layout.
    torchrun --nproc-per-node 8 -m rlmono convert torch-dist-to-hf --load DIST --hf-checkpoint HF --save NEW
        A run's checkpoint (or its newest) -> HF safetensors, with config and tokenizer of HF. As above.
    python -m rlmono convert fp8-to-bf16 --input HF --output NEW
        8-bit floats with scales (DeepSeek-R1 as it is published) -> bfloat16, file by file.
    python -m rlmono convert bf16-to-fp8 --model-dir HF --save-dir NEW --strategy block --block-size 128 128 --max-workers 4
        The other way: what rollouts in fp8 load. `channel` and `tensor` write compressed-tensors' format.

The new folder appears when it is whole. What is there already is kept, unless --overwrite is given.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Sequence

from rlmono.config.option import ConfigError
from rlmono.world.launch import WorldError

REFUSED = 2
"""Exit status when nothing was written, because the input, the options or the disk don't allow it."""


def main(argv: Sequence[str]) -> int:
    """The verb `convert`; the exit status."""
    args, layout = parse(argv)
    if args.tool in ("hf-to-torch-dist", "torch-dist-to-hf"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""         # any number of ranks, wherever they are: before torch looks
        from rlmono.convert import megatron
        return megatron.run(args, layout)
    from rlmono.checkpoint.folder import FolderError
    from rlmono.convert import fp8
    from rlmono.weights.hf import WeightsError
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise WorldError(f"{args.tool} runs in one process, with --max-workers threads: start it without torchrun")
        fp8.run(args)
    except (ConfigError, WorldError, FolderError, WeightsError, OSError) as e:
        return refuse(str(e))
    except KeyboardInterrupt:
        print("rlmono: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def refuse(text: str) -> int:
    """All ranks have found the same fault; rank 0 says it. Returns the exit status."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"rlmono: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)                   # torchrun ends the others with the first that exits: let rank 0 speak
    return REFUSED


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the tool's options, layout flags and what else is left)."""
    parser = argparse.ArgumentParser("rlmono convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    to_dist = tools.add_parser("hf-to-torch-dist", allow_abbrev=False, help="HF safetensors -> torch_dist")
    to_dist.add_argument("--hf-checkpoint", type=Path, required=True, help="HF folder with weights")
    to_hf = tools.add_parser("torch-dist-to-hf", allow_abbrev=False, help="torch_dist -> HF safetensors")
    to_hf.add_argument("--load", type=Path, required=True, help="a checkpoint, or a folder of checkpoints: the newest is taken")
    to_hf.add_argument("--hf-checkpoint", type=Path, required=True, help="HF folder whose config and tokenizer are taken")
    for tool in (to_dist, to_hf):
        tool.add_argument("--save", type=Path, required=True, help="the new folder")
        tool.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as the input is")
    to_bf16 = tools.add_parser("fp8-to-bf16", allow_abbrev=False, help="8-bit floats with scales -> bfloat16")
    to_bf16.add_argument("--input", type=Path, required=True, help="HF folder with fp8 weights")
    to_bf16.add_argument("--output", type=Path, required=True, help="the new folder")
    to_fp8 = tools.add_parser("bf16-to-fp8", allow_abbrev=False, help="bfloat16 -> 8-bit floats with scales")
    to_fp8.add_argument("--model-dir", type=Path, required=True, help="HF folder with weights")
    to_fp8.add_argument("--save-dir", type=Path, required=True, help="the new folder")
    to_fp8.add_argument("--strategy", choices=("block", "channel", "tensor"), default="block", help="what shares a scale: a block, a row, or all")
    to_fp8.add_argument("--block-size", type=_positive, nargs=2, default=[128, 128], metavar=("ROWS", "COLUMNS"))
    to_fp8.add_argument("--modules-to-not-convert", nargs="+", default=[], metavar="NAME", help="modules, or words of their names, to leave out")
    for tool in (to_bf16, to_fp8):
        tool.add_argument("--max-workers", type=_positive, default=1, help="files at a time; each takes the memory of its file, before and after")
    for tool in (to_dist, to_hf, to_bf16, to_fp8):
        tool.add_argument("--overwrite", action="store_true", help="replace the new folder, if it is there and is a model or a checkpoint")
    args, rest = parser.parse_known_args(argv)
    if rest and args.tool in ("fp8-to-bf16", "bf16-to-fp8"):
        parser.error(f"{args.tool}: not an option: {rest[0]}")
    return args, rest


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return number
