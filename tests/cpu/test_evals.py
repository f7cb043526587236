"""Evaluation sets from flags and from YAML, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlmono.config.evals import EvalSet, eval_sets
from rlmono.config.option import ConfigError
from rlmono.config.schema import Config
from rlmono.config.sources import resolve
from rlmono.data.sample import Sample
from rlmono.rollout.batch import eval_statistics
from rlmono.rollout.sampling import eval_sampling


def config(**values: Any) -> Config:
    return Config(**({"rollout_max_response_len": 100, "rollout_temperature": 0.9, "rollout_stop_token_ids": (7,), "input_key": "q"} | values))


def from_yaml(tmp_path: Path, text: str, **values: Any) -> tuple[EvalSet, ...]:
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return eval_sets(config(eval_config=str(path), **values))


def test_sets_of_flags_fall_back_to_the_rollouts_values() -> None:
    a, b = eval_sets(config(eval_prompt_data=("a", "/a.jsonl", "b", "/b.jsonl@[:9]"), eval_top_p=0.7, eval_temperature=0.0, eval_label_key="answer",
                            n_samples_per_eval_prompt=4))
    assert (a.name, a.path, b.path) == ("a", "/a.jsonl", "/b.jsonl@[:9]")
    assert (a.temperature, a.top_p, a.top_k, a.max_response_len, a.n_samples_per_eval_prompt) == (0.0, 0.7, -1, 100, 4)
    assert (a.input_key, a.label_key, a.rm_type) == ("q", "answer", None)
    sampling = eval_sampling(b, (2,))
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.stop_token_ids) == (100, 0.0, 0.7, (2, 7))


def test_sets_of_yaml_have_their_own_the_defaults_and_the_flags_values(tmp_path: Path) -> None:
    a, b = from_yaml(tmp_path, """
        eval:
          defaults: {temperature: 0.6, n_samples_per_eval_prompt: 4}
          datasets:
            - {name: aime, path: /a.jsonl, n_samples_per_eval_prompt: 16, rm_type: deepscaler, label_key: answer}
            - {name: gpqa, path: "/b.parquet@[:100]", custom_rm_path: my.reward, reward_key: acc, top_k: 5, metadata_overrides: {source: b}}
        """, eval_max_response_len=50, reward_key="score")
    assert (a.n_samples_per_eval_prompt, b.n_samples_per_eval_prompt) == (16, 4)
    assert (a.temperature, a.max_response_len, a.label_key, b.label_key) == (0.6, 50, "answer", None)
    assert (b.top_k, b.metadata_overrides, a.reward_key, b.reward_key) == (5, {"source": "b"}, "score", "acc")
    seen = a.config(config(custom_rm_path="trains.with"))
    assert (seen.rm_type, seen.custom_rm_path) == ("deepscaler", None)
    short = from_yaml(tmp_path, "datasets: {a: /a.jsonl, b: {path: /b.jsonl, top_p: 0.5}}")
    assert [(s.name, s.path, s.top_p) for s in short] == [("a", "/a.jsonl", 1.0), ("b", "/b.jsonl", 0.5)]


@pytest.mark.parametrize(("text", "problem"), [
    ("datasets: [", "is not YAML: while parsing"),
    ("- a", "needs `datasets`, a list of sets with name and path each"),
    ("datasets: []", "needs `datasets`"),
    ("sets: {a: /a.jsonl}", "has sets, but its sections are defaults and datasets"),
    ("datasets: [{path: /a.jsonl}]", "set '?': Object missing required field name"),
    ("datasets: [{name: a/b, path: /a.jsonl}]", "set 'a/b': Expected str matching regex"),
    ("datasets: [{name: a}]", "set 'a': Object missing required field path"),
    ("datasets: {a: {path: /a, temprature: 1}}", "set 'a': temprature is not an option of a set; did you mean temperature?"),
    ("datasets: {a: {path: /a, temperature: hot}}", "set 'a': Expected float, got str - at temperature"),
    ("datasets: {a: {path: /a, top_p: 2}}", "set 'a': Expected float <= 1.0 - at top_p"),
    ("datasets: {a: {path: /a, n_samples_per_eval_prompt: 0}}", "set 'a': Expected int >= 1 - at n_samples_per_eval_prompt"),
    ("defaults: {top_kk: 1}\ndatasets: {a: /a}", "set 'a': top_kk is not an option of a set; did you mean top_k?"),
    ("datasets: [{name: a, path: /a}, {name: a, path: /b}]", "two sets are called 'a'"),
    ("datasets: {a: {path: /a, rm_type: math, custom_rm_path: my.reward}}", "set 'a': has rm_type and custom_rm_path"),
])
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, text)
    assert f"eval_config {tmp_path}/eval.yaml" in str(error.value) and problem in str(error.value)


def test_a_run_is_refused_with_the_files_problems(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("datasets: {a: {path: /nowhere.jsonl, rm_type: maths}, b: {path: /nowhere.parquet, custom_rm_path: nonsense}, "
                    "c: {path: /nowhere.jsonl, rm_type: dapo, label_key: x}}")
    with pytest.raises(ConfigError) as error:
        resolve(["--eval-config", str(path), "--eval-prompt-data", "c", "/c.jsonl"], {})
    told = str(error.value)
    for problem in ("eval_config /nowhere.jsonl: there is no such file", "eval_config and eval_prompt_data both name sets",
                    "set 'b': custom_rm_path nonsense is not of the form module.function", "set 'a': rm_type maths is none of deepscaler, ",
                    "set 'c': rm_type dapo returns a dict: name the key of its number with --reward-key score"):
        assert problem in told
    with pytest.raises(ConfigError, match="eval_config /none.yaml cannot be read: No such file"):
        resolve(["--eval-config", "/none.yaml"], {})


def test_statistics_of_a_set() -> None:
    groups = [[Sample(reward={"acc": float(i < right)}, response_length=3, status="truncated" if i == 0 else "completed") for i in range(4)]
              for right in (4, 1, 0)]
    values = eval_statistics("x", groups, config(reward_key="acc"))
    assert values["eval/x"] == pytest.approx(5 / 12) and values["eval/x/truncated_ratio"] == 0.25 and values["eval/x/samples"] == 12
    assert values["eval/x/pass_at_2"] == pytest.approx((1 + 0.5 + 0) / 3) and values["eval/x/pass_at_4"] == pytest.approx(2 / 3)
    assert "eval/x/pass_at_8" not in values
    json.dumps(values)
