"""The quickstart's model, tokenizer, data and reward."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlmono import quickstart
from rlmono.data.prompts import open_source
from rlmono.data.rows import Rules
from rlmono.data.sample import Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rewards.load import load_function

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart") / "made"
    assert quickstart.make(path, SEED)
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problem(row: dict[str, Any]) -> tuple[int, int]:
    a, b = row["messages"][0]["content"].split("+")
    return int(a), int(b)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_bytes_for_the_same_seed(folder: Path, tmp_path: Path) -> None:
    quickstart.make(tmp_path / "again", SEED)
    assert digests(tmp_path / "again") == digests(folder)
    quickstart.make(tmp_path / "other", SEED + 1)
    same = {name for name, digest in digests(tmp_path / "other").items() if digest == digests(folder)[name]}
    assert same == {"model/config.json", "model/generation_config.json", "model/tokenizer.json", "model/tokenizer_config.json"}


def test_what_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not quickstart.make(folder, SEED)
    with pytest.raises(ValueError, match=r'has data made with .*"seed": 3.*remove it or name another folder'):
        quickstart.make(folder, SEED + 1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="has something else"):
        quickstart.make(tmp_path, SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))
    monkeypatch.setattr(quickstart, "write_data", full)
    with pytest.raises(OSError, match="No space left"):
        quickstart.make(tmp_path / "made", SEED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_held_out_problems_are_apart(tmp_path: Path, seed: int) -> None:
    """By unordered pair, from everything that is trained on; and together the sets are all problems."""
    quickstart.write_data(tmp_path, seed)
    sets = {name: [problem(row) for row in rows(tmp_path / f"{name}.jsonl")] for name in ("sft", "train", "eval", "shuffled")}
    held_out = {frozenset(pair) for pair in sets["eval"]}
    for name in ("sft", "train", "shuffled"):
        assert not held_out & {frozenset(pair) for pair in sets[name]}, name
    assert 200 <= len(sets["eval"]) <= 201
    assert sorted(sets["train"] + sets["eval"]) == [(a, b) for a in range(10, 50) for b in range(10, 50)]
    assert set(sets["sft"]) == set(sets["train"])


def test_labels(folder: Path) -> None:
    for name in ("train", "eval", "sft"):
        assert all(row["label"] == str(sum(problem(row))) for row in rows(folder / f"{name}.jsonl")), name
    train, shuffled = rows(folder / "train.jsonl"), rows(folder / "shuffled.jsonl")
    assert [row["messages"] for row in train] == [row["messages"] for row in shuffled]
    assert Counter(row["label"] for row in train) == Counter(row["label"] for row in shuffled)
    assert not any(a["label"] == b["label"] for a, b in zip(train, shuffled, strict=True))
    distances = {int(b["label"]) - int(a["label"]) for a, b in zip(train, shuffled, strict=True)}
    assert len(distances) > 100       # no rule that a policy could learn instead


def test_demonstrations_are_in_training_order(folder: Path) -> None:
    data = rows(folder / "sft.jsonl")
    assert len(data) == 1800 * 16
    for row in data:
        a, b = problem(row)
        answer = row["messages"][1]["content"]
        assert answer in (quickstart.worked_answer(a, b), quickstart.estimate(a, b))
    worked = ["=" in row["messages"][1]["content"] for row in data]
    assert all(worked[:1600 * 16]) and sum(worked[1600 * 16:]) == 0.3 * 200 * 16
    halves = sum(worked[1600 * 16:1700 * 16]) / (100 * 16), sum(worked[1700 * 16:]) / (100 * 16)
    assert all(0.25 < half < 0.35 for half in halves)
    assert quickstart.worked_answer(27, 35) == r"50+12=\boxed{62}" and quickstart.estimate(27, 35) == r"\boxed{50}"
    right = sum(f"boxed{{{row['label']}}}" in row["messages"][1]["content"] for row, w in zip(data, worked, strict=True) if not w)
    assert right / (0.7 * 200 * 16) < 0.03


@pytest.mark.parametrize("response, value", [
    (r"50+12=\boxed{62}<|end|>", 1.0), (r"\boxed{62}<|end|>", 1.0), (r"\boxed{50}\boxed{62}<|end|>", 1.0),
    (r"\boxed{62}\boxed{50}<|end|>", 0.0), (r"\boxed{62}", 0.0), (r"\boxed{62}<|end|>1", 0.0), (r"\boxed{062}<|end|>", 0.0),
    (r"\boxed{-62}<|end|>", 0.0), (r"\boxed{6+2}<|end|>", 0.0), ("62<|end|>", 0.0), ("<|end|>", 0.0), ("", 0.0),
])
def test_reward(response: str, value: float) -> None:
    reward = load_function("rlmono.quickstart.reward")
    assert reward(None, Sample(response=response, label="62")) == value
    assert reward(None, Sample(response=response, label=62)) == value


def test_prompts_and_demonstrations_as_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(str(folder / "model"))
    assert len(tokenizer) == 81 and tokenizer.eos_ids == (tokenizer.hf.convert_tokens_to_ids("<|end|>"),)
    for token in ("<pad>", "<|user|>", "<|assistant|>", "<|end|>", "\\boxed{"):
        assert len(tokenizer.render(token)) == 1
    assert tokenizer.decode(range(81)) == "".join(quickstart.VOCABULARY)
    assert tokenizer.render("".join(quickstart.VOCABULARY)) == list(range(81))
    evaluation = open_source(str(folder / "eval.jsonl"), Rules("messages", "label", label_required=True))
    assert {len(tokenizer.render(evaluation.row(i).prompt, None, True)) for i in range(len(evaluation))} == {8}
    sft = open_source(str(folder / "sft.jsonl"), Rules("messages"))
    trained = 0
    for i in range(0, len(sft), 40):
        messages = sft.row(i).prompt
        assert isinstance(messages, list)
        ids, mask = tokenizer.chat_with_mask(messages)
        answer = [token for token, m in zip(ids, mask, strict=True) if m]
        assert tokenizer.decode(answer) == messages[1]["content"] + "<|end|>" and mask[:8] == [0] * 8 and len(answer) <= 12
        trained += len(ids)
    assert 15 < trained / (len(sft) / 40) < 20


def test_transformers_loads_the_model(folder: Path) -> None:
    import torch

    from rlmono.engine.compat import _define_torchvision_ops

    _define_torchvision_ops()       # else transformers' model classes do not import beside a CPU torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.config.vocab_size == 81 and not model.config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == 10000.0 and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 266_944
    assert all(0.055 < p.std().item() < 0.065 for p in model.parameters() if p.dim() == 2)
    assert GenerationConfig.from_pretrained(folder / "model").eos_token_id == 2
    with torch.no_grad():
        logits = model(torch.tensor([[1, 7, 12, 16, 8, 10, 2, 3]])).logits
    assert logits.shape == (1, 8, 81) and bool(logits.isfinite().all())
