"""`Prompt`: one row of prompt data, and `Rules`: what a row must have to be one, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import msgspec
import numpy as np

Messages = list[dict[str, Any]]


class DataError(ValueError):
    """The prompt data cannot be used; the message names the file, the line where there is one, and the remedy."""


class Prompt(msgspec.Struct, frozen=True):
    """One row. `prompt` is a string or OpenAI messages; `where` names the row as a person would look for it."""

    prompt: str | Messages
    label: Any = None
    metadata: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    where: str = ""


class RowFile(Protocol):
    """The rows of a file or folder, in blocks of neighbours. A row has a number of the file's own choosing (`id`), ascending in file order."""

    path: str
    names: Sequence[str]
    """Its columns; empty where each row has keys of its own."""
    nbytes: int
    """Size of what is read when all rows are."""
    blocks: int
    window_blocks: int
    """Blocks whose rows can be read in any order without reading any block twice."""

    def block(self, k: int) -> np.ndarray:
        """[n] int64, the ids of the rows of block k (0 ≤ k < blocks)."""

    def block_of(self, id: int) -> int:
        """The block that has this id."""

    def row(self, id: int) -> Any:
        """The row, read now. ValueError says what is wrong with it."""

    def where(self, id: int) -> str:
        """The row's name, found at once."""

    def locate(self, id: int) -> str:
        """The row's name for a person; may read the file up to there."""

    def bounds(self, rows: slice) -> tuple[int, int]:
        """(lo, hi): the slice's rows are those with lo ≤ id < hi. May read the file as far as the slice goes."""

    def whole(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        """(ids, numbers that `where` tells, digest of all bytes) of all rows; from now on every row is at hand."""

    def sampled_digest(self) -> bytes:
        """Of the size and of some bytes from all over."""


@dataclass(frozen=True)
class Rules:
    """Where a prompt's parts are in a row, and which prompts are wanted.

    With `label_required` a row must have a label, unless its metadata names a reward of its own (`check` judges those).
    With `length_limit`, a row for which `length_of(prompt)` (tokens) is above it is left out; a ValueError of `length_of`, or of
    `check(prompt)`, makes the row a bad one.
    """

    input_key: str = "input"
    label_key: Optional[str] = None
    metadata_key: str = "metadata"
    tool_key: Optional[str] = None
    label_required: bool = False
    skip_bad_rows: bool = False
    check: Optional[Callable[[Prompt], None]] = None
    length_limit: Optional[int] = None
    length_of: Optional[Callable[[Prompt], int]] = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a columnar file."""
        return tuple(key for key in (self.input_key, self.label_key, self.metadata_key, self.tool_key) if key is not None)

    @property
    def optional_keys(self) -> dict[str, str]:
        """Keys that somebody has named and that a row need not have, with their flags."""
        named = {self.label_key: "--label-key", self.tool_key: "--tool-key"}
        if self.metadata_key != Rules.metadata_key:
            named[self.metadata_key] = "--metadata-key"
        return {key: flag for key, flag in named.items() if key is not None}

    def prompt(self, row: Any, where: str, columns: Sequence[str] = ()) -> Prompt:
        """The row as a prompt; ValueError says what is wrong with it. `columns` there are, where a row has not all of them."""
        if not isinstance(row, dict):
            raise ValueError(f"must be a JSON object, not {kind(row)}")
        if self.input_key not in row:
            raise ValueError(f"has no {self.input_key!r} (--input-key); its keys are {', '.join(row) or 'none'}")
        metadata = _decoded(row.get(self.metadata_key), self.metadata_key, "--metadata-key")
        if not isinstance(metadata, (dict, type(None))):
            raise ValueError(f"{self.metadata_key!r} (--metadata-key) must be a JSON object, not {kind(metadata)}")
        label = row.get(self.label_key) if self.label_key is not None else None
        if self.label_required and not (metadata or {}).get("rm_type") and (label is None or label == "" or label == []):
            raise ValueError(f"has no label {self.label_key!r} (--label-key), and the reward needs one; its keys are {', '.join(columns or row)}")
        tools = _tools(row.get(self.tool_key), self.tool_key) if self.tool_key is not None else None
        return Prompt(_prompt(row[self.input_key], self.input_key), label, metadata or {}, tools, where)

    def too_long(self, prompt: Prompt) -> bool:
        """Whether the limit leaves the prompt out; ValueError for one that is no good."""
        if self.check is not None:
            self.check(prompt)
        return self.length_limit is not None and self.length_of is not None and self.length_of(prompt) > self.length_limit


def _prompt(value: Any, key: str) -> str | Messages:
    """A prompt, checked: a string that is not empty, or messages with a role and content each."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{key!r} is an empty string")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of messages, not {kind(value)}")
    if not value:
        raise ValueError(f"{key!r} is an empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{key}[{i}] must be a message with role and content, not {kind(message)}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{key}[{i}] has no role (a string); its keys are {', '.join(message) or 'none'}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{key}[{i}] ({message['role']}) has no content (a string); content is {kind(content)}")
    return value


def _tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    tools = _decoded(value, key, "--tool-key")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{key!r} (--tool-key) must be a list of objects, not {kind(tools)}")
    return tools or None


def _decoded(value: Any, key: str, flag: str) -> Any:
    """Objects and lists may come as text that holds them: columnar files store them so."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise ValueError(f"{key!r} ({flag}) is not JSON: {error}") from error


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
