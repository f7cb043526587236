"""Where prompts come from: `PromptSource` has every row checked and at hand, `LazySource` reads a file of any size as it goes.

    source = open_source("math.jsonl@[:1000]", Rules(label_key="label"))
    for row in source.window(0, seed=None): source.row(row)

A source is a sequence of windows, and a window a sequence of rows; `cursor.py` walks through them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np

from rlmono.data.jsonl import JsonLines
from rlmono.data.rows import DataError, Prompt, RowFile, Rules

logger = logging.getLogger(__name__)

LAZY_ABOVE_BYTES = 128 * 10**6
LISTED_ROWS = 10
"""Bad rows that are written out when they are skipped."""
FIRST_ROWS = 1000
"""Rows of a large file that are checked at start."""
BAD_ROW, TOO_LONG = "bad_row", "too_long"


class Source(Protocol):
    """What a cursor walks through. A row is whatever `window` gives."""

    spec: str
    windows: int

    def __len__(self) -> int: ...
    def window(self, k: int, seed: Optional[int]) -> np.ndarray: ...
    def row(self, row: Any) -> Prompt: ...
    def refusal(self, row: Any) -> Optional[str]: ...
    def identity(self) -> dict[str, Any]: ...


def open_source(spec: str, rules: Rules, lazy_above: int = LAZY_ABOVE_BYTES) -> Source:
    """The prompts of `path`, or of `path@[start:end]` (a Python slice of its rows): jsonl, parquet, or a folder of arrow or parquet files.

    Above `lazy_above` bytes they are read as they are needed. DataError when there is something wrong with what is read now.
    """
    if rules.label_required and rules.label_key is None:
        raise DataError(f"{spec}: the reward needs a label; name its key with --label-key")
    path, rows = split_slice(spec)
    file = _open(path, spec, rules)
    return LazySource(spec, file, rows, rules) if file.nbytes > lazy_above else PromptSource(spec, file, rows, rules)


class _Rows:
    """The rows of a file, read by its rules."""

    def __init__(self, spec: str, file: RowFile, rules: Rules) -> None:
        self.spec, self.file, self.rules = spec, file, rules
        self.bad_rows: list[str] = []
        """What is wrong with each of the first skipped rows, as `file:line: problem`."""
        self.bad = 0
        self.too_long = 0
        """Rows left out for `length_limit`."""
        self._unseen = rules.optional_keys

    def _read(self, id: int) -> Prompt:
        try:
            row = self.file.row(id)
            if self._unseen and isinstance(row, dict):
                self._unseen = {key: flag for key, flag in self._unseen.items() if key not in row}
            return self.rules.prompt(row, self.file.where(id), self.file.names)
        except ValueError as error:
            raise DataError(f"{self.file.locate(id)}: {error}") from error

    def _refusal(self, id: int) -> Optional[str]:
        """Why a row is left out, counted; DataError for a bad one without `skip_bad_rows`."""
        try:
            too_long = self._is_too_long(id)
        except DataError as error:
            if not self.rules.skip_bad_rows:
                raise DataError(f"{error} (correct the line, or leave such lines out with --skip-bad-rows)") from error
            self.bad += 1
            if self.bad <= LISTED_ROWS:
                self.bad_rows.append(str(error))
            return BAD_ROW
        self.too_long += too_long
        return TOO_LONG if too_long else None

    def _warn_of_keys(self, rows: str) -> None:
        """A key that no row has is likely misspelt; of several files, one may go without."""
        for key, flag in self._unseen.items():
            logger.warning("%s: %s has %r (%s): there is nothing to read by it", self.spec, rows, key, flag)

    def _is_too_long(self, id: int) -> bool:
        prompt = self._read(id)
        try:
            return self.rules.too_long(prompt)
        except ValueError as error:
            raise DataError(f"{self.file.locate(id)}: {error}") from error


class PromptSource(_Rows):
    """A file whose rows are all checked here, so that a bad one stops a run before it begins: DataError with file and line, or, with
    `skip_bad_rows`, a warning that counts them. Rows are numbered from 0, without those that are left out. One window.
    """

    windows = 1

    def __init__(self, spec: str, file: RowFile, rows: slice, rules: Rules) -> None:
        super().__init__(spec, file, rules)
        ids, numbers, self._digest = file.whole()
        if not len(ids):
            raise DataError(f"{file.path}: the prompt file is empty")
        self._ids, self._numbers = ids[rows], numbers[rows]
        if not len(self._ids):
            raise DataError(f"{spec}: the slice selects none of the {len(ids)} rows")
        self._keep(np.array([self._refusal(id) is None for id in self._ids.tolist()], np.bool_))

    def __len__(self) -> int:
        return len(self._ids)

    def window(self, k: int, seed: Optional[int]) -> np.ndarray:
        """All rows, in file order or in the seed's permutation."""
        return np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))

    def row(self, i: int) -> Prompt:
        """Row `i` (0 ≤ i < len), read from the file now; DataError when it has been changed since."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.spec}: row {i} of {len(self)}")
        return self._read(int(self._ids[i]))

    def refusal(self, i: int) -> Optional[str]:
        """None: what can't be used was left out at start."""
        return None

    def identity(self) -> dict[str, Any]:
        """Name, rows and a fingerprint of content and selection: equal exactly when row i is the same row for every i."""
        fingerprint = hashlib.blake2b(self._digest + np.ascontiguousarray(self._numbers).tobytes(), digest_size=16)
        return {"name": _name(self.file), "rows": len(self), "fingerprint": fingerprint.hexdigest()}

    def _keep(self, kept: np.ndarray) -> None:
        total, limit = len(kept), self.rules.length_limit
        if self.bad_rows:
            more = [f"and {self.bad - LISTED_ROWS} more"] if self.bad > LISTED_ROWS else []
            logger.warning("%s: %d of %d rows are bad and left out:\n  %s", self.spec, self.bad, total, "\n  ".join([*self.bad_rows, *more]))
        self._warn_of_keys(f"none of its {total} rows")
        if self.too_long:
            logger.warning("%s: %d of %d prompts have more than %s tokens and are left out", self.spec, self.too_long, total, limit)
        if not kept.any():
            raise DataError(f"{self.spec}: none of {total} rows is left: {self.bad} are bad, {self.too_long} have more than "
                            f"--rollout-max-prompt-len ({limit}) tokens" + "".join(f"\n  {row}" for row in self.bad_rows))
        self._ids, self._numbers = self._ids[kept], self._numbers[kept]


