"""`Sample`: one prompt with one response; `Group`: the samples of one prompt."""

from __future__ import annotations

from typing import Any, Optional, Union

import msgspec

from rlmono.data.numbers import Listed, Runs

PENDING, COMPLETED, TRUNCATED, ABORTED, FAILED = "pending", "completed", "truncated", "aborted", "failed"
FINISHED = (COMPLETED, TRUNCATED, FAILED)
"""Nothing more is generated for a sample with one of these."""


class _Stored(msgspec.Struct, omit_defaults=True):
    """What a Sample holds, and how it travels and is saved: the three lists of numbers as they are, or as bytes."""

    index: int = 0
    """Number of the sample, counted over the whole run in submission order."""
    group_index: int = 0
    """Number of the prompt, likewise."""
    prompt: Union[str, list[dict[str, Any]]] = ""
    tokens: Union[list[int], bytes] = []
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: Union[None, float, dict[str, Any]] = None
    loss_mask: Optional[list[int]] = None
    rollout_log_probs: Union[None, list[float], bytes] = None
    weight_versions: Union[None, list[int], bytes] = None
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


class Sample(_Stored):
    """One response to one prompt; mutable, and small enough to send whole.

    `tokens` is prompt and response together (ids); the last `response_length` of them are the response, and
    `rollout_log_probs`, `loss_mask` and `weight_versions` have one entry for each of those. `loss_mask` is None
    where the model wrote every token. `reward` is what the reward function gave; a dict needs `--reward-key`.

    The numbers are lists to whoever reads them, made when they are first read: see `Listed`. Logprobs are of fp32, as the engine's and the
    trainer's are.
    """

    tokens = Listed[list[int]]("i", _Stored.tokens)
    rollout_log_probs = Listed[Optional[list[float]]]("f", _Stored.rollout_log_probs)
    weight_versions = Runs[Optional[list[int]]](_Stored.weight_versions)

    def __post_init__(self) -> None:
        for listed in NUMBERS.values():
            listed.check(self)

    def pack(self) -> None:
        """Keep the numbers as bytes from here on. Raises ValueError that names what cannot be."""
        for name, listed in NUMBERS.items():
            try:
                listed.pack(self)
            except ValueError as e:
                raise ValueError(f"{name} are {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """What is not left at its default, in types that JSON knows: the numbers as lists."""
        return msgspec.to_builtins(msgspec.structs.replace(self)._with_lists())      # type: ignore[no-any-return]

    def _with_lists(self) -> Sample:
        for name in NUMBERS:
            if hasattr(values := getattr(self, name), "tolist"):        # numpy's or torch's
                setattr(self, name, values.tolist())
        return self

    def get_reward_value(self, args: Any) -> float:
        """The reward as a number: itself, or the entry of its `reward_key`, else of `--reward-key`."""
        value = self.reward[self.reward_key or args.reward_key] if isinstance(self.reward, dict) else self.reward
        if value is None:
            raise ValueError(f"sample {self.index} has no reward yet")
        return float(value)

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return Sample.tokens.count(self)

    @property
    def prompt_length(self) -> int:
        return self.length - self.response_length

    @property
    def trained_length(self) -> int:
        """Tokens of the response that are trained on: all, or those that the loss mask lets through."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def whole_loss_mask(self) -> list[int]:
        """The loss mask [response_length], ones where there is none."""
        return [1] * self.response_length if self.loss_mask is None else self.loss_mask

    def __eq__(self, other: object) -> bool:
        return _Stored.__eq__(self._with_lists(), other._with_lists()) if isinstance(other, Sample) else NotImplemented

    def __repr__(self) -> str:
        return _Stored.__repr__(msgspec.structs.replace(self)._with_lists())


NUMBERS: dict[str, Listed[Any]] = {"tokens": Sample.tokens, "rollout_log_probs": Sample.rollout_log_probs, "weight_versions": Sample.weight_versions}
Group = list[Sample]
