"""A tool that runs Python: the model writes `<python>…</python>`, and what the code prints comes back as `<output>…</output>`.

    --custom-generate-function-path rlmono.agents.python_tool.generate

The prompts have to tell the model of it. Each call is a process of its own with a fresh private folder, which is removed after it.
What holds it in, and what does not, is in docs/rollout.md ("The Python tool").
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmono.data.sample import COMPLETED, Sample

if TYPE_CHECKING:
    from rlmono.rollout.generate import GenerateState

log = logging.getLogger(__name__)
CALLS = 8
"""Calls of the tool in one response at most."""
CODE = re.compile(r"<python>((?:(?!<python>).)*?)</python>", re.DOTALL)
SANDBOX = Path(__file__).with_name("sandbox.py")
AT_ONCE = max(2, (os.cpu_count() or 2) // 2)
"""Processes on one host."""
KILLED_S = 10.0
"""To be gone after a kill."""
WATCH_S = 0.1
FILE_BYTES = 4096
"""What a file takes at least."""
LAYERS = ("limits", "capabilities", "files", "calls")
_warned: set[str] = set()
_rooms: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


@dataclass(frozen=True)
class Limits:
    """Of one call. `file_bytes` is the size of each file that it writes, `folder_bytes` of all together (looked at every WATCH_S); `wall_s` is from
    its start, imports and all."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24
    folder_bytes: int = 1 << 26
    output_bytes: int = 4096


@dataclass(frozen=True)
class Result:
    """`outcome` is ok, error (it raised, or its exit status is not 0), timeout, output_limit, disk_limit or killed (by its limits)."""

    output: str
    outcome: str
    layers: Mapping[str, bool]
    """Which layers of the sandbox held."""


async def generate(args: Any, sample: Sample, sampling_params: Mapping[str, Any], state: GenerateState) -> Sample:
    """The model writes until it asks for the tool, which answers in its place; and so on until it stops by itself."""
    params = {**sampling_params, "stop": [*sampling_params["stop"], "</python>"]}
    for call in range(CALLS + 1):
        text = await state.turn(sample, params)
        asked = CODE.findall(text)
        if sample.status != COMPLETED or not asked or call == CALLS:
            break
        result = await run_python(asked[-1])
        if result.outcome not in ("ok", "error"):
            sample.remarks = [*sample.remarks, f"python_{result.outcome}"]
        if not state.append_text(sample, f"\n<output>\n{result.output}\n</output>\n"):
            break
    return sample


async def run_python(code: str, limits: Limits = Limits()) -> Result:  # noqa: B008 - frozen
    """Run code in a sandbox of its own; at most AT_ONCE at a time."""
    async with _rooms.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)):
        folder = tempfile.mkdtemp(prefix="python-tool-")        # mode 0700; not named as what runs sweep away
        try:
            result = await _run(code, limits, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    missing = [layer for layer in LAYERS if not result.layers.get(layer)]
    if result.layers and missing and not _warned.issuperset(missing):
        _warned.update(missing)
        log.warning("the Python tool runs without these layers of its sandbox: %s (docs/rollout.md says what each holds in)", ", ".join(missing))
    return result


async def _run(code: str, limits: Limits, folder: str) -> Result:
    status, theirs = os.pipe()
    try:
        environ = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-B", str(SANDBOX), json.dumps(asdict(limits)), str(theirs), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environ, cwd=folder, pass_fds=(theirs,), start_new_session=True)
        os.close(theirs)
        theirs = -1
        outcome, output = "timeout", b""
        full = asyncio.create_task(_watch(process, folder, limits.folder_bytes))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.wall_s):
                    output, more = await _talk(process, code, limits.output_bytes)
                    outcome = "output_limit" if more else _outcome(await process.wait())
        finally:
            outcome = "disk_limit" if full.done() else outcome
            full.cancel()
            _kill(process)
            await _ended(process)
        os.set_blocking(status, False)
        with contextlib.suppress(BlockingIOError, ValueError):
            return Result(_shown(output, outcome, limits), outcome, json.loads(os.read(status, 4096)))
        return Result(_shown(output, outcome, limits), outcome, {})
    finally:
        os.close(status)
        if theirs >= 0:
            os.close(theirs)


async def _watch(process: asyncio.subprocess.Process, folder: str, most: int) -> None:
    """Kill the process when its folder has more than `most` bytes, and return then."""
    while await asyncio.to_thread(_size, folder, most) <= most:
        await asyncio.sleep(WATCH_S)
    _kill(process)


def _size(folder: str, most: int) -> int:
    """Bytes of the files in a folder that somebody writes; when it is more than `most`, only that."""
    total = 0
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):          # gone already
                total += max(os.lstat(os.path.join(path, name)).st_blocks * 512, FILE_BYTES)
            if total > most:
                return total
    return total


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for a process that was killed. asyncio says that it has ended only when its output has been read to the end; a process of its own making,
    where the sandbox has no layer against those, may hold the output open: it is left to itself then."""
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILLED_S):
            while await process.stdout.read(2**16):
                pass
            await process.wait()


async def _talk(process: asyncio.subprocess.Process, code: str, most: int) -> tuple[bytes, bool]:
    """(what it says, up to `most` bytes, whether there was more)."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(code.encode(errors="replace"))
        await process.stdin.drain()
        process.stdin.close()
    output = b""
    while len(output) <= most and (part := await process.stdout.read(most + 1 - len(output))):
        output += part
    return output[:most], len(output) > most


def _outcome(status: int) -> str:
    return "ok" if status == 0 else "killed" if status < 0 else "error"


def _shown(output: bytes, outcome: str, limits: Limits) -> str:
    """What the model sees."""
    ends = {"timeout": f"[stopped: not done within {limits.wall_s:g} s]", "killed": "[stopped: out of processor time or memory]",
            "output_limit": f"[stopped: more than {limits.output_bytes} bytes of output]",
            "disk_limit": f"[stopped: more than {limits.folder_bytes >> 20} MiB of files]"}
    return "\n".join(filter(None, [output.decode(errors="replace").rstrip(), ends.get(outcome, "")]))
