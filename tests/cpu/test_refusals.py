"""Bad input is refused before anything is built, with what is wrong, where, and what to do; under torchrun by one message and status 2."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlmono import quickstart
from rlmono.config.schema import Config
from rlmono.config.sources import resolve
from rlmono.loop.host import plan_run
from rlmono.world.locks import hold

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "data"
    quickstart.make(folder, seed=5)
    return folder


def flags(task: Path, data: Path | None = None) -> list[str]:
    return ["--hf-checkpoint", str(task / "model"), "--prompt-data", str(data or task / "train.jsonl"), "--input-key", "messages",
            "--label-key", "label", "--apply-chat-template", "--rm-type", "math", "--colocate", "--num-rollout", "2",
            "--rollout-max-response-len", "12", "--device", "cpu"]


def planned(task: Path, data: Path | None = None, **values: Any) -> str:
    """The refusal of a run, in this process."""
    config: Config = dataclasses.replace(resolve(flags(task, data), {}), **values)
    with pytest.raises(ValueError) as e:
        plan_run(config, "attempt")
    return str(e.value)


GOOD = {"messages": [{"role": "user", "content": "1+1"}], "label": "2"}


@pytest.mark.parametrize(("bad", "text"), [
    ('{"messages": ', "data.jsonl:2: not a line of JSON"),
    (json.dumps({"prompt": "1+1", "label": "2"}), "data.jsonl:2: has no 'messages' (--input-key); its keys are prompt, label"),
    (json.dumps({"messages": GOOD["messages"]}), "data.jsonl:2: has no label 'label' (--label-key), and the reward needs one"),
    (json.dumps({"messages": [], "label": "2"}), "data.jsonl:2: 'messages' is an empty list"),
])
def test_a_bad_line_is_named_by_file_and_line(task: Path, tmp_path: Path, bad: str, text: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(GOOD)}\n{bad}\n")
    found = planned(task, data)
    assert text in found and "--skip-bad-rows" in found


def test_an_empty_prompt_file_is_refused(task: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    assert "the prompt file is empty" in planned(task, tmp_path / "data.jsonl")


def test_prompts_that_are_all_too_long_are_refused(task: Path) -> None:
    assert "--rollout-max-prompt-len (3)" in planned(task, rollout_max_prompt_len=3)


def test_a_save_folder_that_cannot_be_written_is_refused(task: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/save: --save can't be written" in planned(task, save=str(tmp_path / "file" / "save"))


def test_a_save_folder_of_another_run_is_refused(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rollout_0000001"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert "--save has a checkpoint of another run" in planned(task, save=str(tmp_path))


def test_torn_checkpoints_alone_are_no_fresh_start(task: Path, tmp_path: Path) -> None:
    (tmp_path / "rollout_0000001").mkdir()
    found = planned(task, save=str(tmp_path), load=str(tmp_path))
    assert f"{tmp_path}: no checkpoint here can be used" in found and "manifest.json is missing" in found


def test_a_load_folder_without_a_checkpoint_is_told(task: Path, tmp_path: Path) -> None:
    config: Config = dataclasses.replace(resolve(flags(task), {}), load=str(tmp_path / "nothing"))
    assert plan_run(config, "attempt")[1].notes == (f"note: --load {tmp_path}/nothing has no checkpoint: the run begins with {task}/model",)
    both = dataclasses.replace(config, save=config.load, save_interval=1)
    assert plan_run(both, "attempt")[1].notes == ()         # the usual first start


def test_untested_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlmono.engine.compat import check_version
    from rlmono.trainer.compat import _check_version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    with pytest.raises(ImportError, match=r"sglang 9\.9\.9 is installed, but rlmono was tested with.*pip install sglang=="):
        check_version()
    with pytest.raises(ImportError, match=r"megatron-core 9\.9\.9 is installed, but rlmono was tested with.*pip install megatron-core=="):
        _check_version()


# ---------------------------------------------------------------- under torchrun

def torchrun(ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOGLEVEL": "CRITICAL"}
    return subprocess.run([sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nproc-per-node", str(ranks), "-m", "rlmono", "train", *args],
                          capture_output=True, text=True, env=environ, timeout=300)


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    told = [line for line in text.splitlines() if line.startswith("rlmono: ")]
    assert len(told) == 1 and "Traceback" not in text, text
    return told[0]


def test_a_wrong_world_size_is_one_message_that_says_what_to_start(task: Path, tmp_path: Path) -> None:
    done = torchrun(2, *flags(task), "--actor-num-gpus-per-node", "2", "--run-dir", str(tmp_path / "run"))
    assert "--nproc-per-node 3" in one_message(done)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_one_message(task: Path, tmp_path: Path) -> None:
    lock = hold(tmp_path / ".lock")
    try:
        assert f"--run-dir {tmp_path} is in use by a run that is alive" in one_message(torchrun(2, *flags(task), "--run-dir", str(tmp_path)))
    finally:
        os.close(lock)


def test_bad_data_is_one_message(task: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("nonsense\n")
    done = torchrun(2, *flags(task, tmp_path / "data.jsonl"), "--run-dir", str(tmp_path / "run"))
    assert f"{tmp_path}/data.jsonl:1: not a line of JSON" in one_message(done)


def test_without_torchrun_it_says_how_to_start(task: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    done = subprocess.run([sys.executable, "-m", "rlmono", "train", *flags(task)], capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120)
    assert "neither torchrun nor srun" in one_message(done) and "launch/run.sh" in done.stderr
