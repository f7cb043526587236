"""Checkpoints of every layout, loaded on every other: `checkpoints.py FOLDER STORE` on 1 rank, on 2, on 4, and on 1 again.

FOLDER has the models (make_families.py). Each run saves what its ranks can be and STORE lacks, then loads all that is there (on 4
only what 1 and 4 ranks have saved).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import layouts
import moves
import torch
import torch.distributed as dist
from layouts import layout

STORE = Path(sys.argv[2])
DENSE = {1: {"1": layout()}, 2: {"dp2": layout(), "tp2+sp": layout(tp=2), "pp2": layout(pp=2), "pp2·vpp2": layout(pp=2, vpp=2)},
         4: {"tp2·pp2": layout(tp=2, pp=2), "tp2·cp2": layout(tp=2, cp=2), "pp2·vpp2·dp2": layout(pp=2, vpp=2)}}
EXPERTS = {1: DENSE[1], 2: DENSE[2] | {"ep2": layout(ep=2), "tp2·ep2·etp1+sp": layout(tp=2, ep=2, etp=1)},
           4: {"pp2·ep2": layout(pp=2, ep=2), "tp2·ep2·etp1·dp2": layout(tp=2, ep=2, etp=1), "tp2·pp2·ep2·etp1": layout(tp=2, pp=2, ep=2, etp=1),
               "cp2·ep2": layout(cp=2, ep=2)}}


def case_dense() -> dict[str, Any]:
    return every_pair("qwen3", DENSE)


def case_dense_tied() -> dict[str, Any]:
    return every_pair("qwen3_tied", DENSE)


def case_experts() -> dict[str, Any]:
    return every_pair("qwen3_moe", EXPERTS)


def case_latent_attention() -> dict[str, Any]:
    return every_pair("deepseek_v3", EXPERTS)


def case_bf16_with_master_weights() -> dict[str, Any]:
    """And fp32 router biases."""
    few = {1: EXPERTS[1], 2: {k: EXPERTS[2][k] for k in ("tp2+sp", "pp2", "ep2")}, 4: {"pp2·ep2": EXPERTS[4]["pp2·ep2"]}}
    return every_pair("glm4_moe", few, torch.bfloat16)


def every_pair(name: str, where: dict[int, dict[str, dict[str, Any]]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The relative differences of the losses after each load."""
    here, out = where[dist.get_world_size()], {}
    folder = STORE / f"{name} {str(dtype).removeprefix('torch.')}"
    for title, options in here.items():
        if not layouts.everywhere((folder / title).exists())[0]:
            moves.save(name, options, folder / title, dtype)
    sources = layouts.everywhere(sorted(p.name for p in folder.iterdir()))[0]
    if dist.get_world_size() == 4:      # two ranks' are, bit by bit, what one rank's is: they have loaded and saved it
        sources = [s for s in sources if s in where[1] or s in here]
    for source in sources:
        for title, options in here.items():
            try:
                out[f"{source} -> {title}"] = moves.load(name, options, folder / source, dtype)
            except AssertionError as e:
                raise AssertionError(f"{name} {source} -> {title}: {e}") from None
    return out


if __name__ == "__main__":
    from cases import run_cases
    run_cases(globals(), 800)
