"""`Sample`: one prompt with one response; `Group`: the samples of one prompt."""

from __future__ import annotations

from typing import Any, Optional, Union

import msgspec

from rlmono.data.numbers import from_bytes, to_bytes

PENDING, COMPLETED, TRUNCATED, ABORTED, FAILED = "pending", "completed", "truncated", "aborted", "failed"
FINISHED = (COMPLETED, TRUNCATED, FAILED)
"""Nothing more is generated for a sample with one of these."""


class Sample(msgspec.Struct, omit_defaults=True):
    """One response to one prompt; mutable, and small enough to send whole.

    `tokens` is prompt and response together (ids); the last `response_length` of them are the response, and
    `rollout_log_probs`, `loss_mask` and `weight_versions` have one entry for each of those. `loss_mask` is None
    where the model wrote every token. `reward` is what the reward function gave; a dict needs `--reward-key`.
    """

    index: int = 0
    """Number of the sample, counted over the whole run in submission order."""
    group_index: int = 0
    """Number of the prompt, likewise."""
    prompt: Union[str, list[dict[str, Any]]] = ""
    tokens: list[int] = []
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: Union[None, float, dict[str, Any]] = None
    loss_mask: Optional[list[int]] = None
    rollout_log_probs: Optional[list[float]] = None
    weight_versions: Optional[list[int]] = None
    status: str = PENDING
    metadata: dict[str, Any] = {}
    tools: Optional[list[dict[str, Any]]] = None
    rm_type: Optional[str] = None
    """The sample's own reward by name, and below by path and with the key of its number: they come before the options and the metadata.
    An eval set or a generate function sets them."""
    custom_rm_path: Optional[str] = None
    reward_key: Optional[str] = None
    generate_function_path: Optional[str] = None
    """The function that makes this sample, before `--custom-generate-function-path`; an eval set sets it."""
    remarks: list[str] = []
    """Counted, named outcomes that are worth a line in the metrics: `reward_timeout`, `reward_error`, …"""

    def get_reward_value(self, args: Any) -> float:
        """The reward as a number: itself, or the entry of its `reward_key`, else of `--reward-key`."""
        value = self.reward[self.reward_key or args.reward_key] if isinstance(self.reward, dict) else self.reward
        if value is None:
            raise ValueError(f"sample {self.index} has no reward yet")
        return float(value)

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def trained_length(self) -> int:
        """Tokens of the response that are trained on: all, or those that the loss mask lets through."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def whole_loss_mask(self) -> list[int]:
        """The loss mask [response_length], ones where there is none."""
        return [1] * self.response_length if self.loss_mask is None else self.loss_mask


class PackedSample(msgspec.Struct, array_like=True):
    """A Sample as it travels between processes: lists of 8k ids and logprobs take the receiver a third of the time as bytes.
    Logprobs are of fp32, as the engine's and the trainer's are."""

    rest: Sample
    tokens: bytes
    rollout_log_probs: Optional[bytes]
    weight_version: Optional[int] = None
    """Of all tokens of the response, where they are of one; else `rest` has them."""

    @classmethod
    def of(cls, s: Sample) -> PackedSample:
        """Raises struct.error for tokens that are no int32, and logprobs that are no numbers."""
        log_probs = None if s.rollout_log_probs is None else to_bytes("f", s.rollout_log_probs)
        rest, versions = msgspec.structs.replace(s, tokens=[], rollout_log_probs=None), s.weight_versions
        if not versions or len(versions) != s.response_length or versions.count(versions[0]) < len(versions):
            return cls(rest, to_bytes("i", s.tokens), log_probs)
        rest.weight_versions = None
        return cls(rest, to_bytes("i", s.tokens), log_probs, versions[0])

    def unpack(self) -> Sample:
        """The sample; once. Raises ValueError for bytes that are not whole numbers."""
        self.rest.tokens = from_bytes("i", self.tokens)
        self.rest.rollout_log_probs = None if self.rollout_log_probs is None else from_bytes("f", self.rollout_log_probs)
        if self.weight_version is not None:
            self.rest.weight_versions = [self.weight_version] * self.rest.response_length
        return self.rest


Group = list[Sample]
