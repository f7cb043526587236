"""How many samples, steps and packs: the arithmetic of a rollout, from the config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from rlmono.config.option import ConfigError
from rlmono.config.schema import Config


@dataclass(frozen=True)
class BatchPlan:
    """How a rollout's samples become steps; counts of samples, but `steps` of steps a rollout and `prompts` of groups."""

    prompts: int
    samples_per_prompt: int
    samples_per_rollout: int
    steps: int
    global_batch_size: int
    dp: int
    samples_per_rank: int
    """Samples a data-parallel rank trains on in one step."""

    def lines(self) -> list[str]:
        """The arithmetic as text."""
        return [f"rollout: {self.prompts} prompts x {self.samples_per_prompt} samples = {self.samples_per_rollout} samples",
                f"steps:   {self.samples_per_rollout} samples = {self.steps} step(s) x {self.global_batch_size} samples",
                f"ranks:   {self.global_batch_size} samples a step = {self.dp} data-parallel rank(s) x {self.samples_per_rank} samples"]


def batch_arithmetic(config: Config, dp: int) -> BatchPlan:
    """The plan of a rollout on `dp` data-parallel ranks. Raises ConfigError when the numbers don't come out even."""
    samples = config.rollout_batch_size * config.n_samples_per_prompt
    product = f"rollout_batch_size {config.rollout_batch_size} x n_samples_per_prompt {config.n_samples_per_prompt} = {samples} samples"
    size, steps = config.global_batch_size, config.num_steps_per_rollout
    if size is not None and steps is not None and size * steps != samples:
        raise ConfigError([f"global_batch_size {size} x num_steps_per_rollout {steps} = {size * steps}, but {product}; "
                           "give one of the two only"])
    if size is None:
        steps = steps or 1
        if samples % steps:
            raise ConfigError([f"{product} don't divide into num_steps_per_rollout {steps} equal steps"])
        size = samples // steps
    elif samples % size:
        raise ConfigError([f"{product} don't divide into steps of global_batch_size {size}"])
    factors = {"data-parallel ranks": dp, "micro_batch_size": 1 if config.use_dynamic_batch_size else config.micro_batch_size,
               "stages of a virtual pipeline": packs_multiple(config)}
    share = math.prod(factors.values())
    if size % share:
        among = " x ".join([f"{dp} data-parallel ranks", *(f"{n} {v}" if n == "micro_batch_size" else f"{v} {n}"
                                                           for n, v in list(factors.items())[1:] if v > 1)])
        raise ConfigError([f"global_batch_size {size} does not divide among {among}: make it a multiple of {share} "
                           "(rollout_batch_size, n_samples_per_prompt, num_steps_per_rollout)"])
    return BatchPlan(config.rollout_batch_size, config.n_samples_per_prompt, samples, samples // size, size, dp, size // dp)


def packs_multiple(config: Config) -> int:
    """What the number of packs on a data-parallel rank must be a multiple of: Megatron's interleaved schedule goes round by the stages."""
    return config.pipeline_model_parallel_size if (config.virtual_pipeline_model_parallel_size or 1) > 1 else 1


def data_parallel_size(config: Config) -> Optional[int]:
    """Data-parallel ranks as far as the config alone says; None where the number of devices is known only at start."""
    per_node = config.actor_num_gpus_per_node
    model = config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
    if per_node is None or config.actor_num_nodes * per_node % model:
        return None
    return config.actor_num_nodes * per_node // model
