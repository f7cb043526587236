"""jsonl: one JSON object a line. A row's id is the byte at which its line begins, so that any part of a file can be read alone."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from rlmono.data.rows import DataError

BLOCK_BYTES = 2**20
WINDOW_BYTES = 128 * 2**20
SAMPLES, SAMPLE_BYTES = 64, 2**16
"""Of a large file's fingerprint."""
_MARK = b"\xef\xbb\xbf"                 # a byte-order mark is no JSON
_BLANK = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)


class JsonLines:
    """A `RowFile`. Block k has the lines that begin in its `BLOCK_BYTES` bytes; lines of white space are no rows."""

    names: Sequence[str] = ()
    window_blocks = WINDOW_BYTES // BLOCK_BYTES

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: the prompt file cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.nbytes = os.fstat(self._descriptor).st_size
        self.blocks = -(-self.nbytes // BLOCK_BYTES)
        self._lines: tuple[np.ndarray, np.ndarray] | None = None

    def block(self, k: int) -> np.ndarray:
        begins, rows = self._begins(k)
        return begins[rows]

    def block_of(self, id: int) -> int:
        return id // BLOCK_BYTES

    def _begins(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the lines of block k begin (int64), and which of them are rows (bool)."""
        start = k * BLOCK_BYTES
        data = os.pread(self._descriptor, BLOCK_BYTES + 1, start - 1) if k else b"\n" + os.pread(self._descriptor, BLOCK_BYTES, 0)
        text = np.frombuffer(data, np.uint8)
        at = np.flatnonzero(text[:-1] == 10) + 1            # in `data`; what begins after its last byte is the next block's
        rows = np.ones(len(at), np.bool_)
        for i in np.flatnonzero(np.isin(text[at], _BLANK)).tolist():
            rows[i] = not self._is_blank(data, int(at[i]), start)
        begins = at + (start - 1)
        if k == 0 and data.startswith(_MARK, 1):
            begins[0] += len(_MARK)
            rows[0] = bool(self._line(len(_MARK)).strip())
        return begins, rows

    def _is_blank(self, data: bytes, at: int, start: int) -> bool:
        end = data.find(b"\n", at)
        return not (data[at:end] if end >= 0 else self._line(start - 1 + at)).strip()

    def _line(self, begin: int) -> bytes:
        size = 2**13
        while True:
            data = os.pread(self._descriptor, size, begin)
            end = data.find(b"\n")
            if end >= 0 or len(data) < size:
                return data[:end] if end >= 0 else data
            size *= 8

    def row(self, id: int) -> Any:
        try:
            return msgspec.json.decode(self._line(id))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a line of JSON: {error}") from error

    def where(self, id: int) -> str:
        if self._lines is None:
            return f"{self.path} at byte {id}"
        ids, lines = self._lines
        return f"{self.path}:{lines[ids.searchsorted(id)]}"

    def locate(self, id: int) -> str:
        if self._lines is not None:
            return self.where(id)
        line = 1
        for start in range(0, id, 2**24):
            line += os.pread(self._descriptor, min(2**24, id - start), start).count(b"\n")
        return f"{self.path}:{line}"

    def bounds(self, rows: slice) -> tuple[int, int]:
        start, stop = rows.start, rows.stop
        if (start or 0) < 0 or (stop or 0) < 0:             # counted from the end
            start, stop, _ = rows.indices(sum(len(self.block(k)) for k in range(self.blocks)))
        lo, hi = 0 if not start else self.nbytes, self.nbytes
        seen, wanted = 0, [n for n in (start, stop) if n]
        for k in range(self.blocks if wanted else 0):
            ids = self.block(k)
            if start and seen <= start < seen + len(ids):
                lo = int(ids[start - seen])
            if stop is not None and seen <= stop < seen + len(ids):
                hi = int(ids[stop - seen])
            seen += len(ids)
            if seen > max(wanted):
                break
        return lo, 0 if stop == 0 else hi

    def whole(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        digest, ids, numbers, lines = hashlib.blake2b(digest_size=16), [], [], 0
        for k in range(self.blocks):
            begins, rows = self._begins(k)
            ids.append(begins[rows])
            numbers.append((np.arange(len(begins), dtype=np.int32) + (lines + 1))[rows].astype(np.int32))
            lines += len(begins)
            digest.update(os.pread(self._descriptor, BLOCK_BYTES, k * BLOCK_BYTES))
        every, lines_of = (np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in (ids, numbers))
        self._lines = every, lines_of
        return every, lines_of, digest.digest()

    def sampled_digest(self) -> bytes:
        return sampled_digest(self._descriptor, self.nbytes)


def sampled_digest(descriptor: int, nbytes: int) -> bytes:
    """Of a file's size and of SAMPLES pieces of it, the first and the last among them."""
    digest = hashlib.blake2b(str(nbytes).encode(), digest_size=16)
    for start in np.linspace(0, max(nbytes - SAMPLE_BYTES, 0), SAMPLES).astype(np.int64).tolist():
        digest.update(os.pread(descriptor, SAMPLE_BYTES, start))
    return digest.digest()
