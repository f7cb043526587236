"""Checkpoints on disk, as the controller sees them: which are whole, and how a new one becomes visible.

    <save>/rollout_0000007/     manifest.json   every other file's size and SHA-256
                                state.json      rollout, data cursor, what model it is
                                trainer/ rng/   written by the trainers

Every pool writes into `<save>/partial-…`; then the controller writes its state, syncs every file and folder, writes the
manifest and renames the folder once. A checkpoint without a manifest that fits is not there: it is refused by its path,
before anything in it is unpickled, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional

from rlmono.config.schema import Config

log = logging.getLogger(__name__)
_NAME = re.compile(r"rollout_(\d{7,})\Z")
MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message begins with its path."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and the controller's state in it."""

    folder: Path
    state: dict[str, Any]

    @property
    def rollout_id(self) -> int:
        return int(self.state["rollout_id"])


class CheckpointStore:
    """The save folder of a run. `attempt` names this attempt's unfinished folder, so that none is ever continued."""

    def __init__(self, config: Config, attempt: str):
        assert config.save is not None
        self.config, self.root, self.attempt = config, Path(config.save), attempt

    def due(self, rollout_id: int, num_rollout: int) -> bool:
        """Save after this rollout? Every --save-interval, and after the last."""
        every = self.config.save_interval
        return rollout_id + 1 == num_rollout or (every is not None and (rollout_id + 1) % every == 0)

    def partial(self, rollout_id: int) -> Path:
        """Where trainers write this rollout's checkpoint."""
        return self.root / f"partial-{rollout_id:07d}-{self.attempt}"

    def publish(self, rollout_id: int, data: Mapping[str, Any]) -> Path:
        """Make what the trainers wrote a checkpoint. Raises OSError when it can't be written; then nothing has changed."""
        partial, final = self.partial(rollout_id), self.root / f"rollout_{rollout_id:07d}"
        state = {"rollout_id": rollout_id, "model": dict(self.config.model), "data": dict(data)}
        _write(partial / STATE, json.dumps(state, indent=1))
        files = sorted(f for f in partial.rglob("*") if f.is_file())
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_sync, files))
            hashes = list(pool.map(_sha256, files))
        listed = {str(f.relative_to(partial)): {"size": f.stat().st_size, "sha256": h} for f, h in zip(files, hashes, strict=True)}
        _write(partial / MANIFEST, json.dumps({"version": 1, "files": listed}, indent=1))
        for folder in sorted({f.parent for f in files}) + [partial]:
            _sync(folder)
        if final.exists():              # the same rollout of an earlier attempt, which this one has superseded
            os.replace(final, self.root / f"superseded-{rollout_id:07d}-{self.attempt}")
        os.replace(partial, final)
        _sync(self.root)
        self._sweep()
        return final

    def prepare(self) -> None:
        """At start: the folder exists and can be written, and what earlier attempts left unfinished is removed."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{self.attempt}"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise CheckpointError(f"{self.root}: --save can't be written ({e.strerror})") from None
        self._sweep()

    def _sweep(self) -> None:
        for pattern in ("partial-*", "superseded-*"):
            for left in self.root.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)


def find_checkpoint(root: Path, model: Mapping[str, Any]) -> Optional[Checkpoint]:
    """The newest whole checkpoint under `root` (or `root` itself), or None where there is none at all.

    A torn or foreign one is reported and the one before it taken. Raises CheckpointError when there are some but none is whole.
    """
    if (root / MANIFEST).exists() or _NAME.match(root.name):
        return read_checkpoint(root, model)
    candidates = sorted((p for p in root.glob("rollout_*") if _NAME.match(p.name)), reverse=True) if root.is_dir() else []
    problems = []
    for folder in candidates:
        try:
            return read_checkpoint(folder, model)
        except CheckpointError as e:
            problems.append(str(e))
            log.warning("refused: %s", e)
    if problems:
        raise CheckpointError(f"{root}: no checkpoint here can be used:\n  " + "\n  ".join(problems))
    return None


def read_checkpoint(folder: Path, model: Mapping[str, Any]) -> Checkpoint:
    """Check a checkpoint's manifest (names, sizes, hashes) and its model. Raises CheckpointError that says what is wrong."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (int(about["size"]), str(about["sha256"])) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged") from None
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    if found != set(files):
        odd = sorted(found ^ set(files))[0]
        raise CheckpointError(f"{folder}: {odd} is {'missing' if odd in files else 'not in the manifest'}")
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda item: _problem(folder, *item), files.items()):
            if problem:
                raise CheckpointError(f"{folder}: {problem}")
    state = json.loads((folder / STATE).read_text())
    differing = [k for k in set(state["model"]) | set(model) if state["model"].get(k) != model.get(k)]
    if differing:
        k = sorted(differing)[0]
        raise CheckpointError(f"{folder}: a checkpoint of another model: {k} is {state['model'].get(k)!r} there and {model.get(k)!r} here")
    return Checkpoint(folder, state)


def _problem(folder: Path, name: str, about: tuple[int, str]) -> Optional[str]:
    size, sha256 = about
    path = folder / name
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, not {size}: torn"
    return None if _sha256(path) == sha256 else f"{name} has changed since it was written (SHA-256)"


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
