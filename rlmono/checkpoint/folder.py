"""Folders that appear whole or not at all: written beside their place under another name, synced, and renamed once."""

from __future__ import annotations

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, Sequence

from rlmono.world.locks import InUse, hold

WRITTEN_BY_US = ("config.json", "manifest.json")
"""A folder with one of these is a model or a checkpoint, and may be overwritten where that is asked for."""


class FolderError(ValueError):
    """A folder that can't be the output; the message begins with its path."""


def check_output(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raises FolderError when `output` is one of the sources, or inside of one, or there already."""
    for source in sources:
        if output.resolve() == source.resolve() or source.resolve() in output.resolve().parents or output.resolve() in source.resolve().parents:
            raise FolderError(f"{output}: input and output must be apart, and the input is {source}; take another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FolderError(f"{output}: there already; remove it, take another folder, or give --overwrite")
    if not any((output / name).exists() for name in WRITTEN_BY_US):
        raise FolderError(f"{output}: neither a model nor a checkpoint, so --overwrite leaves it alone; take another folder")


def require_space(output: Path, needed: int) -> None:
    """Raises FolderError when the disk of `output` has less than `needed` bytes."""
    where = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(where).free
    if free < needed:
        raise FolderError(f"{output}: needs {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free there; free space, or take another disk")


def partial_of(output: Path) -> Path:
    """Where a folder is written until it is whole."""
    return output.with_name(output.name + ".partial")


@contextlib.contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """An empty folder to write into: it is synced and becomes `output` when the block ends well, and is removed when it raises.

    What an earlier, killed process left is removed first; what was at `output` is replaced. Raises FolderError when another process writes it.
    """
    output = output.resolve()
    partial = partial_of(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = hold(partial)
    except InUse:
        raise FolderError(f"{output}: another process is writing it") from None
    try:
        _empty(partial)
        yield partial
        _open_up(partial)
        sync_tree(partial)
        if output.exists():
            replaced = output.with_name(output.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(output, replaced)
            os.replace(partial, output)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _open_up(folder: Path) -> None:
    """Files are as readable as their folder; safetensors makes them their owner's alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & path.parent.stat().st_mode)


def sync_tree(folder: Path) -> None:
    """Everything under a folder, and the folder, on the disk."""
    paths = list(folder.rglob("*"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, (p for p in paths if p.is_file())))
    for path in (*(p for p in paths if p.is_dir()), folder):
        sync(path)


def sync(path: Path) -> None:
    """A file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
