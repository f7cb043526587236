"""What the two worlds of algorithms share: the variants, and a trainer with all the models that a variant needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import tiny
import torch

KL: dict[str, Any] = {"kl_coef": 0.05, "kl_loss_type": "k1"}
OFF: dict[str, Any] = {"use_rollout_logprobs": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gspo": OFF | {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.1},
    "gspo_dual_clip": OFF | {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_c": 1.02},
    "cispo": OFF | {"advantage_estimator": "cispo", "eps_clip_high": 0.4},
    "cispo_per_token": OFF | {"advantage_estimator": "cispo", "calculate_per_token_loss": True},
    "dr_grpo": OFF | {"advantage_estimator": "dr_grpo", "rollout_max_response_len": 80},
    "rloo": {"advantage_estimator": "rloo"},
    "rloo_kl": KL | {"advantage_estimator": "rloo"},
    "grpo_whitened": OFF | {"normalize_advantages": True},
    "reinforce_plus_plus": KL | OFF | {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.95},
    "reinforce_plus_plus_without_kl": {"advantage_estimator": "reinforce_plus_plus", "calculate_per_token_loss": True},
    "reinforce_plus_plus_baseline": KL | OFF | {"advantage_estimator": "reinforce_plus_plus_baseline"},
    "distillation": {"use_opd": True, "opd_kl_coef": 0.3, "advantage_estimator": "gspo"},
    "distillation_off_policy": OFF | {"use_opd": True, "advantage_estimator": "reinforce_plus_plus"},
    "tis": {"use_tis": True, "tis_clip": 1.3, "tis_clip_low": 0.6},
    "tis_geometric": {"use_tis": True, "tis_clip": 1.05, "tis_clip_low": 0.9, "tis_level": "geometric"},
    "icepop": {"use_tis": True, "tis_clip": 1.5, "tis_clip_low": 0.5, "tis_mode": "mask"},
    "mis_sequence": {"use_tis": True, "tis_clip": 1.5, "tis_clip_low": 0.3, "tis_mode": "mask", "tis_level": "sequence"},
    "mis_geometric": {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": 0.95, "tis_mode": "mask", "tis_level": "geometric",
                      "advantage_estimator": "gspo"},
    "opsm": OFF | {"use_opsm": True, "opsm_delta": 0.01},
    "tis_and_opsm": {"use_tis": True, "tis_level": "geometric", "use_opsm": True, "opsm_delta": 0.0, "calculate_per_token_loss": True},
    "ppo": KL | OFF | {"advantage_estimator": "ppo", "gamma": 0.98, "lambd": 0.9},
    "ppo_whitened": {"advantage_estimator": "ppo", "normalize_advantages": True, "lambd": 0.5, "calculate_per_token_loss": True, "use_tis": True},
}
HEAD = "value_head.weight"


def make_teacher(folder: Path) -> None:
    """A model of another shape, with the same vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(9)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=tiny.VOCABULARY, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        intermediate_size=64,
        tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=4096, eos_token_id=2, bos_token_id=None, pad_token_id=0)
    ).float().save_pretrained(folder)


def value_head(hidden: int = 64) -> torch.Tensor:
    """Values of the size of rewards, which a new head does not have."""
    return torch.randn(1, hidden, generator=torch.Generator().manual_seed(4)) * 0.1


def build(folder: Path, options: dict[str, Any], name: str = "untied") -> Any:
    """A trainer for a variant, with its reference, teacher and critic."""
    from rlmono.models.registry import shape_from_hf
    trainer = tiny.build_trainer(folder / name, **options)
    if trainer.config.use_opd:
        shape = shape_from_hf(json.loads((folder / "teacher" / "config.json").read_text()))
        trainer.load_hf(folder / "teacher", trainer.add_teacher(shape), shape)
    if trainer.critic is not None:
        trainer.critic.load_hf(folder / name)
        for chunk in trainer.critic.chunks:
            if chunk.post_process:
                chunk.output_layer.weight.data.copy_(value_head())
        trainer.critic.weights_changed()
    return trainer


class CriticView:
    """The critic, as tiny.gradients and tiny.exported want it: its body by HF name, and its head on ranks that have it."""

    def __init__(self, trainer: Any):
        self.chunks, self.ddp = trainer.critic.chunks, trainer.critic.ddp
        self.shape, self.tensors = trainer.config.model, trainer._tensors

    def export(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        from rlmono.trainer.critic import HEAD as OURS
        from rlmono.trainer.layout import Layout, held_tensors
        from rlmono.weights.export import export
        held = held_tensors(self.chunks)
        yield from export(held, [t for t in self.tensors if t.name != OURS], Layout.current(), self.shape["vocab_size"])
        if OURS in held:
            yield [(HEAD, held[OURS])]
