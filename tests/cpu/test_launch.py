"""What the scripts in launch/ refuse, and that hostfile.sh leaves nothing running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlmono import quickstart

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60


def run(*command: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RLMONO_")}
    environ = inherited | {"RLMONO_VENV": sys.prefix} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT)


def refused(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    """One clear message, and no traceback."""
    assert done.returncode == 2 and not done.stdout
    assert all(text in done.stderr for text in texts) and "Traceback" not in done.stderr, done.stderr


# ---------------------------------------------------------------- run.sh


def test_run_refuses_a_wrong_option_before_it_starts_anything() -> None:
    refused(run("launch/run.sh", "--num-rolout", "3"), "--num-rolout is not an option; did you mean --num-rollout?")


def test_run_refuses_half_of_a_rendezvous() -> None:
    refused(run("launch/run.sh", NNODES="2", NODE_RANK="1"), "NNODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR")
    refused(run("launch/run.sh", NNODES="two"), "NNODES is 'two'")


def test_run_refuses_a_number_of_nodes_that_the_configuration_does_not_ask_for(tmp_path: Path) -> None:
    quickstart.make(tmp_path / "data")
    recipe = ROOT / "configs" / "recipes" / "quickstart-sft.env"
    done = run("launch/run.sh", "--env-file", recipe, QUICKSTART=tmp_path, NNODES="2", NODE_RANK="0", MASTER_ADDR="localhost")
    refused(done, "2 node(s) with 1 device rank(s)", "asks for 1 x 2: start 1 node(s)")


def test_run_says_that_nothing_is_installed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    refused(run("launch/run.sh", RLMONO_VENV=tmp_path), "not installed", "launch/install.sh")


# ---------------------------------------------------------------- install.sh


def test_install_refuses_another_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused(run("launch/install.sh", RLMONO_VENV=tmp_path / "venv", RLMONO_PYTHON=old), f"RLMONO_PYTHON={old} is not a Python 3.11 or 3.12")
    refused(run("launch/install.sh", "everything"), "cpu, gpu or test, not 'everything'")


def test_install_without_a_source_of_packages_says_which_and_leaves_no_stamp(tmp_path: Path) -> None:
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_EXTRA_INDEX_URL": ""}
    done = run("launch/install.sh", RLMONO_VENV=tmp_path / "venv", RLMONO_PYTHON=sys.executable, **variables)
    assert done.returncode == 2 and "could not install torch==" in done.stderr and "Is there a network?" in done.stderr
    assert not (tmp_path / "venv" / "installed-cpu").exists()


# ---------------------------------------------------------------- hostfile.sh


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Path]:
    """A copy of hostfile.sh whose ssh stays on this machine, and whose run.sh writes what it was given and its process id, and waits."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("common.sh", "hostfile.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    scripts = {"bin/ssh": 'while [ "$1" = -o ]; do shift 2; done; shift; exec setsid sh -c "$*"',
               "launch/run.sh": 'echo "$NODE_RANK/$NNODES $MASTER_ADDR $NPROC_PER_NODE $RLMONO_LR $@" >told-$NODE_RANK; echo $$ >pid-$NODE_RANK\n'
                                'case $1-$NODE_RANK in fail-1) until [ -s pid-0 ]; do sleep 0.05; done; exit 7 ;;\n'
                                'wait-* | fail-*) exec sleep 600 ;; esac'}
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nlocalhost slots=4\n\n127.0.0.1 slots=4\n")
    yield tmp_path
    assert all(ended(tmp_path, node) for node in (0, 1))


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environ = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RLMONO_LR": "1e-6 x"}
    return subprocess.Popen([folder / "launch" / "hostfile.sh", "hosts", *words], cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def ended(folder: Path, node: int) -> bool:
    pid = (folder / f"pid-{node}").read_text().strip()
    state = Path(f"/proc/{pid}/stat")
    try:
        return not pid or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def both_run(folder: Path) -> bool:
    return all((folder / f"pid-{node}").exists() and (folder / f"pid-{node}").read_text().endswith("\n") for node in (0, 1))


def test_hostfile_starts_every_host_with_its_place_and_the_options(two_hosts: Path) -> None:
    with start(two_hosts, "--x", "a b") as process:
        assert process.wait(DEADLINE_S) == 0
    assert [(two_hosts / f"told-{node}").read_text() for node in (0, 1)] == [f"{node}/2 localhost 5 1e-6 x --x a b\n" for node in (0, 1)]


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_hostfile_stops_every_host_when_it_ends(two_hosts: Path, signum: int, status: int) -> None:
    with start(two_hosts, "wait") as process:
        until(lambda: both_run(two_hosts), "both hosts run")
        process.send_signal(signum)
        assert process.wait(DEADLINE_S) == status
    until(lambda: ended(two_hosts, 0) and ended(two_hosts, 1), "both hosts end")


def test_hostfile_stops_the_others_when_one_fails(two_hosts: Path) -> None:
    with start(two_hosts, "fail") as process:
        assert process.wait(DEADLINE_S) == 7
        assert process.stderr is not None and "a host ended with status 7" in process.stderr.read()
    until(lambda: ended(two_hosts, 0), "host 0 ends")


@pytest.mark.parametrize("lines, text", [("", "names no host"), ("10.0.0.1\n", "no slots=<devices> after 10.0.0.1"),
                                         ("a slots=8\nb slots=4\n", "b has 4 slots, others 8")])
def test_hostfile_refuses(tmp_path: Path, lines: str, text: str) -> None:
    (tmp_path / "hosts").write_text(lines)
    refused(run("launch/hostfile.sh", tmp_path / "hosts"), text)
