"""Every algorithm on two ranks, against one rank. Argument: the folder that algorithms_one.py filled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import algorithms
import tiny
import torch
from algorithms import VARIANTS, CriticView
from cases import run_cases

FOLDER = Path(sys.argv[1])
FEW = ("gspo", "mis_sequence", "distillation_off_policy", "reinforce_plus_plus", "ppo", "ppo_whitened")
"""Variants that look at more than one token: what a layout could break."""


def like_one_rank(variants: Any, **layout: Any) -> dict[str, Any]:
    saved = torch.load(FOLDER / "algorithms.pt", weights_only=False)
    batch, loss, worst = saved["samples"], 0.0, (0.0, "")
    for name in variants:
        expected_loss, gradients, of_critic = saved["single"][name]
        trainer = algorithms.build(FOLDER, VARIANTS[name] | layout)
        packs = tiny.share(trainer, [batch[:3], batch[3:4], batch[4:7], batch[7:]])
        metrics, found = tiny.run_packs(trainer, batch, packs)
        if trainer.reports:
            # Whitened advantages are of order 1 and sum to 0, so the loss may be nearly nothing.
            loss = max(loss, abs(metrics["train/loss"] - expected_loss) / max(0.5, abs(expected_loss)))
        worst = max(worst, tiny.worst(found, gradients))
        if trainer.critic is not None:
            of_mine = tiny.gradients(CriticView(trainer))
            worst = max(worst, tiny.worst(of_mine, {n: g for n, g in of_critic.items() if n != algorithms.HEAD or n in of_mine}))
        assert loss <= 1e-6 and worst[0] <= 1e-5, (name, loss, worst)
    return {"loss": loss, "gradient": worst[0], "tensor": worst[1]}


def case_dp2() -> dict[str, Any]:
    return like_one_rank(VARIANTS)


def case_tp2_with_sequence_parallel() -> dict[str, Any]:
    return like_one_rank(FEW, tensor_model_parallel_size=2, sequence_parallel=True)


def case_tp2() -> dict[str, Any]:
    return like_one_rank(FEW[-2:], tensor_model_parallel_size=2)


def case_cp2() -> dict[str, Any]:
    return like_one_rank(FEW, context_parallel_size=2)


def case_pp2() -> dict[str, Any]:
    return like_one_rank(FEW, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2)


if __name__ == "__main__":
    run_cases(globals())
