"""Runs as a person starts them, each rank a process that can be found, killed and waited for."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TAG = "FAULTS_RUN"


class Run:
    """One torchrun agent with its ranks. All of its processes carry a tag in their environment; `with` leaves none behind.

    `tmp` is its folder for sockets. `node` is (number of this node, port of the rendezvous) in a run of two nodes on loopback.
    """

    def __init__(self, args: Sequence[object], ranks: int, console: Path, tmp: Path, node: tuple[int, int] | None = None):
        self.tag, self.console = uuid.uuid4().hex, console
        command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--max-restarts", "0", "--nproc-per-node", str(ranks)]
        if node is not None:
            command += ["--nnodes", "2", "--node-rank", str(node[0]), "--master-addr", "127.0.0.1", "--master-port", str(node[1])]
        environ = {**os.environ, _TAG: self.tag, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp), "OMP_NUM_THREADS": "1", "LOGLEVEL": "CRITICAL",
                   "GLOO_SOCKET_IFNAME": "lo"}
        with open(console, "ab") as out:
            self.agent = subprocess.Popen([*command, "-m", "rlmono", "train", *map(str, args)], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                          env=environ, cwd=console.parent, start_new_session=True, preexec_fn=_end_with_parent)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            _kill(pid, signal.SIGKILL)
        self.agent.wait(30)

    def alive(self) -> list[int]:
        """Every process of this run, whoever its parent is by now."""
        mark = f"{_TAG}={self.tag}".encode()
        return [pid for pid in _pids() if mark in _environ(pid)]

    def pid(self, rank: int) -> int:
        """The process of a rank of this node."""
        found = [pid for pid in self.alive() if _parent(pid) == self.agent.pid and f"RANK={rank}".encode() in _environ(pid)]
        assert len(found) == 1, f"{len(found)} processes are rank {rank}\n{self.text()}"
        return found[0]

    def kill(self, rank: int) -> None:
        _kill(self.pid(rank), signal.SIGKILL)

    def text(self) -> str:
        return self.console.read_text(errors="replace")

    def wait(self, timeout_s: float = 400) -> int:
        """The exit status of the agent."""
        try:
            return self.agent.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run has not ended within {timeout_s:g} s:\n{self.text()}") from None

    def wait_until_gone(self, timeout_s: float = 90) -> None:
        """No process of the run is left."""
        until(lambda: not self.alive(), "every process of the run to end", timeout_s, self.text)

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 400) -> None:
        """Wait for something that the living run will do."""
        def met() -> object:
            done = condition()
            assert done or self.agent.poll() is None, f"the run ended while the test waited for {what}:\n{self.text()}"
            return done
        until(met, what, timeout_s, self.text)


def until(condition: Callable[[], object], what: str, timeout_s: float, text: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}:\n{text()}"
        time.sleep(0.001)


def _end_with_parent() -> None:
    """Also a test that is killed leaves no run behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _environ(pid: int) -> list[bytes]:
    """Empty for a process that has ended (a zombie too) or is not ours."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return                          # it has ended by itself