class LazySource(_Rows):
    """A file of any size: its blocks are permuted, so many neighbours in that order make a window, and the rows of a window are permuted.

    At start only the first rows are checked, and every row when its turn comes. A row is its id in the file.
    """

    def __init__(self, spec: str, file: RowFile, rows: slice, rules: Rules) -> None:
        super().__init__(spec, file, rules)
        self._slice, (self._lo, self._hi), self._digest = rows, file.bounds(rows), file.sampled_digest()
        self._blocks = range(file.block_of(self._lo), file.block_of(self._hi - 1) + 1) if self._lo < self._hi else range(0)
        self.windows = -(-len(self._blocks) // file.window_blocks)
        self._order: tuple[Optional[int], np.ndarray] = (None, np.array(self._blocks))
        first = list(itertools.islice((id for k in self._blocks for id in self._block(k).tolist()), FIRST_ROWS))
        if not first:
            raise DataError(f"{spec}: the prompt file is empty, or the slice selects none of its rows")
        if all([self.refusal(id) for id in first]):
            raise DataError(f"{spec}: none of the first {len(first)} rows can be used: {self.bad} are bad, {self.too_long} have more than "
                            f"--rollout-max-prompt-len ({rules.length_limit}) tokens" + "".join(f"\n  {row}" for row in self.bad_rows))
        self._warn_of_keys(f"none of its first {len(first)} rows")

    def __len__(self) -> int:
        """Rows before any is left out. Reads all of a jsonl file."""
        return self._rows

    @functools.cached_property
    def _rows(self) -> int:
        logger.info("%s: counting the rows of %.1f GB", self.spec, self.file.nbytes / 1e9)
        return sum(len(self._block(k)) for k in self._blocks)

    def _block(self, k: int) -> np.ndarray:
        ids = self.file.block(k)
        return ids[(ids >= self._lo) & (ids < self._hi)]

    def window(self, k: int, seed: Optional[int]) -> np.ndarray:
        """The rows of window k (0 ≤ k < windows), in file order or as the seed has them; it can be empty."""
        if self._order[0] != seed:
            blocks = np.array(self._blocks)
            self._order = (seed, np.random.default_rng(seed).permutation(blocks) if seed is not None else blocks)
        size = self.file.window_blocks
        ids = np.concatenate([self._block(b) for b in self._order[1][k * size:(k + 1) * size].tolist()])
        return ids if seed is None else np.random.default_rng((seed, k)).permutation(ids)

    def row(self, id: int) -> Prompt:
        """The row, read from the file now."""
        return self._read(int(id))

    def refusal(self, id: int) -> Optional[str]:
        """Why the row is left out, BAD_ROW or TOO_LONG; the first bad ones are told. DataError for a bad one without `skip_bad_rows`."""
        told = len(self.bad_rows)
        reason = self._refusal(int(id))
        for problem in self.bad_rows[told:]:
            logger.warning("left out: %s%s", problem, "; from here on bad rows are only counted" if len(self.bad_rows) == LISTED_ROWS else "")
        return reason

    def identity(self) -> dict[str, Any]:
        """Name, size and a fingerprint of the size, of pieces from all over the file, and of the selection."""
        selection = f"{self._slice.start}:{self._slice.stop} {self.rules.length_limit}".encode()
        fingerprint = hashlib.blake2b(self._digest + selection, digest_size=16)
        return {"name": _name(self.file), "bytes": self.file.nbytes, "fingerprint": fingerprint.hexdigest()}

def _name(file: RowFile) -> str:
    return os.path.basename(file.path.rstrip("/"))


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


def _open(path: str, spec: str, rules: Rules) -> RowFile:
    if os.path.isdir(path):
        from rlmono.data.columns import open_folder  # pyarrow
        return open_folder(path, rules.columns)
    if not os.path.isfile(path):
        about = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        hint = "; a slice is written path@[start:end]" if "@" in os.path.basename(spec) else ""
        raise DataError(f"{Path(path).absolute()}: the prompt file {about}{hint}")
    if path.endswith((".parquet", ".arrow")):
        from rlmono.data.columns import Arrow, Parquet
        return (Parquet if path.endswith(".parquet") else Arrow)(path, [Path(path)], rules.columns)
    return JsonLines(path)
