"""Rollouts that are saved, looked at, trained on without an engine, and generated without a trainer; evaluation sets on the way."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrun import free_port

from rlmono import quickstart
from rlmono.config.schema import Config
from rlmono.data.rows import DataError
from rlmono.data.sample import Sample
from rlmono.observe import view
from rlmono.observe.metrics import read_metrics
from rlmono.rollout.debug import SavedRollouts, load_rollout, save_rollout

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- files


def decode(ids: Any) -> str:
    return "".join(chr(i) for i in ids)


def samples() -> list[list[Sample]]:
    groups = [[_sample(g, i) for i in range(2)] for g in range(3)]
    groups[0][1].loss_mask = [1, 0, 0, 1]
    return groups


def _sample(g: int, i: int) -> Sample:
    n = 3 + i
    return Sample(index=2 * g + i, group_index=g, prompt=[{"role": "user", "content": "1+1"}], tokens=[*b"abc", *b"defgh"[:n]], response_length=n,
                  response="defgh"[:n], reward=g + i / 2, rollout_log_probs=[-0.1, -1 / 3, -2.5, -0.0][:n], weight_versions=[g] * n, label="2",
                  status="aborted" if g == i == 1 else "completed", remarks=["reward_timeout"] * g)


def test_saved_samples_come_back_bit_for_bit(tmp_path: Path) -> None:
    groups = samples()
    path = save_rollout(f"{tmp_path}/deep/er/{{rollout_id}}.jsonl", 7, groups[::-1], decode)
    assert path == tmp_path / "deep" / "er" / "7.jsonl" and [p.name for p in path.parent.iterdir()] == ["7.jsonl"]
    assert load_rollout(path, Config(model={"vocab_size": 128})) == groups
    assert [json.loads(line).get("parts") for line in path.read_text().splitlines()][-1] == [[1, "d"], [0, "ef"], [1, "g"]]


@pytest.mark.parametrize(("edit", "problem"), [
    (lambda s: s.pop("reward"), "sample 1 has no reward yet"),
    (lambda s: s.update(loss_mask=[1]), "loss_mask has 1 entries for a response of 4 tokens"),
    (lambda s: s.update(rollout_log_probs=[0.1]), "rollout_log_probs has 1 entries"),
    (lambda s: s["tokens"].append(128), "token 128 is not in the model's vocabulary of 128: another model made it"),
    (lambda s: s.update(response_length=0), "it has 7 tokens, 0 of them of a response"),
    (lambda s: s.update(tokens="x"), "Expected `bytes | array`, got `str`"),
])
def test_a_sample_that_cannot_be_trained_on_is_named(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], problem: str) -> None:
    path = save_rollout(f"{tmp_path}/{{rollout_id}}.jsonl", 0, samples(), decode)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    edit(lines[1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError) as error:
        load_rollout(path, Config(model={"vocab_size": 128}))
    assert f"{path}:2: is no sample" in str(error.value) and problem in str(error.value)


def test_missing_files_are_named_before_anything_starts(tmp_path: Path) -> None:
    template = f"{tmp_path}/{{rollout_id}}.jsonl"
    config = Config(load_debug_rollout_data=template, num_rollout=4, model={"vocab_size": 128})
    for rollout_id in (1, 2):
        save_rollout(template, rollout_id, samples(), decode)
    rollouts = SavedRollouts(config, None)      # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"{tmp_path}/3.jsonl: there is no such file.*rollouts 1 to 3 .--num-rollout., and 1 are missing"):
        rollouts.refuse_missing(1)
    save_rollout(template, 3, [], decode)
    rollouts.refuse_missing(1)
    with pytest.raises(DataError, match="3.jsonl: has no samples"):
        rollouts.refuse_missing(3)


# ---------------------------------------------------------------- the viewer

@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(save_rollout(f"{tmp_path}/{{rollout_id}}.jsonl", 0, samples(), decode))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert view.main(arguments) == 0
    return capsys.readouterr().out


def numbers(text: str) -> list[int]:
    return [int(line.split()[2].rstrip(",")) for line in text.splitlines() if line.startswith("── sample")]


def test_samples_are_shown_with_what_matters(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, file)
    assert text.startswith(f"{file}: 6 samples, mean reward 1.25; 6 of 6 shown") and numbers(text) == list(range(6))
    assert "── sample 3, group 1 ── reward 1.5 ── aborted ── 3 + 4 tokens ── reward_timeout" in text
    assert "user: 1+1" in text and "label: 2" in text
    assert "trained on, ⟦masked: not trained on⟧" in text and "d⟦ef⟧g" in text


def test_masks_and_rewards_have_colours(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, file, "--color", "always")
    assert "d\x1b[33mef\x1b[0mg" in text and "⟦" not in text
    assert "\x1b[1;32m2.5" in text and "\x1b[1;31m0\x1b" in text and "\x1b[35maborted" in text


@pytest.mark.parametrize(("arguments", "expected"), [
    ("--best 2", [5, 4]), ("--worst 2", [0, 1]), ("--aborted", [3]), ("--status completed --best 1", [5]), ("--index 4 1", [1, 4]),
    ("--group 2", [4, 5]), ("--limit 2", [0, 1]), ("--limit 0", [0, 1, 2, 3, 4, 5]), ("--best", [5, 4, 3, 2, 1]),
])
def test_filters(file: str, capsys: pytest.CaptureFixture[str], arguments: str, expected: list[int]) -> None:
    assert numbers(shown(capsys, file, *arguments.split())) == expected


def test_long_texts_and_rewards_that_are_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"index": i, "response": "a" * 50 + "b" * 50, "reward": {"score": -i, "acc": i}}) + "\n" for i in range(3)))
    text = shown(capsys, str(path), "--chars", "20", "--best", "1", "--reward-key", "acc")
    assert numbers(text) == [2] and "a" * 10 + " … 80 characters (--chars 0 shows all) … " + "b" * 10 in text and '{"score": -2, "acc": 2}' in text
    assert view.main([str(path), "--best"]) == 2
    assert "rewards are objects; name the number with --reward-key: score, acc" in capsys.readouterr().err


def test_a_models_text_does_nothing_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "\x1b]0;title\x07", "response": "[bold]é\t\x1b[2J\r\u202e\x9b\n", "label": "\x00", "reward": 1}) + "\n")
    text = shown(capsys, str(path), "--color", "never")
    assert r"\x1b]0;title\x07" in text and r"\u202e\x9b" in text and r"label: \x00" in text
    assert r"[bold]é \x1b[2J\r" in text


def test_files_that_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"response": "x"}\n{"respon')
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    (tmp_path / "typed.jsonl").write_text('{"response": "x", "reward": "good"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, problem in (([f"{tmp_path}/none"], "none cannot be read: No such file"), ([f"{tmp_path}/bad.jsonl"], "bad.jsonl:2 is not JSON"),
                               ([f"{tmp_path}/other.jsonl"], "other.jsonl:1 is no sample"),
                               ([f"{tmp_path}/typed.jsonl"], "typed.jsonl:1 is no sample: Expected float | object | null, got str - at $.reward"),
                               ([f"{tmp_path}/empty.jsonl"], "empty.jsonl has no samples"),
                               ([file, "--failed"], "none of its 6 samples is what was asked for")):
        assert view.main(arguments) == 2
        assert problem in capsys.readouterr().err


# ---------------------------------------------------------------- runs

def run(folder: Path, name: str, *options: object) -> Path:
    """A run of one device rank and a host to its end; its run directory."""
    command = [sys.executable, ROOT / "launch" / "torchrun.py", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "rlmono", "train",
               "--run-dir", folder / name, "--hf-checkpoint", folder / "data" / "model", "--device", "cpu", "--deterministic", "--progress", "none",
               "--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "6", "--lr", "1e-3",
               *options]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stdout
    return folder / name


GENERATES = ("--colocate", "--prompt-data", "{folder}/data/train.jsonl@[:9]", "--input-key", "messages", "--label-key", "label",
             "--apply-chat-template", "--custom-rm-path", "{folder}/reward.py:reward", "--rollout-shuffle")


AGENT = """
async def agent(args, sample, sampling_params, state):
    await state.turn(sample, {**sampling_params, "max_new_tokens": 1})
    state.append_text(sample, "?")
    await state.turn(sample)
    return sample
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run that generates, trains and evaluates, and has saved its rollouts."""
    folder = tmp_path_factory.mktemp("debug")
    quickstart.make(folder / "data", 1)
    (folder / "reward.py").write_text("def reward(args, sample, **kwargs):\n    return len(set(sample.response)) / 10\n")
    (folder / "agent.py").write_text(AGENT)
    (folder / "eval.yaml").write_text(f"""
        defaults: {{n_samples_per_eval_prompt: 2, temperature: 0.5}}
        datasets:
          - {{name: two, path: "{folder}/data/eval.jsonl@[:2]", max_response_len: 3, custom_generate_function_path: "{folder}/agent.py:agent"}}
          - {{name: five, path: "{folder}/data/eval.jsonl@[-5:]", n_samples_per_eval_prompt: 4, rm_type: math}}
    """)
    run(folder, "whole", *generates(folder), "--eval-config", folder / "eval.yaml", "--eval-interval", 1, "--save", folder / "whole" / "save",
        "--save-hf", folder / "whole" / "model", "--save-debug-rollout-data", folder / "saved" / "{rollout_id}.jsonl")
    return folder


def generates(folder: Path) -> list[str]:
    return [word.format(folder=folder) for word in GENERATES]


def test_each_set_is_evaluated_its_own_way(folder: Path) -> None:
    rows = read_metrics(folder / "whole")
    for name, n, k in (("two", 4, 2), ("five", 20, 4)):
        told = [row for row in rows if f"eval/{name}" in row]
        assert [row["rollout_id"] for row in told] == [0, 1, 2] and all(row[f"eval/{name}/samples"] == n for row in told)
        assert (told[0][f"eval/{name}"] > 0) == (name == "two")         # the other is judged by a reward of its own
        assert f"eval/{name}/pass_at_{k}" in told[0] and f"eval/{name}/pass_at_{2 * k}" not in told[0]
        lines = [json.loads(line) for line in (folder / "whole" / "samples" / f"eval_{name}_2.jsonl").read_text().splitlines()]
        assert len(lines) == n and max(line["response_length"] for line in lines) == (3 if name == "two" else 6)
        masked = [[part for mask, part in line.get("parts", ()) if not mask] for line in lines]
        assert masked == [["?"] if name == "two" else []] * n


def test_training_on_saved_rollouts_is_the_same_without_engines(folder: Path) -> None:
    """No prompt data, no reward, no engine: the same losses, and in the end the same weights to the bit."""
    alone = run(folder, "alone", "--load-debug-rollout-data", folder / "saved" / "{rollout_id}.jsonl", "--actor-num-gpus-per-node", 1,
                "--save", folder / "alone" / "save", "--save-hf", folder / "alone" / "model")
    whole, again = ([row for row in read_metrics(d) if "train/loss" in row] for d in (folder / "whole", alone))
    assert len(whole) == len(again) == 2 and whole[0]["train/grad_norm"] > 0
    for name in ("train/loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff", "rollout/raw_reward", "rollout/log_probs"):
        assert [row[name] for row in whole] == [row[name] for row in again]
    assert (folder / "whole" / "model" / "model.safetensors").read_bytes() == (alone / "model" / "model.safetensors").read_bytes()
    assert "rank 0 is trainer\n" in (alone / "logs" / "attempt-1" / "rank-00000.log").read_text()


def test_generating_alone_gives_what_the_whole_run_had_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No trainer; the weights of the HF folder, checked against the engine's."""
    alone = run(folder, "rollouts", *generates(folder), "--debug-rollout-only", "--check-weight-update-equal", "--save", folder / "rollouts" / "save",
                "--save-debug-rollout-data", folder / "rollouts" / "{rollout_id}.jsonl", "--eval-config", folder / "eval.yaml")
    assert (alone / "0.jsonl").read_bytes() == (folder / "saved" / "0.jsonl").read_bytes()
    assert len((alone / "1.jsonl").read_text().splitlines()) == 16 and not (alone / "save").exists()
    rows = read_metrics(alone)
    assert [row["rollout_id"] for row in rows if "eval/five" in row] == [0, 2] and not [row for row in rows if "train/loss" in row]
    for path in (alone / "1.jsonl", alone / "samples" / "eval_five_2.jsonl"):
        assert len(numbers(shown(capsys, str(path), "--best", "3"))) == 3
    assert io.StringIO(shown(capsys, str(alone / "0.jsonl"))).readline().startswith(f"{alone}/0.jsonl: 16 samples, mean reward 0.")
