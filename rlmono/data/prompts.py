"""`PromptSource`: the rows of a jsonl prompt file, checked once at load and parsed again only when asked for.

What stays in memory is 20 bytes a row: where its line starts, how long it is, and its number.
"""

from __future__ import annotations

import array
import hashlib
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

logger = logging.getLogger(__name__)

LISTED_ROWS = 10
"""Bad rows that are written out when they are skipped."""

Messages = list[dict[str, Any]]


class DataError(ValueError):
    """The prompt data cannot be used; the message names the file, the line where there is one, and the remedy."""


class Prompt(msgspec.Struct, frozen=True):
    """One row. `prompt` is a string or OpenAI messages; `line` counts from 1 in the file."""

    prompt: str | Messages
    label: Any = None
    metadata: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    line: int = 0


class PromptSource:
    """The prompts of `path`, or of `path@[start:end]` (a Python slice of its non-empty lines).

    All rows are checked here, so that a bad one stops a run before it begins: DataError with file:line, or, with
    `skip_bad_rows`, a warning that counts them. With `length_limit`, rows for which `length_of(prompt)` (tokens) is
    above it are dropped and counted; a ValueError of `length_of` makes the row a bad one.
    """

    def __init__(self, path: str, *, input_key: str = "input", label_key: str | None = None, metadata_key: str = "metadata",
                 tool_key: str | None = None, label_required: bool = False, skip_bad_rows: bool = False,
                 length_limit: int | None = None, length_of: Callable[[Prompt], int] | None = None) -> None:
        if label_required and label_key is None:
            raise DataError(f"{path}: the reward needs a label; name its key with --label-key")
        self.spec = path
        self.path, rows = split_slice(path)
        self._input_key, self._label_key, self._metadata_key, self._tool_key = input_key, label_key, metadata_key, tool_key
        self._label_required = label_required
        self._descriptor = _open(self.path, path)
        weakref.finalize(self, os.close, self._descriptor)
        starts, sizes, numbers, self._digest = _index(self.path)
        if not len(starts):
            raise DataError(f"{self.path}: the prompt file is empty")
        self._starts, self._sizes, self._numbers = starts[rows], sizes[rows], numbers[rows]
        if not len(self._starts):
            raise DataError(f"{path}: the slice selects none of the {len(starts)} rows")
        self.bad_rows: list[str] = []
        """What is wrong with each skipped row, as `file:line: problem`."""
        self.too_long = 0
        """Rows dropped for `length_limit`."""
        self._keep(np.fromiter(self._check(skip_bad_rows, length_limit, length_of), dtype=np.bool_, count=len(self._starts)), length_limit)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, i: int) -> Prompt:
        """Row `i` (0 ≤ i < len), read from the file now; DataError when it has been changed since."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.spec}: row {i} of {len(self)}")
        line = int(self._numbers[i])
        data = os.pread(self._descriptor, int(self._sizes[i]), int(self._starts[i]))
        try:
            return self._parse(data, line)
        except ValueError as error:
            raise DataError(f"{self.path}:{line}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """Name, rows and a fingerprint of content and selection: equal exactly when row i is the same row for every i."""
        fingerprint = hashlib.blake2b(self._digest + np.ascontiguousarray(self._numbers).tobytes(), digest_size=16)
        return {"name": os.path.basename(self.path), "rows": len(self), "fingerprint": fingerprint.hexdigest()}

    def _check(self, skip_bad_rows: bool, limit: int | None, length_of: Callable[[Prompt], int] | None) -> Iterator[bool]:
        """Whether to keep each row, in order; collects `bad_rows` and `too_long`."""
        for i in range(len(self._starts)):
            try:
                prompt = self.row(i)
                length = length_of(prompt) if limit is not None and length_of is not None else 0
            except ValueError as error:
                problem = str(error) if isinstance(error, DataError) else f"{self.path}:{self._numbers[i]}: {error}"
                if not skip_bad_rows:
                    raise DataError(f"{problem} (correct the line, or leave such lines out with --skip-bad-rows)") from error
                self.bad_rows.append(problem)
                yield False
                continue
            too_long = limit is not None and length > limit
            self.too_long += too_long
            yield not too_long

    def _keep(self, kept: np.ndarray, limit: int | None) -> None:
        total = len(kept)
        if self.bad_rows:
            more = [f"and {len(self.bad_rows) - LISTED_ROWS} more"] if len(self.bad_rows) > LISTED_ROWS else []
            logger.warning("%s: %d of %d rows are bad and left out:\n  %s", self.spec, len(self.bad_rows), total,
                           "\n  ".join([*self.bad_rows[:LISTED_ROWS], *more]))
        if self.too_long:
            logger.warning("%s: %d of %d prompts have more than %s tokens and are left out", self.spec, self.too_long, total, limit)
        if not kept.any():
            raise DataError(f"{self.spec}: none of {total} rows is left: {len(self.bad_rows)} are bad, {self.too_long} have more than "
                            f"--rollout-max-prompt-len ({limit}) tokens" + "".join(f"\n  {row}" for row in self.bad_rows[:LISTED_ROWS]))
        self._starts, self._sizes, self._numbers = self._starts[kept], self._sizes[kept], self._numbers[kept]

    def _parse(self, data: bytes, line: int) -> Prompt:
        """A row from its line; ValueError says what is wrong with it."""
        try:
            row = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a line of JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"must be a JSON object, not {_kind(row)}")
        if self._input_key not in row:
            raise ValueError(f"has no {self._input_key!r} (--input-key); its keys are {', '.join(row) or 'none'}")
        label = row.get(self._label_key) if self._label_key is not None else None
        if self._label_required and (label is None or label == "" or label == []):
            raise ValueError(f"has no label {self._label_key!r} (--label-key), and the reward needs one; its keys are {', '.join(row)}")
        metadata = row.get(self._metadata_key)
        if not isinstance(metadata, (dict, type(None))):
            raise ValueError(f"{self._metadata_key!r} (--metadata-key) must be a JSON object, not {_kind(metadata)}")
        tools = _tools(row.get(self._tool_key), self._tool_key) if self._tool_key is not None else None
        return Prompt(_prompt(row[self._input_key], self._input_key), label, metadata or {}, tools, line)


def split_slice(spec: str) -> tuple[str, slice]:
    """`path@[start:end]` as path and slice; a path without one takes all rows."""
    found = re.fullmatch(r"(.+)@\[(-?\d*):(-?\d*)\]", spec)
    if found is None:
        return spec, slice(None)
    try:
        start, end = (int(text) if text else None for text in found.groups()[1:])
    except ValueError as error:
        raise DataError(f"{spec}: a slice is path@[start:end], with whole numbers or nothing") from error
    return found.group(1), slice(start, end)


def _open(path: str, spec: str) -> int:
    if path.endswith(".parquet"):
        raise DataError(f"{path}: parquet is not read yet; write it as jsonl, one JSON object a line")
    if not os.path.isfile(path):
        about = "is not a file" if os.path.exists(path) else "does not exist"
        hint = "; a slice is written path@[start:end]" if "@" in os.path.basename(spec) else ""
        raise DataError(f"{Path(path).absolute()}: the prompt file {about}{hint}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: the prompt file cannot be read: {error.strerror}") from error


def _index(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes]:
    """Byte offset (int64), size (int64) and number (int32) of every line that is not empty, and a digest of the file."""
    starts, sizes, numbers, offset, digest = array.array("q"), array.array("q"), array.array("i"), 0, hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            skipped = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0     # a byte-order mark is no JSON
            if line[skipped:].strip():
                starts.append(offset + skipped)
                sizes.append(len(line) - skipped)
                numbers.append(number)
            offset += len(line)
            digest.update(line)
    return np.array(starts, np.int64), np.array(sizes, np.int64), np.array(numbers, np.int32), digest.digest()


def _prompt(value: Any, key: str) -> str | Messages:
    """A prompt, checked: a string that is not empty, or messages with a role and content each."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{key!r} is an empty string")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of messages, not {_kind(value)}")
    if not value:
        raise ValueError(f"{key!r} is an empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{key}[{i}] must be a message with role and content, not {_kind(message)}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{key}[{i}] has no role (a string); its keys are {', '.join(message) or 'none'}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{key}[{i}] ({message['role']}) has no content (a string); content is {_kind(content)}")
    return value


def _tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    """Tools as a list of objects, or as a string that holds such a list (columnar formats store them so)."""
    try:
        tools = msgspec.json.decode(value) if isinstance(value, str) else value
    except msgspec.DecodeError as error:
        raise ValueError(f"{key!r} (--tool-key) is not JSON: {error}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{key!r} (--tool-key) must be a list of objects, not {_kind(tools)}")
    return tools or None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
