"""The trainer of one rank: logprobs of a rollout, advantages, and its optimizer steps.

    metrics = trainer.train(batch)      one rollout: all its steps, on this data-parallel rank's share
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import torch
from megatron.core import parallel_state

from rlmono.config.schema import Config
from rlmono.models.registry import family
from rlmono.trainer import credit, model, recompute
from rlmono.trainer.context import gather_tokens
from rlmono.trainer.critic import Critic
from rlmono.trainer.layout import Layout, held_tensors
from rlmono.trainer.learner import Learner, per_token
from rlmono.trainer.logprobs import logprobs_and_entropy
from rlmono.trainer.losses import token_weights
from rlmono.trainer.objective import Parts, policy_objective
from rlmono.trainer.packs import Pack, make_pack
from rlmono.weights.direct import Sources
from rlmono.weights.export import About, Named, describe, export
from rlmono.weights.hf import load_hf
from rlmono.world.messages import TrainBatch


class Trainer(Learner):
    """Megatron's model, optimizer and schedule on this rank. Build it collectively over the pool of trainers.

    `total_steps` is the number of optimizer steps of the whole run, for the schedule. In PPO it has a critic beside it.
    """

    def __init__(self, config: Config, dtype: torch.dtype, total_steps: int):
        model.init_parallel(config)
        tf_config = model.transformer_config(config, dtype)
        super().__init__(config, dtype, total_steps, tf_config, model.build_chunks(config, tf_config))
        self.reference: Optional[list[Any]] = None
        self.teacher: Optional[list[Any]] = None
        self.critic = Critic(config, dtype, total_steps) if self.needs_critic() else None
        self._layout: Optional[Layout] = None
        self._recompute_settled = False
        self._about: Optional[dict[str, About]] = None
        self._tensors = family(config.model["architecture"]).tensors(config.model)
        self._temperature = 1.0 if config.loss_type == "sft" else config.rollout_temperature

    # ------------------------------------------------------------ where this rank stands

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(rank, size) over data-parallel ranks."""
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    @property
    def reports(self) -> bool:
        """True on the one rank whose metrics are the step's."""
        return (parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
                and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)

    def needs_critic(self) -> bool:
        return self.config.loss_type != "sft" and self.config.advantage_estimator == "ppo"

    def needs_reference(self) -> bool:
        return self.config.loss_type != "sft" and (self.config.use_kl_loss or self.config.kl_coef > 0)

    def add_reference(self) -> list[Any]:
        """A second, frozen model for reference logprobs; its weights are the caller's to load."""
        self.reference = self._frozen(self.config)
        return self.reference

    def add_teacher(self, shape: Mapping[str, Any]) -> list[Any]:
        """A frozen model for on-policy distillation, of any shape with this vocabulary; its weights are the caller's to load.

        With another number of layers than the actor's it has equal pipeline stages.
        """
        config = dataclasses.replace(self.config, model=shape)
        if shape["num_layers"] != self.config.model["num_layers"]:
            config = dataclasses.replace(config, decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None)
        self.teacher = self._frozen(config)
        return self.teacher

    def _frozen(self, config: Config) -> list[Any]:
        tf_config = model.transformer_config(config, self.dtype)
        return [c.to(self.device, self.dtype).requires_grad_(False).eval() for c in model.build_chunks(config, tf_config)]

    def load_hf(self, folder: Path, chunks: Optional[list[Any]] = None, shape: Optional[Mapping[str, Any]] = None) -> None:
        """Weights from an HF folder into the actor, or into the chunks of another model of the same layout (and of `shape`, if not the actor's)."""
        tensors = family(shape["architecture"]).tensors(shape) if shape else self._tensors
        load_hf(folder, held_tensors(chunks or self.chunks), tensors, Layout.current(), self.config.model["vocab_size"])
        if chunks is None:
            self.weights_changed()

    def export(self) -> Iterator[Named]:
        """The actor's weights as buckets of (HF name, full tensor), on every rank; collective over tensor, expert and pipeline parallel ranks."""
        self._layout = self._layout or Layout.current()
        held = held_tensors(self.chunks)
        self._about = self._about or describe(held, self._tensors, self._layout)
        return export(held, self._tensors, self._layout, self.config.model["vocab_size"], about=self._about)

    def sources(self) -> Optional[Sources]:
        """Where the actor's weights lie, for an update without HF tensors; None where layers or experts are dealt over ranks."""
        self._layout = layout = self._layout or Layout.current()
        if layout.pp.size() > 1 or layout.ep.size() > 1:
            return None
        return Sources(held_tensors(self.chunks), self._tensors, lambda t: layout.expert_tp if t.expert else layout.tp)

    # ------------------------------------------------------------ memory

    def tagged(self) -> dict[str, list[torch.Tensor]]:
        """What lies on the device by what it is for: params, gradients, optimizer, and the weights of frozen models."""
        out: dict[str, list[torch.Tensor]] = {}
        for learner in (self, self.critic):
            for tag, tensors in learner.buffers().items() if learner is not None else ():
                out.setdefault(tag, []).extend(tensors)
        out["frozen"] = [p for chunks in (self.reference, self.teacher) for c in chunks or () for p in c.parameters()]
        return out

    def before_update(self, hook: Callable[[], None]) -> None:
        """Call `hook` before the optimizer (and the critic's) uses its state."""
        for learner in (self, self.critic):
            if learner is not None:
                learner.hooks.append(hook)

    def before_pack(self, hook: Callable[[], None]) -> None:
        """Call `hook` before every pass of the actor over a pack."""
        self.chunks[0].register_forward_pre_hook(lambda *_: hook())

    # ------------------------------------------------------------ one rollout

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """Train on a rollout; returns its metrics (means over its steps), equal on every rank that `reports`."""
        if self.config.recompute_granularity == "auto" and not self._recompute_settled:
            self._settle_recompute()
        steps = self._packs(batch)
        metrics: dict[str, float] = {}
        if self.config.loss_type == "policy_loss":
            metrics |= self._prepare_policy(batch, [p for packs in steps for p in packs], len(steps))
        trained = time.perf_counter()
        per_step = [self._step(packs, batch.rollout_id) for packs in steps]
        metrics |= {k: sum(s[k] for s in per_step) / len(per_step) for k in per_step[0]}
        if len(per_step) > 1:
            metrics |= {f"train/ppo_kl_step{i + 1}": s["train/ppo_kl"] for i, s in enumerate(per_step) if "train/ppo_kl" in s}
        skipped = self.skipped_steps + (self.critic.skipped_steps if self.critic else 0)
        return metrics | {"perf/train_time": time.perf_counter() - trained, "train/skipped_steps": float(skipped)}

    def _settle_recompute(self) -> None:
        self._recompute_settled = True
        layers = max(len(c.decoder.layers) for c in self.chunks)
        recompute.settle(self.config, [self.tf_config, *([self.critic.tf_config] if self.critic else [])], layers, self.dtype.itemsize)

    def _packs(self, batch: TrainBatch) -> list[list[Pack]]:
        """The packs of each step, with the weights of their tokens."""
        c, tp = self.config, self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        cp = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        budget = c.rollout_max_response_len if c.loss_type != "sft" and c.advantage_estimator == "dr_grpo" else None
        steps = [[make_pack(samples, self.device, tp, *cp) for samples in step.packs] for step in batch.steps]
        for step, packs in zip(batch.steps, steps, strict=True):
            for p in packs:
                p.weights = token_weights(p.masks, step.samples, step.tokens, c.calculate_per_token_loss, budget).to(self.device)
        return steps

    def _prepare_policy(self, batch: TrainBatch, packs: list[Pack], steps: int) -> dict[str, float]:
        """Logprobs of the frozen models and the old policy, and the critic's values, where they are needed; then advantages."""
        c, metrics = self.config, {}

        def timed(name: str, work: Callable[[], None]) -> None:
            started = time.perf_counter()
            work()
            metrics[f"perf/{name}_time"] = time.perf_counter() - started
        for name, chunks, field in (("ref_log_probs", self.reference, "ref_log_probs"), ("teacher_log_probs", self.teacher, "teacher_log_probs")):
            if chunks is not None:
                timed(name, lambda: self._set_log_probs(chunks, packs, field))      # noqa: B023 - called at once
        if c.use_rollout_logprobs:
            for p in packs:
                p.old_log_probs = p.rollout_log_probs
        elif steps > 1 or c.kl_coef > 0 or c.use_opd:
            timed("log_probs", lambda: self._set_log_probs(self.ddp, packs, "old_log_probs"))
        if self.critic is not None:
            timed("values", lambda: self.critic.set_values(packs))      # type: ignore[union-attr]
        if parallel_state.is_pipeline_last_stage():
            credit.assign(c, batch.rewards, packs, parallel_state.get_data_parallel_group())
        return metrics

    def _step(self, packs: list[Pack], rollout_id: int) -> dict[str, float]:
        """One optimizer step; in PPO of the critic too, and of it alone in the first `num_critic_only_steps` rollouts."""
        metrics = self.critic.learn(packs) if self.critic is not None else {}
        if self.critic is not None and rollout_id < self.config.num_critic_only_steps:
            return metrics
        own = self.step(packs, self._loss)
        return metrics | {k if k.startswith("train/") else f"train/{k}": v for k, v in own.items()}

    # ------------------------------------------------------------ packs

    def _response_logprobs(self, p: Pack, logits: torch.Tensor, entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropy = logprobs_and_entropy(logits, p.targets, self._temperature, self.config.model["vocab_size"],
                                                  parallel_state.get_tensor_model_parallel_group(), entropy_grad)
        group = parallel_state.get_context_parallel_group()
        return tuple(gather_tokens(x, p.bounds, group)[p.read_at] for x in (log_probs, entropy))    # type: ignore[return-value]

    def _set_log_probs(self, chunks: list[Any], packs: list[Pack], field: str) -> None:
        """[r] logprobs of each pack's response tokens by this model; None on all but the last pipeline stage."""
        values = per_token(chunks, packs, lambda p, logits: self._response_logprobs(p, logits)[0])
        for p, log_probs in zip(packs, values, strict=True):
            setattr(p, field, log_probs)

    def _loss(self, p: Pack, logits: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        log_probs, entropy = self._response_logprobs(p, logits, self.config.entropy_coef > 0)
        parts: Parts = {}
        if self.config.loss_type == "sft":
            loss = -(p.weights * log_probs).sum()
        else:
            loss, parts = policy_objective(self.config, p, log_probs, entropy)
        return loss, {"train/loss": loss.detach(), "train/entropy_loss": (p.weights * entropy.detach()).sum(), **parts}
