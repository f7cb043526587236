"""Checkpoints on disk, as the controller sees them: which are whole, and how a new one becomes visible.

    <save>/rollout_0000007/     manifest.json   every other file's size and SHA-256
                                state.json      rollout, data cursor, what model it is
                                trainer/ rng/   written by the trainers

Every pool writes into `<save>/partial-…`; then the controller writes its state, syncs every file and folder, writes the
manifest and renames the folder once. A checkpoint without a manifest that fits is not there: it is refused by its path,
before anything in it is unpickled, and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, NoReturn, Optional

from rlmono.checkpoint.folder import sync
from rlmono.config.names import FREE_SHAPE
from rlmono.config.schema import Config
from rlmono.world.locks import InUse, hold

log = logging.getLogger(__name__)
_NAME = re.compile(r"rollout_(\d{7,})\Z")
MANIFEST, STATE, VERSION = "manifest.json", "state.json", 1


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message begins with its path."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the controller's state in it, and what is wrong with the newer ones."""

    folder: Path
    state: dict[str, Any]
    refused: tuple[str, ...] = ()

    @property
    def rollout_id(self) -> int:
        return int(self.state["rollout_id"])

    @property
    def weights_only(self) -> bool:
        """A conversion has written it, not a run: it has no optimizer, schedule or place in the data."""
        return bool(self.state.get("weights_only"))


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

    def publish(self, rollout_id: int, data: Mapping[str, Any], files: Optional[Mapping[str, bytes]] = None) -> Path:
        """Make what the trainers wrote, and these files of the controller's, a checkpoint. Raises OSError that names the folder when it can't be
        written; then nothing has changed."""
        try:
            return self._publish(rollout_id, data, files or {})
        except OSError as e:
            fail(self.partial(rollout_id), e)

    def _publish(self, rollout_id: int, data: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
        partial, final = self.partial(rollout_id), self.root / f"rollout_{rollout_id:07d}"
        for name, content in files.items():
            (partial / name).write_bytes(content)
        seal(partial, {"rollout_id": rollout_id, "model": dict(self.config.model), "data": dict(data)})
        if final.exists():              # the same rollout of an earlier attempt, which this one has superseded
            os.replace(final, self.root / f"superseded-{rollout_id:07d}-{self.attempt}")
        os.replace(partial, final)
        sync(self.root)
        self._sweep()
        return final

    def prepare(self) -> None:
        """At start: the folder exists, can be written and is this run's alone, and what earlier attempts left unfinished is removed.

        Raises CheckpointError.
        """
        if (self.root / MANIFEST).exists():
            raise CheckpointError(f"{self.root}: --save is itself a checkpoint; take another folder, and give this one as --load or --ref-load")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            hold(self.root / ".lock")
            self._sweep()               # first: it can be what filled the disk
            probe = self.root / f".probe-{self.attempt}"
            probe.write_text("rlmono")
            probe.unlink()
        except InUse:
            raise CheckpointError(f"{self.root}: --save is in use by a run that is alive; end it, or take another folder") from None
        except OSError as e:
            raise CheckpointError(f"{self.root}: --save can't be written ({e.strerror})") from None

    def refuse_other_runs(self, start: int) -> None:
        """Raises CheckpointError when there are checkpoints of rollouts that this run has yet to do: a resume would take them for its own."""
        others = [p for p in _candidates(self.root) if _rollout(p) >= start and (p / MANIFEST).exists()]
        if others:
            raise CheckpointError(f"{others[0]}: --save has a checkpoint of another run (this one starts at rollout {start}): resume it with "
                                  f"--load {self.root}, or take another folder")

    def _sweep(self) -> None:
        for pattern in ("partial-*", "superseded-*"):
            for left in self.root.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Make what is in a folder a checkpoint, but for its name: write its state and the manifest, and sync all of it."""
    _write(folder / STATE, json.dumps(state, indent=1))
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, files))
        hashes = list(pool.map(_sha256, files))
    listed = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": h} for f, h in zip(files, hashes, strict=True)}
    _write(folder / MANIFEST, json.dumps({"version": VERSION, "files": listed}, indent=1))
    for parent in sorted({f.parent for f in files}) + [folder]:
        sync(parent)


def weights_only_state(model: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint that no run has written: weights to begin with, at rollout 0."""
    return {"rollout_id": -1, "weights_only": True, "model": dict(model), "data": {}}


def fail(folder: Path, error: BaseException) -> NoReturn:
    """Raise OSError that names the folder; or `error` itself where the folder can still be written, so that another fault ended the save.

    Writers in C++ fail with words of their own ("iostream error"); writing here again gives the system's.
    """
    cause = error if isinstance(error, OSError) else _probe(folder)
    if cause is None:
        raise error
    raise OSError(f"{folder}: the checkpoint could not be written ({cause.strerror or cause}); the ones before it are untouched. "
                  "Free space there, and start again.") from error


def _probe(folder: Path) -> Optional[OSError]:
    """The error that writing 1 MiB into the folder ends with."""
    path = folder / f".probe-{uuid.uuid4().hex}"
    try:
        path.write_bytes(bytes(2**20))
        sync(path)
    except OSError as e:
        return e
    finally:
        path.unlink(missing_ok=True)
    return None


def _candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in root.glob("rollout_*") if _NAME.match(p.name)), key=_rollout, reverse=True)


def _rollout(folder: Path) -> int:
    return int(folder.name.removeprefix("rollout_"))


def find_checkpoint(root: Path, model: Mapping[str, Any]) -> Optional[Checkpoint]:
    """The newest whole checkpoint under `root` (or `root` itself), or None where there is none at all.

    A torn or foreign one is reported and the one before it taken. Raises CheckpointError when there are some but none is whole.
    """
    if (root / MANIFEST).exists() or _NAME.match(root.name):
        return read_checkpoint(root, model)
    problems: list[str] = []
    for folder in _candidates(root):
        try:
            return dataclasses.replace(read_checkpoint(folder, model), refused=tuple(problems))
        except CheckpointError as e:
            problems.append(str(e))
            log.warning("refused: %s", e)
    if problems:
        raise CheckpointError(f"{root}: no checkpoint here can be used:\n  " + "\n  ".join(problems))
    return None


def read_checkpoint(folder: Path, model: Mapping[str, Any]) -> Checkpoint:
    """Check a checkpoint's manifest (names, sizes, hashes) and its model. Raises CheckpointError that says what is wrong."""
    try:
        return _read(folder, model)
    except OSError as e:
        raise CheckpointError(f"{folder}: can't be read ({e.strerror}: {e.filename})") from None


def _read(folder: Path, model: Mapping[str, Any]) -> Checkpoint:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["version"]
        files = {name: (int(about["size"]), str(about["sha256"])) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged") from None
    if version != VERSION:
        raise CheckpointError(f"{folder}: its format is version {version}, and this rlmono reads version {VERSION}")
    if STATE not in files:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: it does not list {STATE}")
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    if found != set(files):
        odd = sorted(found ^ set(files))[0]
        raise CheckpointError(f"{folder}: {odd} is {'missing' if odd in files else 'not in the manifest'}")
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda item: _problem(folder, *item), files.items()):
            if problem:
                raise CheckpointError(f"{folder}: {problem}")
    state = json.loads((folder / STATE).read_text())
    # Weights fit whatever is free in their shape; and whether the engine's are quantised is not the trainer's matter.
    free = {"quantization_config", *(FREE_SHAPE if state.get("weights_only") else ())}
    differing = [k for k in (set(state["model"]) | set(model)) - free if state["model"].get(k) != model.get(k)]
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
    sync(path)
