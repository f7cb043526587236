"""The trainer of one rank: logprobs of a rollout, advantages, and its optimizer steps.

    metrics = trainer.train(batch)      one rollout: all its steps, on this data-parallel rank's share
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from rlmono.config.schema import Config
from rlmono.models.registry import family
from rlmono.trainer import advantages, model
from rlmono.trainer.context import gather_tokens
from rlmono.trainer.layout import Layout, held_tensors
from rlmono.trainer.losses import kl_estimate, policy_loss, token_weights
from rlmono.trainer.logprobs import logprobs_and_entropy
from rlmono.trainer.packs import Pack, make_pack
from rlmono.weights.export import Named, export
from rlmono.weights.hf import load_hf
from rlmono.world.messages import TrainBatch, TrainStep


class Trainer:
    """Megatron's model, optimizer and schedule on this rank. Build it collectively over the pool of trainers.

    `total_steps` is the number of optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, config: Config, dtype: torch.dtype, total_steps: int):
        self.config, self.dtype = config, dtype
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        model.init_parallel(config)
        self.tf_config = model.transformer_config(config, dtype)
        self.chunks = [c.to(self.device) for c in model.build_chunks(config, self.tf_config)]
        self.ddp = model.wrap(config, self.tf_config, self.chunks)
        self.optimizer = model.build_optimizer(config, dtype, self.ddp)
        self.schedule = model.build_schedule(config, self.optimizer, total_steps)
        self.reference: Optional[list[Any]] = None
        self.skipped_steps = 0
        self._layout: Optional[Layout] = None
        self._tensors = family(config.model["architecture"]).tensors(config.model)
        sft = config.loss_type == "sft"
        self._temperature = 1.0 if sft else config.rollout_temperature
        self._eps_high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high

    # ------------------------------------------------------------ where this rank stands

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(rank, size) over data-parallel ranks."""
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    @property
    def optimizers(self) -> list[Any]:
        """The distributed optimizers: one, or a second for experts under expert parallelism."""
        return [o for o in getattr(self.optimizer, "chained_optimizers", [self.optimizer]) if not getattr(o, "is_stub_optimizer", False)]

    @property
    def reports(self) -> bool:
        """True on the one rank whose metrics are the step's."""
        return (parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
                and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)

    def needs_reference(self) -> bool:
        return self.config.loss_type != "sft" and (self.config.use_kl_loss or self.config.kl_coef > 0)

    def add_reference(self) -> list[Any]:
        """A second, frozen model for reference logprobs; its weights are the caller's to load."""
        self.reference = [c.to(self.device, self.dtype).requires_grad_(False).eval() for c in model.build_chunks(self.config, self.tf_config)]
        return self.reference

    def load_hf(self, folder: Path, chunks: Optional[list[Any]] = None) -> None:
        """Weights from an HF folder into the actor, or into the chunks of another model of the same layout."""
        load_hf(folder, held_tensors(chunks or self.chunks), self._tensors, Layout.current(), self.config.model["vocab_size"])
        if chunks is None:
            self.weights_changed()

    def export(self) -> Iterator[Named]:
        """The actor's weights as buckets of (HF name, full tensor), on every rank; collective over tensor, expert and pipeline parallel ranks."""
        self._layout = self._layout or Layout.current()
        return export(held_tensors(self.chunks), self._tensors, self._layout, self.config.model["vocab_size"])

    def weights_changed(self) -> None:
        """After weights were written into the module: the optimizer's fp32 copies follow."""
        self.optimizer.reload_model_params()

    # ------------------------------------------------------------ one rollout

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """Train on a rollout; returns its metrics (means over its steps), equal on every rank that `reports`."""
        tp = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        cp = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        steps = [[make_pack(samples, self.device, tp, *cp) for samples in step.packs] for step in batch.steps]
        for step, packs in zip(batch.steps, steps, strict=True):
            for p in packs:
                p.weights = token_weights(p.masks, step.samples, step.tokens, self.config.calculate_per_token_loss).to(self.device)
        metrics: dict[str, float] = {}
        if self.config.loss_type == "policy_loss":
            metrics |= self._prepare_policy(batch, [p for packs in steps for p in packs], len(steps))
        trained = time.perf_counter()
        per_step = [self._step(step, packs) for step, packs in zip(batch.steps, steps, strict=True)]
        metrics |= {k: sum(s[k] for s in per_step) / len(per_step) for k in per_step[0]}
        if len(per_step) > 1:
            metrics |= {f"train/ppo_kl_step{i + 1}": s["train/ppo_kl"] for i, s in enumerate(per_step) if "train/ppo_kl" in s}
        now = time.perf_counter()
        metrics |= {"perf/train_time": now - trained, "train/skipped_steps": float(self.skipped_steps)}
        return metrics

    def _prepare_policy(self, batch: TrainBatch, packs: list[Pack], steps: int) -> dict[str, float]:
        """Reference and old-policy logprobs, where they are needed, and advantages."""
        c, metrics, started = self.config, {}, time.perf_counter()
        if self.reference is not None:
            for p, log_probs in zip(packs, self._log_probs(self.reference, packs), strict=True):
                p.ref_log_probs = log_probs
            metrics["perf/ref_log_probs_time"] = time.perf_counter() - started
        started = time.perf_counter()
        if c.use_rollout_logprobs:
            for p in packs:
                p.old_log_probs = p.rollout_log_probs
        elif steps > 1 or c.kl_coef > 0:
            for p, log_probs in zip(packs, self._log_probs(self.ddp, packs), strict=True):
                p.old_log_probs = log_probs
            metrics["perf/log_probs_time"] = time.perf_counter() - started
        self._set_advantages(batch, packs)
        return metrics

    def _set_advantages(self, batch: TrainBatch, packs: list[Pack]) -> None:
        c = self.config
        kl = self._kl_of_samples(packs) if c.kl_coef > 0 else {}
        rewards = [r - c.kl_coef * kl.get(index, 0.0) for _, index, r in batch.rewards]
        values = advantages.grpo(rewards, [g for g, _, _ in batch.rewards], not c.disable_rewards_normalization,
                                 not c.disable_grpo_std_normalization)
        by_index = {index: float(a) for (_, index, _), a in zip(batch.rewards, values, strict=True)}
        for p in packs:
            p.set_per_sample(by_index)

    def _kl_of_samples(self, packs: list[Pack]) -> dict[int, float]:
        """Σ_t m · kl of every sample of the rollout, over all data-parallel ranks; the penalty goes into the reward before it is normalised."""
        mine: dict[int, float] = {}
        for p in packs:
            if p.old_log_probs is None or p.ref_log_probs is None:
                continue            # not the last pipeline stage
            kl = kl_estimate(p.old_log_probs, p.ref_log_probs, self.config.kl_loss_type).double()
            for i, part in enumerate(kl.split([s.response_length for s in p.samples])):
                mine[p.samples[i].index] = float((part.cpu() * p.masks[i]).sum())
        group = parallel_state.get_data_parallel_group()
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group=group)
        return {k: v for part in parts for k, v in part.items()}

    # ------------------------------------------------------------ passes over packs

    def _run(self, chunks: list[Any], packs: list[Pack], loss_func: Any, forward_only: bool) -> list[Any]:
        """Megatron's schedule over the packs; `loss_func(pack, logits)` on the last stage. Returns what it collected, in order."""
        several = len(chunks) > 1
        def forward_step(packs_left: Iterable[Pack], m: Any) -> tuple[torch.Tensor, Any]:
            p = next(packs_left)        # type: ignore[call-overload]
            out = m(p.tokens[None], p.positions[None], None, packed_seq_params=p.params)
            return out, lambda logits, non_loss_data=False: loss_func(p, logits[0])
        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(packs) for _ in chunks] if several else iter(packs),
            model=chunks if several else chunks[0], num_microbatches=len(packs),
            seq_length=1, micro_batch_size=1, forward_only=forward_only, collect_non_loss_data=forward_only)

    def _response_logprobs(self, p: Pack, logits: torch.Tensor, entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropy = logprobs_and_entropy(logits, p.targets, self._temperature, self.config.model["vocab_size"],
                                                  parallel_state.get_tensor_model_parallel_group(), entropy_grad)
        group = parallel_state.get_context_parallel_group()
        return tuple(gather_tokens(x, p.bounds, group)[p.read_at] for x in (log_probs, entropy))    # type: ignore[return-value]

    @torch.no_grad()
    def _log_probs(self, chunks: list[Any], packs: list[Pack]) -> list[Optional[torch.Tensor]]:
        """[r] logprobs of each pack's response tokens; None on all but the last pipeline stage."""
        out = self._run(chunks, packs, lambda p, logits: self._response_logprobs(p, logits)[0], forward_only=True)
        return out if parallel_state.is_pipeline_last_stage() else [None] * len(packs)

    def _step(self, step: TrainStep, packs: list[Pack]) -> dict[str, float]:
        """One optimizer step."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = self._run(self.ddp, packs, self._loss, forward_only=False)
        self.schedule.step(1)
        grad_norm = self._update()
        metrics = self._reduce(collected)
        return metrics | {"train/grad_norm": grad_norm, "train/lr": self.optimizer.param_groups[0]["lr"]}

    def _update(self) -> float:
        """Clip and step; a step whose gradient is not finite is skipped and counted, never taken."""
        found_inf = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm() or 0.0)
        if found_inf or not math.isfinite(norm):
            self.skipped_steps += 1
            return norm
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
        for single in self.optimizers:
            if self.config.clip_grad > 0 and single.get_parameters():
                clip_grad_by_total_norm_fp32(single.get_parameters(), max_norm=self.config.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm

    # ------------------------------------------------------------ losses

    def _loss(self, p: Pack, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, a count that nobody uses, weighted sums for metrics) of one pack, as Megatron's schedule wants it."""
        log_probs, entropy = self._response_logprobs(p, logits, self.config.entropy_coef > 0)
        if self.config.loss_type == "sft":
            loss, parts = -(p.weights * log_probs).sum(), {}
        else:
            loss, parts = self._policy_parts(p, log_probs, entropy)
        parts = {"train/loss": loss.detach(), "train/entropy_loss": (p.weights * entropy.detach()).sum(), **parts}
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), parts

    def _policy_parts(self, p: Pack, log_probs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        c, w = self.config, p.weights
        old = log_probs.detach() if p.old_log_probs is None else p.old_log_probs
        token_loss, clipped = policy_loss(log_probs, old, p.advantages, c.eps_clip, self._eps_high, c.eps_clip_c)
        loss = pg_loss = (w * token_loss).sum()
        change = log_probs.detach() - old
        parts = {"train/pg_loss": pg_loss.detach(), "train/pg_clipfrac": (w * clipped).sum(),
                 "train/ppo_kl": (w * (change.expm1() - change)).sum()}
        if c.entropy_coef > 0:
            loss = loss - c.entropy_coef * (w * entropy).sum()
        if p.ref_log_probs is not None:
            kl = (w * kl_estimate(log_probs, p.ref_log_probs, c.kl_loss_type)).sum()
            parts["train/kl_loss"] = kl.detach()
            if c.use_kl_loss:
                loss = loss + c.kl_loss_coef * kl
        if p.rollout_log_probs is not None:
            first = log_probs.detach() if p.old_log_probs is None or c.use_rollout_logprobs else p.old_log_probs
            difference = (first - p.rollout_log_probs).abs()
            parts["train/train_rollout_logprob_abs_diff"] = (w * difference).sum()
            parts["max:train/train_rollout_logprob_abs_diff_max"] = (difference * (w > 0)).amax() if len(w) else difference.sum()
        return loss, parts

    def _reduce(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums (or maxima) of the packs' parts over packs and data-parallel ranks; empty off the last pipeline stage."""
        if not parallel_state.is_pipeline_last_stage():
            return {}
        group = parallel_state.get_data_parallel_group()        # context-parallel ranks all have the whole pack's loss
        out: dict[str, float] = {}
        for maximum in (False, True):
            names = sorted(k for k in collected[0] if k.startswith("max:") == maximum)
            if not names:
                continue
            stacked = torch.stack([torch.stack([c[k].double() for k in names]) for c in collected])
            value = stacked.amax(0) if maximum else stacked.sum(0)
            dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)
            out |= {k.removeprefix("max:"): float(v) for k, v in zip(names, value, strict=True)}
        return out
