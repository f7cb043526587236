"""What a reward pool and its workers say to each other: msgpack messages, each after its length in 4 bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from rlmono.data.sample import Sample

LENGTH = struct.Struct("<I")


class Setup(msgspec.Struct, array_like=True):
    """The pool's first message."""

    args: dict[str, Any]
    paths: list[str]
    """Functions to load before the first sample."""
    parent: int = 0
    """Process id; a worker never outlives it."""
    memory_limit_bytes: int | None = None
    concurrent: bool | None = None
    """Whether the worker is for async functions. None: for those of `paths`, whichever they are."""


class Ready(msgspec.Struct, array_like=True):
    """The worker's answer to Setup. `problem` is set when a function cannot be loaded; the worker ends then."""

    concurrent: bool = False
    """The function is async, so samples are worked on at the same time; else one after the other."""
    problem: str | None = None


class Task(msgspec.Struct, array_like=True):
    """A call of the function at `path`: with the one sample, or with `group`, the list of all."""

    id: int
    path: str
    samples: list[Sample]
    group: bool = False
    boxed: bool = False
    """The function gets the responses' boxes instead of the responses."""
    key: str | None = None
    """Where the number is when the function returns a dict."""


ELSEWHERE = "elsewhere"
"""The remark of an Outcome which says that the function is async, so it belongs to another worker."""


OUT_OF_MEMORY = "reward_out_of_memory"
"""The remark of an Outcome after which its worker is replaced: the memory may be kept for good."""


class Outcome(msgspec.Struct, array_like=True):
    """A worker's result of a Task: a value for each sample, None where there is none because of `remark`."""

    id: int
    values: list[None | float | dict[str, Any]] = []
    remark: str | None = None
    where: str = ""
    """Tells errors apart: exception type and line."""
    detail: str = ""
    """For the log: a traceback, or one sentence."""
    seconds: float = 0.0
    """What it took, where a worker takes one after the other."""


def frame(message: msgspec.Struct) -> bytearray:
    """A message with its length before it."""
    buffer = bytearray(LENGTH.size)
    _encoder.encode_into(message, buffer, LENGTH.size)
    LENGTH.pack_into(buffer, 0, len(buffer) - LENGTH.size)
    return buffer


def _plain(value: Any) -> Any:
    """Values that msgpack does not know: mappings and numpy scalars as what they stand for, anything else as text."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return str(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
