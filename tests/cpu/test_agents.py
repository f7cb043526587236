"""Tools and agents with the real engine and trainer: what the trainer learns from is what the engine saw and sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agent_functions import FAILS
from test_quickstart import launch

from rlmono.agents import calculator
from rlmono.observe.metrics import read_metrics
from rlmono.quickstart import accuracies, make

FUNCTION = Path(__file__).with_name("agent_functions.py")
GROUPS, EACH = 4, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollouts of a tiny random model on two colocated ranks."""
    folder = tmp_path_factory.mktemp("agents")
    make(folder / "data", 3, calculator.write_task, task="calculator")
    recipe = folder / "recipe.env"
    recipe.write_text(f"""
RLMONO_DEVICE=cpu
RLMONO_ACTOR_NUM_GPUS_PER_NODE=2
RLMONO_COLOCATE=true
RLMONO_HF_CHECKPOINT={folder}/data/model
RLMONO_RUN_DIR={folder}/run
RLMONO_PROMPT_DATA={folder}/data/train.jsonl
RLMONO_INPUT_KEY=messages
RLMONO_LABEL_KEY=label
RLMONO_APPLY_CHAT_TEMPLATE=true
RLMONO_RM_TYPE=math
RLMONO_CUSTOM_GENERATE_FUNCTION_PATH={FUNCTION}:generate
RLMONO_NUM_ROLLOUT=2
RLMONO_ROLLOUT_BATCH_SIZE={GROUPS}
RLMONO_N_SAMPLES_PER_PROMPT={EACH}
RLMONO_ROLLOUT_MAX_RESPONSE_LEN=120
RLMONO_NUM_STEPS_PER_ROLLOUT=2
RLMONO_LR=1e-4
RLMONO_START_TIMEOUT_S=600
""")
    launch(folder, str(recipe))
    return folder / "run"


def calls(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "calls.jsonl").read_text().splitlines()]


def test_the_sample_has_the_tokens_of_every_call(run: Path) -> None:
    """And on just those that a call wrote, once, the loss; with the logprobs that the engine gave them."""
    rows = calls(run)
    assert len(rows) == 2 * GROUPS * EACH - 1
    for row in rows:
        trained = []
        for s in row["samples"]:
            start = len(s["tokens"]) - s["response_length"]
            assert len(s["loss_mask"]) == len(s["rollout_log_probs"]) == s["response_length"]
            trained += [(t, p) for t, p, m in zip(s["tokens"][start:], s["rollout_log_probs"], s["loss_mask"], strict=True) if m]
            assert all(p == 0 or m or len(row["samples"]) > 1 for p, m in zip(s["rollout_log_probs"], s["loss_mask"], strict=True))
        wrote = [(t, p) for c in row["calls"] for t, p in zip(c["wrote"], c["log_probs"], strict=True)]
        assert sorted(trained) == sorted(wrote)
        for c in row["calls"]:
            said = c["saw"] + c["wrote"]
            assert any(s["tokens"][:len(said)] == said for s in row["samples"]), "a call that is in no sample"
    assert {len(row["samples"]) for row in rows} == {1, 2} and {len(row["calls"]) for row in rows} == {2, 3}


def test_a_string_ends_a_turn(run: Path) -> None:
    stopped = [c for row in calls(run) for c in row["calls"] if c["stop"] == ["1", "a"] and c["finish"] == "stop"]
    ending = [t for t in calculator.LANGUAGE.vocabulary if "1" in t or "a" in t or t == "<|end|>"]     # `<calc>` too
    words = [[calculator.LANGUAGE.vocabulary[t] for t in c["wrote"]] for c in stopped]
    assert {"1", "a"} & {last for *_, last in words} and all(last in ending and not set(before) & set(ending) for *before, last in words)


def test_the_trainer_agrees_with_the_engine_on_what_the_model_wrote(run: Path) -> None:
    rows = read_metrics(run)
    assert len(rows) == 2
    for row in rows:
        assert row["train/train_rollout_logprob_abs_diff_max"] <= 1e-5, row
        assert 0 < row["train/train_rollout_logprob_abs_diff_max"] and 0.3 < row["rollout/trained_tokens_ratio"] < 0.95
        assert row["train/skipped_steps"] == 0
    assert sum(row["rollout/samples"] for row in rows) == sum(len(c["samples"]) for c in calls(run)) > 2 * GROUPS * EACH


def test_a_call_that_fails_is_counted(run: Path) -> None:
    assert FAILS < GROUPS * EACH
    assert [row.get("rollout/failed/generate_error", 0) for row in read_metrics(run)] == [1, 0]


@pytest.mark.slow
def test_the_calculator_is_learned(tmp_path: Path) -> None:
    make(tmp_path / "data", 0, calculator.write_task, task="calculator")
    launch(tmp_path, "calculator-sft.env")
    launch(tmp_path, "calculator-grpo.env")
    values = accuracies(tmp_path / "grpo")
    assert values[0] < 0.5 and values[-1] >= 0.9, values
    assert max(row["train/train_rollout_logprob_abs_diff_max"] for row in read_metrics(tmp_path / "grpo") if "train/loss" in row) < 1e-4
