"""`DataBuffer`: prompts that were given out and came back before they counted, with what had been generated for them.

They are taken first, by `--buffer-filter-path`. With `--partial-rollout` samples keep their tokens, logprobs, mask and the weight
version of each token, and generation goes on where it stopped; without it only the prompt comes back. The buffer is in the checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from rlmono.config.schema import Config
from rlmono.data.sample import ABORTED, PENDING, Group, Sample
from rlmono.rewards.load import load_function
from rlmono.rollout.filters import pop_first
from rlmono.rollout.generate import TURN_START

_decoder = msgspec.msgpack.Decoder(list[list[Sample]])


class DataBuffer:
    """Groups in the order in which they came back. Building it loads the function that takes them; raises LoadError (a ValueError)."""

    def __init__(self, config: Config):
        self.config = config
        self.groups: list[Group] = []
        self.discarded = 0
        """Groups that the buffer filter has taken out and not given on, over the whole run."""
        self.restarted = 0
        """Samples that were too old to go on with, over the whole run."""
        self._pop = load_function(config.buffer_filter_path) if config.buffer_filter_path else pop_first

    def __len__(self) -> int:
        return len(self.groups)

    def put(self, groups: Sequence[Group]) -> None:
        self.groups += groups

    def take(self, rollout_id: int, n: int) -> list[Group]:
        """At most n groups, as the buffer filter chooses them. Raises RuntimeError that names it when its answer makes no sense."""
        if n <= 0 or not self.groups:
            return []
        known, left = {_number(g): g for g in self.groups}, list(self.groups)
        try:
            taken = self._pop(self.config, rollout_id, left, n)
        except Exception as e:
            raise RuntimeError(f"--buffer-filter-path {self.config.buffer_filter_path}: {type(e).__name__}: {e}") from e
        self._check(taken, left, known, n)
        mine = {_number(g) for g in taken}
        rest = {_number(g) for g in left} - mine        # one that it forgot to take out of the buffer must not be trained on twice
        self.groups = [g for number, g in known.items() if number in rest]
        self.discarded += len(known) - len(mine) - len(rest)
        return [[self._fit(s, rollout_id) for s in g] for g in taken]

    def _fit(self, sample: Sample, rollout_id: int) -> Sample:
        """The sample, or its prompt alone where its tokens are too old to go on with."""
        c = self.config
        if not sample.response_length or (c.partial_rollout and not too_old(sample, weight_version(c, rollout_id), c.partial_rollout_max_age)):
            return sample
        self.restarted += 1
        return restart(sample)

    def _check(self, taken: Any, left: list[Group], known: dict[int, Group], n: int) -> None:
        what = f"--buffer-filter-path {self.config.buffer_filter_path}"
        if not isinstance(taken, list) or not all(isinstance(g, list) and g for g in [*taken, *left]):
            raise RuntimeError(f"{what} must return a list of groups (lists of samples), and leave such a list in the buffer")
        numbers = [_number(g) for g in taken]
        if len(set(numbers)) < len(numbers) or not {*numbers, *map(_number, left)} <= set(known):
            raise RuntimeError(f"{what} returned a group twice, or one that was not in the buffer: {numbers[:16]}")
        if len(taken) > n:
            raise RuntimeError(f"{what} returned {len(taken)} groups, and was asked for {n} at most")
        if odd := [_number(g) for g in taken if len(g) != len(known[_number(g)])]:
            raise RuntimeError(f"{what} changed the number of samples of group(s) {odd[:16]}; take whole groups")

    def values(self) -> dict[str, float]:
        """Metrics of this moment; what is counted, over the whole run."""
        return {"rollout/buffer/groups": len(self), "rollout/buffer/tokens": self.tokens, "rollout/buffer/restarted_samples": self.restarted,
                "rollout/buffer/discarded_groups": self.discarded}

    @property
    def tokens(self) -> int:
        return sum(s.response_length for g in self.groups for s in g)

    # ------------------------------------------------------------ checkpoint

    def dump(self) -> bytes:
        for sample in itertools.chain.from_iterable(self.groups):
            sample.pack()
        return msgspec.msgpack.encode(self.groups)

    def state(self) -> dict[str, Any]:
        """What state.json says of it: the groups themselves are in a file of their own."""
        return {"groups": [_number(g) for g in self.groups], "tokens": self.tokens, "sha256": hashlib.sha256(self.dump()).hexdigest(),
                "restarted": self.restarted, "discarded": self.discarded}

    def restore(self, state: dict[str, Any], data: bytes) -> None:
        """Raises ValueError for the buffer of a run with other groups."""
        groups, n = _decoder.decode(data), self.config.n_samples_per_prompt
        if odd := next((g for g in groups if len(g) != n), None):
            raise ValueError(f"the checkpoint's data buffer holds groups of {len(odd)} samples, and --n-samples-per-prompt is {n}: resume with "
                             "the same, or start over the data with --finetune")
        self.groups, self.restarted, self.discarded = groups, int(state["restarted"]), int(state["discarded"])


def _number(group: Group) -> int:
    return group[0].group_index


# ---------------------------------------------------------------- samples between two rollouts

def weight_version(config: Config, rollout_id: int) -> int:
    """The version of the weights that a rollout is sampled with: every training step makes another."""
    return 0 if config.debug_rollout_only else rollout_id


def copy_prompt(group: Group) -> Group:
    """The group as it is now; a generate function may write into the original."""
    for sample in group:
        sample.pack()       # lists would be one for both
    return [msgspec.structs.replace(s, metadata=dict(s.metadata)) for s in group]


def restart(sample: Sample) -> Sample:
    """The sample with its prompt alone; in its metadata the rollout that it was begun in stays."""
    metadata = {k: v for k, v in sample.metadata.items() if k != TURN_START}
    return msgspec.structs.replace(sample, tokens=sample.tokens[:sample.prompt_length], response="", response_length=0, reward=None, loss_mask=None,
                                   rollout_log_probs=None, weight_versions=None, status=PENDING, remarks=[], metadata=metadata)


def cut(sample: Sample, length: int) -> Sample:
    """The sample as it was when its response had `length` tokens. One with a loss mask of its own, of several turns, stays whole."""
    if sample.response_length <= length or sample.loss_mask is not None:
        return sample
    return msgspec.structs.replace(
        sample, tokens=sample.tokens[:sample.prompt_length + length], response="", response_length=length, reward=None, status=ABORTED, remarks=[],
        rollout_log_probs=(sample.rollout_log_probs or [])[:length], weight_versions=(sample.weight_versions or [])[:length])


def too_old(sample: Sample, version: int, max_age: int | None) -> bool:
    """Whether its oldest token is of weights more than `max_age` versions before `version`."""
    return max_age is not None and version - min(Sample.weight_versions.view(sample) or [version]) > max_age


def mask_old_tokens(sample: Sample, version: int) -> None:
    """Leave the tokens of older weights than `version` out of the loss."""
    versions = Sample.weight_versions.view(sample)
    if versions and min(versions) < version:
        sample.loss_mask = [m if v >= version else 0 for m, v in zip(sample.whole_loss_mask, versions, strict=True)]
