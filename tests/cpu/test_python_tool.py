"""The sandbox of the Python tool: what it holds in, and how a call ends. And its generate function on a scripted engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from standin import make_config, make_folder, run_group

from rlmono.agents.python_tool import LAYERS, Limits, Result, run_python
from rlmono.data.sample import Sample


def run(code: str, **limits: float) -> Result:
    return asyncio.run(run_python(code, Limits(**{"wall_s": 60.0, **limits})))      # type: ignore[arg-type]


@pytest.fixture(scope="module")
def layers() -> set[str]:
    """Those that hold on this machine; what needs another one is skipped."""
    return {name for name, holds in run("pass").layers.items() if holds}


def test_what_is_printed_comes_back() -> None:
    result = run("import math\nprint(math.factorial(10))\nprint('ü')")
    assert (result.output, result.outcome) == ("3628800\nü", "ok") and set(result.layers) == set(LAYERS)


@pytest.mark.parametrize(("code", "outcome", "text"), [
    ("1/0", "error", "ZeroDivisionError: division by zero"), ("def f(:", "error", "SyntaxError"), ("import sys; sys.exit(3)", "error", ""),
    ("x = [0] * 10**10", "error", "MemoryError"), ("while True: pass", "killed", "[stopped: out of processor time or memory]"),
    ("import time; time.sleep(100)", "timeout", "[stopped: not done within 2 s]"),
    ("print('x' * 10**6)", "output_limit", "[stopped: more than 100 bytes of output]"),
    ("import threading; t = threading.Thread(target=print, args=('hi',)); t.start(); t.join()", "ok", "hi"),
    ("open('f', 'w').write('x' * (1 << 25))", "error", "File too large"),
    ("for i in range(10**6): open(f'f{i}', 'w').write('x' * 10**6)", "disk_limit", "[stopped: more than 64 MiB of files]"),
    ("import shutil; open('a', 'w').write('x'); shutil.copy2('a', 'b'); print(open('b').read())", "ok", "x"),
])
def test_how_code_ends(code: str, outcome: str, text: str) -> None:
    result = run(code, cpu_s=5 if "disk" in outcome else 1, output_bytes=100 if "output" in outcome else 4096, wall_s=2 if "sleep" in code else 60)
    assert result.outcome == outcome and text in result.output, result


HELD = {
    "files": ["open('/etc/passwd')", "open('/proc/1/environ')", "open({victim!r})", "open('/tmp/left-behind', 'w')",
              "import os; os.unlink({victim!r})", "import os; os.listdir('/')"],
    "calls": ["import os; os.fork()", "import socket; socket.socket()", "import os; os.kill(os.getppid(), 0)",
              "import os; os.execv('/bin/ls', ['ls'])", "import subprocess; subprocess.run(['ls'])",
              "import multiprocessing as m; m.Process(target=print).start()", "import os; os.truncate({victim!r}, 0)",
              "import os; os.chown({victim!r}, 1, 1)", "import os; os.setxattr({victim!r}, 'user.a', b'b')",
              "import os; os.setpriority(os.PRIO_USER, 0, 19)", "import os; os.sched_setaffinity(os.getppid(), [0])"],
    "limits": ["import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))"],
}


@pytest.mark.parametrize(("layer", "code"), [(layer, code) for layer, codes in HELD.items() for code in codes])
def test_what_is_held_in(layers: set[str], tmp_path: Path, layer: str, code: str) -> None:
    if layer not in layers:
        pytest.skip(f"this machine's kernel has no layer for {layer}")
    victim = tmp_path / "victim"
    victim.write_text("labels")
    result = run(code.format(victim=str(victim)))
    assert result.outcome == "error" and any(text in result.output for text in ("not permitted", "Permission denied", "not allowed")), result
    assert victim.read_text() == "labels"


def test_modes_and_times_of_files_stay(layers: set[str], tmp_path: Path) -> None:
    if "calls" not in layers:
        pytest.skip("this machine's kernel has no layer for calls")
    victim = tmp_path / "victim"
    victim.write_text("labels")
    before = victim.stat()
    assert run(f"import os; os.chmod({str(victim)!r}, 0); os.utime({str(victim)!r}, (1, 1))").outcome == "ok"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


def test_each_call_has_a_fresh_folder_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hidden")
    code = "import os; print('SECRET_KEY' in os.environ, os.listdir('.')); open('here', 'w').write('x'); print(os.getcwd(), open('here').read())"
    first, second = run(code), run(code)
    assert first.output.startswith("False []") and first.output.endswith(" x") and second.output.startswith("False []")
    assert not os.path.exists(first.output.split("\n")[1].removesuffix(" x"))


def test_turns_with_code(tmp_path: Path) -> None:
    tags = ("<python>", "</python>", "<output>", "</output>")
    tokenizer = make_folder(tmp_path / "language", *tags)
    turns = ["so<python>print(6*7)</python>", "it is 42<|end|>"]
    sample = Sample(prompt="6*7", tokens=tokenizer.render("6*7"), reward=1.0)
    config = make_config(tokenizer, "rlmono.agents.python_tool.generate")
    done, engine = run_group(config, lambda _: tokenizer.render(turns.pop(0)), [sample])
    [s] = done.samples
    assert s.response == "so<python>print(6*7)</python>\n<output>\n42\n</output>\nit is 42<|end|>"
    assert s.loss_mask is not None and sum(s.loss_mask) == len(tokenizer.render("so<python>print(6*7)</python>it is 42<|end|>"))
    assert engine.requests[0].sampling.stop == ("</python>",)
