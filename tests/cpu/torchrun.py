"""Many cases under one torchrun, so that a test module pays for processes and imports once.

A script in `worlds/` has functions `case_…`, and runs them in order on every rank (see worlds/cases.py). A test module
runs the script once, in a fixture, and reports each case under its own name:

    SCRIPT = WORLDS / "trainer_one.py"

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        return run_world(SCRIPT, 1, str(tmp_path_factory.mktemp("world")), timeout_s=300)

    @pytest.mark.parametrize("name", case_names(SCRIPT))
    def test_case(results, name):
        results[name].check()
"""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORLDS = Path(__file__).resolve().parent / "worlds"


@dataclass(frozen=True)
class Result:
    """What became of one case: `error` is empty when it passed on all ranks; `values` is what it returned on rank 0."""

    error: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self) -> None:
        if self.error:
            raise AssertionError(self.error)


def case_names(script: Path) -> list[str]:
    """The script's cases, in order, without importing it."""
    return [node.name for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")]


def run_world(script: Path, ranks: int, *args: str, timeout_s: float) -> dict[str, Result]:
    """Run all cases of `script` on `ranks` ranks; a result for each, also for one that was never reached."""
    with tempfile.TemporaryDirectory() as tmp:
        results, output = Path(tmp) / "results.jsonl", Path(tmp) / "output"
        results.touch()
        ended = _run(script, ranks, args, timeout_s, {"CASE_RESULTS": str(results)}, output)
        done = {line.pop("name"): Result(**line) for line in map(json.loads, results.read_text().splitlines())}
        text = output.read_text(errors="replace")
    missing = [name for name in case_names(script) if name not in done]
    if ended and not missing:
        raise RuntimeError(f"{script.name}: all cases ran, but {ended}\n{text[-3000:]}")
    for name in missing:
        done[name] = Result(f"{script.name} did not come to {name}: {ended}" + (f"\n{text[-6000:]}" if name == missing[0] else f", see {missing[0]}"))
    return done


def _run(script: Path, ranks: int, args: tuple[str, ...], timeout_s: float, more: dict[str, str], output: Path) -> str:
    """How it ended, in words; empty when well."""
    environ = os.environ | more | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                                   "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nproc-per-node", str(ranks), "--master-port", str(free_port()),
               str(script), *args]
    with output.open("wb") as f, subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environ, cwd=ROOT) as process:
        try:
            status = process.wait(timeout_s)
            return f"torchrun ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            return f"it did not end within {timeout_s:g} s"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)         # torchrun ends its ranks, which lead sessions of their own
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
