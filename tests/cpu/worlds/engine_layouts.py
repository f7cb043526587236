"""The engine's logprobs after an update from every layout: `engine_layouts.py FOLDER FAMILY [NAME=NUMBER …]`, on 1, 2 or 4 ranks.

FOLDER has the models (make_families.py); the names are values of the shape to change. Each layout sends its weights, trains a step and sends them
again; the engines sample after both. Against the trainer that is done here; against transformers by score.py, for which FOLDER/FAMILY/answers
gets a folder a layout with the weights and what was sampled with them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import layouts
import tiny
import torch
import torch.distributed as dist
from host import Host, request

FOLDER, FAMILY = Path(sys.argv[1]), sys.argv[2]
CHANGED = {k: float(v) for k, v in (word.split("=") for word in sys.argv[3:])}
LIMIT = 1e-5
PROMPTS = [[5 + i, 6, 7, 8, 9, 10 + 3 * i][:2 + i % 5] for i in range(8)]
LENGTH = 20


def case_every_layout() -> dict[str, float]:
    """The largest |Δlogprob| against the trainer, by layout."""
    from rlmono.engine.engine import Engine
    from rlmono.weights.update import Colocated
    world, out = dist.get_world_size(), {}
    titles = {1: {"1": layouts.layout()}} | (layouts.EXPERTS if "moe" in FAMILY else layouts.DENSE)
    engine, host = None, None
    for title, where in titles[world].items():
        trainer = layouts.build(FAMILY, where, changed=CHANGED, lr=0.03, deterministic=True)
        if engine is None:
            ranks = [[r] for r in range(world)]
            host = Host(ranks)
            engine = Engine(trainer.config, ranks, dist.get_rank(), "cpu", "float32", host.link)
        weights = Colocated(trainer, engine, check=True)
        off = []
        for version in (1, 2):
            weights.update(version=version)
            firsts = host.firsts
            asked = [request(i, p, LENGTH, seed=100 * version + i) for i, p in enumerate(PROMPTS)]
            got = host.generate(engine, {first: asked[i::len(firsts)] for i, first in enumerate(firsts)})
            answers = {int(rid, 16): (x.output_ids, x.log_probs) for rid, x in got.items()}
            batch = [tiny.sample(i, 0, 0.0, p + answers[i][0], LENGTH, [1] * LENGTH, []) for i, p in enumerate(PROMPTS)]
            off.append(difference(trainer, batch, answers))
            assert off[-1] <= LIMIT, f"{FAMILY} {title}: after update {version} a logprob is off by {off[-1]:.1e}"
            if version == 1:
                assert train(trainer, batch) > 0.1, "nothing was learnt between the updates"
        keep(trainer, FOLDER / FAMILY / "answers" / " ".join([f"{world} {title}", *sys.argv[3:]]), answers)
        out[title] = max(off)
    return out


def difference(trainer: Any, batch: list[Any], answers: dict[int, Any]) -> float:
    found = layouts.gathered_log_probs(trainer, layouts.share_of(trainer, batch))
    return max(float((found[i] - torch.tensor(log_probs)).abs().max()) for i, (_, log_probs) in answers.items())


def train(trainer: Any, batch: list[Any]) -> float:
    metrics = trainer.train(layouts.share_of(trainer, batch))
    return next(x for x in layouts.everywhere(metrics["train/grad_norm"] if trainer.reports else None) if x is not None)    # type: ignore[no-any-return]


def keep(trainer: Any, folder: Path, answers: dict[int, Any]) -> None:
    """The trainer's weights as an HF folder, and what the engines sampled with them."""
    from rlmono.config.hf import changed_values
    from rlmono.weights.hf import save_hf
    named = [(name, x.clone()) for bucket in trainer.export() for name, x in bucket]
    if dist.get_rank() == 0:
        save_hf(folder, named, FOLDER / FAMILY, torch.float32, changed_values(str(FOLDER / FAMILY), trainer.config.model))
        (folder / "answers.json").write_text(json.dumps([(p, *answers[i]) for i, p in enumerate(PROMPTS)]))
    dist.barrier()


if __name__ == "__main__":
    from cases import run_cases
    run_cases(globals(), 800)
