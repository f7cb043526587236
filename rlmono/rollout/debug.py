"""Rollouts on disk: `--save-debug-rollout-data` writes them, `--load-debug-rollout-data` trains on them without an engine.

One sample a line, as JSON, with tokens, logprobs, mask, weight versions and reward; `python -m rlmono view FILE` shows them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rlmono.config.evals import EvalSet
from rlmono.config.schema import Config
from rlmono.data.rows import DataError
from rlmono.data.sample import Group, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.observe.samples import parts_of
from rlmono.rollout.schedule import steps_per_rollout


def save_rollout(template: str, rollout_id: int, groups: Sequence[Group], decode: Callable[[Sequence[int]], str]) -> Path:
    """Write all samples to the template's path, whole or not at all."""
    path = Path(template.format(rollout_id=rollout_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for sample in itertools.chain.from_iterable(groups):
            file.write(msgspec.json.encode(sample.to_dict() | parts_of(sample, decode)) + b"\n")
    os.replace(temporary, path)
    return path


def load_rollout(path: Path, config: Config) -> list[Group]:
    """The samples of a file as groups, in order of their numbers. Raises DataError with file and line."""
    samples = list(_read(path, config))
    if not samples:
        raise DataError(f"{path}: has no samples")
    samples.sort(key=lambda s: (s.group_index, s.index))
    return [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.group_index)]


def _read(path: Path, config: Config) -> Iterator[Sample]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    sample = msgspec.convert(msgspec.json.decode(line), Sample, builtin_types=(bytes,))     # no text is read as bytes
                    _check(sample, config)
                except (msgspec.DecodeError, ValueError) as error:
                    raise DataError(f"{path}:{number}: is no sample of --save-debug-rollout-data to train on: {error}") from error
                yield sample
    except OSError as error:
        raise DataError(f"{path}: cannot be read (--load-debug-rollout-data): {error.strerror}") from error


def _check(sample: Sample, config: Config) -> None:
    if not 0 < sample.response_length <= sample.length:
        raise ValueError(f"it has {sample.length} tokens, {sample.response_length} of them of a response")
    for name in ("loss_mask", "rollout_log_probs", "weight_versions"):
        if (values := getattr(sample, name)) is not None and len(values) != sample.response_length:
            raise ValueError(f"{name} has {len(values)} entries for a response of {sample.response_length} tokens")
    if max(sample.tokens) >= config.model["vocab_size"] or min(sample.tokens) < 0:
        raise ValueError(f"token {max(sample.tokens)} is not in the model's vocabulary of {config.model['vocab_size']}: another model made it")
    if config.loss_type != "sft":
        sample.get_reward_value(config)


class SavedRollouts:
    """Stands in for `Prompts` where rollouts come from files. Nothing is kept of them in a checkpoint but how many there were."""

    eval_sets: Sequence[tuple[EvalSet, Any]] = ()

    def __init__(self, config: Config, tokenizer: Tokenizer):
        assert config.load_debug_rollout_data is not None and config.num_rollout is not None
        self.config, self.tokenizer, self.num_rollout = config, tokenizer, config.num_rollout
        self.steps_per_rollout = steps_per_rollout(config)
        self._template = config.load_debug_rollout_data

    def _path(self, rollout_id: int) -> Path:
        return Path(self._template.format(rollout_id=rollout_id))

    def refuse_missing(self, start: int) -> None:
        """Raises DataError when a file of the run is missing, or the first one can't be trained on."""
        missing = [i for i in range(start, self.num_rollout) if not self._path(i).is_file()]
        if missing:
            raise DataError(f"{self._path(missing[0])}: there is no such file; --load-debug-rollout-data {self._template} needs one for each of "
                            f"the rollouts {start} to {self.num_rollout - 1} (--num-rollout), and {len(missing)} are missing")
        if start < self.num_rollout:
            load_rollout(self._path(start), self.config)

    def next_groups(self, rollout_id: int, n: int) -> list[Group]:
        """All of the rollout's groups, however many there are."""
        return load_rollout(self._path(rollout_id), self.config)

    def eval_groups(self) -> Iterator[tuple[EvalSet, list[Group]]]:
        """None: nothing generates."""
        return iter(())

    def left_out(self) -> dict[str, float]:
        return {}

    def state(self, next_rollout: int) -> dict[str, Any]:
        return {"next_rollout": next_rollout, "rollouts": self._template}

    def files(self) -> dict[str, bytes]:
        return {}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Nothing: a rollout's file has its number."""
