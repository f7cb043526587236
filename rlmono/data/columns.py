"""Columnar files: parquet, and arrow as Hugging Face's `save_to_disk` writes it. A row's id is its number, from 0 over all files.

A parquet file is decoded a row group at a time; arrow files are mapped, and nothing of them is copied.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlmono.data.jsonl import WINDOW_BYTES, sampled_digest
from rlmono.data.rows import DataError

Block = dict[str, pa.Array]
"""The wanted columns of a block's rows."""


class Columns:
    """A `RowFile` over several files; a subclass fills it and decodes blocks. `columns` are the ones that are wanted, as far as there are."""

    def __init__(self, path: str, files: Sequence[Path], columns: Sequence[str]) -> None:
        self.path, self.files, self._wanted = path, list(files), columns
        self.names: Sequence[str] = []
        self._first = [0]
        self._sizes: list[int] = []
        self._decoded: OrderedDict[int, Block] = OrderedDict()
        for file in self.files:
            try:
                self._open(file)
            except DataError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:       # ValueError: an empty file can't be mapped
                raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
        if columns[0] not in self.names:
            raise DataError(f"{path}: has no column {columns[0]!r} (--input-key); its columns are {', '.join(self.names) or 'none'}")
        self.blocks, self.nbytes = len(self._sizes), sum(self._sizes)
        self.window_blocks = max(1, WINDOW_BYTES // max(self._sizes, default=1))
        self._starts = np.array(self._first, np.int64)

    def _open(self, file: Path) -> None:
        """Know the file's columns and blocks (`_add`)."""
        raise NotImplementedError

    def _decode(self, k: int) -> Block:
        raise NotImplementedError

    def _add(self, rows: int, nbytes: int) -> None:
        self._first.append(self._first[-1] + rows)
        self._sizes.append(max(nbytes, 1))

    def _columns(self, names: Sequence[str], file: Path) -> list[str]:
        """The wanted columns; all files must have the same."""
        if self.names and list(names) != self.names:
            raise DataError(f"{file}: its columns are {', '.join(names)}, but those of {self.files[0].name} are {', '.join(self.names)}")
        self.names = list(names)
        return [name for name in dict.fromkeys(self._wanted) if name in names]

    def block(self, k: int) -> np.ndarray:
        return np.arange(self._first[k], self._first[k + 1], dtype=np.int64)

    def block_of(self, id: int) -> int:
        return int(self._starts.searchsorted(id, "right")) - 1

    def row(self, id: int) -> Any:
        k = self.block_of(id)
        block = self._decoded.get(k)
        if block is None:
            try:
                block = self._decoded[k] = self._decode(k)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"cannot be read: {str(error).splitlines()[0]}") from error
            while len(self._decoded) > self.window_blocks:
                self._decoded.popitem(last=False)
        return {name: _without_nulls(column[id - self._first[k]].as_py()) for name, column in block.items()}

    def where(self, id: int) -> str:
        return f"{self.path}[{id}]"

    locate = where

    def bounds(self, rows: slice) -> tuple[int, int]:
        start, stop, _ = rows.indices(self._first[-1])
        return start, stop

    def whole(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        self.window_blocks = self.blocks
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(file.read_bytes())
        ids = np.arange(self._first[-1], dtype=np.int64)
        return ids, ids, digest.digest()

    def sampled_digest(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            digest.update(sampled_digest(descriptor, os.fstat(descriptor).st_size))
            os.close(descriptor)
        return digest.digest()


class Parquet(Columns):
    """Parquet files; a block is a row group."""

    def __init__(self, path: str, files: Sequence[Path], columns: Sequence[str]) -> None:
        self._groups: list[tuple[pq.FileMetaData, Path, int, list[str]]] = []
        super().__init__(path, files, columns)

    def _open(self, file: Path) -> None:
        opened = pq.ParquetFile(file)
        wanted = self._columns(opened.schema_arrow.names, file)
        for i in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(i)
            chunks = [group.column(c) for c in range(group.num_columns)]
            self._add(group.num_rows, sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted))
            self._groups.append((opened.metadata, file, i, wanted))

    def _decode(self, k: int) -> Block:
        metadata, file, i, wanted = self._groups[k]
        with pq.ParquetFile(file, metadata=metadata) as opened:     # with many groups, reading the footer takes longer than a group
            table = opened.read_row_group(i, columns=wanted)
        return {name: table[name].combine_chunks() for name in table.schema.names}


class Arrow(Columns):
    """Arrow files, of the stream format (as `datasets` writes them) or the file format; a block is a record batch."""

    def __init__(self, path: str, files: Sequence[Path], columns: Sequence[str]) -> None:
        self._batches: list[pa.RecordBatch] = []
        super().__init__(path, files, columns)

    def _open(self, file: Path) -> None:
        with file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        pages.madvise(mmap.MADV_RANDOM)     # no reading ahead: only the heads of the batches are looked at here
        mapped = pa.py_buffer(pages)        # pa.memory_map would ask the kernel for the whole of every batch
        try:
            reader = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
        wanted = self._columns(reader.schema.names, file)
        batches = reader if isinstance(reader, pa.ipc.RecordBatchStreamReader) else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            self._add(batch.num_rows, batch.get_total_buffer_size())
            self._batches.append(batch.select(wanted))

    def _decode(self, k: int) -> Block:
        return {name: self._batches[k][name] for name in self._batches[k].schema.names}


def open_folder(path: str, columns: Sequence[str]) -> Columns:
    """A folder of `save_to_disk`, or of parquet files. DataError says what it is otherwise."""
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise DataError(f"{path}: holds several splits; name one: {', '.join(str(folder / split) for split in splits)}")
    if arrow := _arrow_files(folder):
        return Arrow(path, arrow, columns)
    if parquet := sorted(folder.glob("*.parquet")):
        return Parquet(path, parquet, columns)
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise DataError(f"{path}: a folder of prompts has *.arrow files (datasets' save_to_disk) or *.parquet; in this one is {inside}")


def _arrow_files(folder: Path) -> list[Path]:
    """In the order of `state.json`, where `datasets` has written one."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise DataError(f"{folder}: was saved with a selection beside its rows; save it again after flatten_indices()")
        files = [folder / about["filename"] for about in state["_data_files"]]
    except FileNotFoundError:
        return sorted(folder.glob("*.arrow"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'}: damaged; save the dataset again") from error
    return files


def _without_nulls(value: Any) -> Any:
    """Columns fill what an object lacks with null, which a chat template would take for a value."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
