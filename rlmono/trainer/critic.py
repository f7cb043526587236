"""PPO's critic: the policy's architecture with one output, the value of what stands before a token; on the actor's ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from megatron.core import parallel_state

from rlmono.config.schema import Config
from rlmono.models.registry import family
from rlmono.trainer import model
from rlmono.trainer.context import gather_tokens
from rlmono.trainer.layout import Layout, held_tensors
from rlmono.trainer.learner import Learner, per_token
from rlmono.trainer.objective import Parts, value_objective
from rlmono.trainer.packs import Pack
from rlmono.weights.hf import load_hf

HEAD = "output_layer.weight"
"""The value head, in no HF checkpoint."""


class Critic(Learner):
    """Build it collectively, after the actor. Its learning rate is its own."""

    def __init__(self, config: Config, dtype: torch.dtype, total_steps: int):
        lr = config.lr if config.critic_lr is None else config.critic_lr
        own = dataclasses.replace(config, lr=lr, min_lr=min(config.min_lr, lr), lr_warmup_init=min(config.lr_warmup_init, lr),
                                  lr_warmup_iters=config.critic_lr_warmup_iters, lr_warmup_fraction=None)
        tf_config = model.transformer_config(own, dtype)
        super().__init__(own, dtype, total_steps, tf_config, model.build_chunks(own, tf_config, value_head=True))

    def load_hf(self, folder: Path) -> None:
        """The body's weights from an HF folder; the head stays as it was made."""
        held = {name: x for name, x in held_tensors(self.chunks).items() if name != HEAD}
        shape = self.config.model
        load_hf(folder, held, family(shape["architecture"]).tensors(shape), Layout.current(), shape["vocab_size"])
        self.weights_changed()

    def set_values(self, packs: list[Pack]) -> None:
        """`values` of every pack, before the critic learns from this rollout."""
        for p, values in zip(packs, per_token(self.ddp, packs, self._values), strict=True):
            p.values = values

    def learn(self, packs: list[Pack]) -> dict[str, float]:
        """One optimizer step."""
        metrics = self.step(packs, self._objective)
        return {k if k.startswith("train/") else f"train/critic_{k}": v for k, v in metrics.items()}

    def _objective(self, p: Pack, out: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        return value_objective(self.config, p, self._values(p, out))

    def _values(self, p: Pack, out: torch.Tensor) -> torch.Tensor:
        return gather_tokens(out[:, 0], p.bounds, parallel_state.get_context_parallel_group())[p.read_at]
