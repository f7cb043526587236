"""The shipped rewards against cases worked out by hand, and what their prompts are checked for."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlmono.config.rewards import REWARD_TYPES, RM_TYPES
from rlmono.config.schema import Config
from rlmono.data.prompts import open_source
from rlmono.data.rows import DataError, Rules
from rlmono.data.sample import Sample
from rlmono.rewards import check_prompt, dapo, deepscaler, f1, gpqa, label_required, random
from rlmono.rewards import math as math_reward
from rlmono.rewards.load import load_function
from rlmono.rewards.pool import RewardPool

# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("label, answer", [
    ("1,000,000", "1000000"), ("1234.5", "1,234.50"), (r"\frac{3}{4}", "0.75"), (r"-\frac{3}{4}", r"\frac{-3}{4}"), ("3/4", r"\tfrac34"),
    ("5", r"5\,\text{kg}"), ("90", r"90^{\circ}"), ("25", r"25\%"), ("18", r"\$18"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"2\pi", r"\pi\cdot 2"), ("x^2-1", "(x-1)(x+1)"), (r"\{1,2\}", r"\left\{1, 2\right\}"), ("(3,4]", r"\left(3,4\right]"),
    (r"\text{Monday}", "monday"), (r"10^{-3}", "0.001"), ("C", r"\textbf{C}"), ("12", r"\mathbf{12}"), ("7", r"n=7"), (r"3\sqrt{5}", r"\sqrt{45}"),
])
def test_two_spellings_of_one_answer(label: str, answer: str) -> None:
    for judge in (deepscaler.reward, math_reward.reward):
        assert judge(None, Sample(label=label, response=rf"<think>1</think>So \boxed{{{answer}}}")) == 1.0, judge
    for judge in (deepscaler.reward_of_answer, math_reward.reward_of_answer):
        assert judge(None, Sample(label=label, response=answer)) == 1.0
        assert judge(None, Sample(label=label, response="")) == 0.0
        assert judge(None, Sample(label=label, response=r"\frac{17}{3}")) == 0.0


@pytest.mark.parametrize("response, score, pred", [
    ("Answer: 34", 1.0, "34"), ("so\nAnswer: $34$", 1.0, "34"), (r"**Answer:** \boxed{34}", 1.0, "34"), ("ANSWER : 34.", 1.0, "34"),
    (r"Answer: $\boxed{34}$.", 1.0, "34"), ("Answer: 3\nAnswer: 34 apples", -1.0, "34apples"), ("Answer: 34 cm", 1.0, "34"),
    (r"Answer: \(34\)", 1.0, "34"), ("Answer: 34<|im_end|>", 1.0, "34"), ("Answer: 34<|eot_id|>\n", 1.0, "34"), ("Answer: 34</s>", 1.0, "34"),
    (r"Answer: 34\text{ cm}", 1.0, "34"),
    ("Answer: 33", -1.0, "33"), ("The answer is 34", -1.0, "[INVALID]"), (r"\boxed{34}", -1.0, "[INVALID]"), ("", -1.0, "[INVALID]"),
    ("Answer: 34\nthat is, Answer: 35", -1.0, "35"), ("Answer: 34" + "x" * 280, -1.0, "34" + "x" * 280), ("Answer: 34\n" + " " * 289, 1.0, "34"),
    ("Answer: 34\n" + " " * 300, -1.0, "[INVALID]"), ("Answer: 17+17", -1.0, "17+17"), ("Answer:\n34", 1.0, "34"),
])
def test_dapo(response: str, score: float, pred: str) -> None:
    """The last 300 characters: of `Answer: 34` and 289 spaces after a newline all are looked at, of one with 300 nothing."""
    assert dapo.reward(None, Sample(label="34", response=response)) == {"score": score, "acc": float(score > 0), "pred": pred}


@pytest.mark.parametrize("label, response", [("1000", "Answer: 1,000"), (r"\frac{1}{2}", "Answer: 1/2"), ("-5", "Answer: $-5$"), (34, "Answer: 34.0"),
                                             (["35", "34"], "Answer: 34"), (r"\boxed{34}", "Answer: 34")])
def test_dapo_has_one_spelling(label: Any, response: str) -> None:
    assert dapo.reward(None, Sample(label=label, response=response))["score"] == 1.0


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("label, response, value", [
    ("Paris", "paris", 1.0), ("the Eiffel Tower", "Eiffel tower!", 1.0), ("Eiffel Tower", "It is the Eiffel Tower", 2 * 2 / (4 + 2)),
    ("a b c d", "b c x", 2 * 2 / (3 + 3)), ("x x y", "x y y", 2 * 2 / (3 + 3)), ("x", "y", 0.0), ("x", "", 0.0), ("yes", "yes it is", 0.0),
    ("yes", "Yes.", 1.0), ("no", "yes", 0.0), (["London", "Paris"], "Paris", 1.0), ("Paris", "<think>London or Rome</think> Paris", 1.0),
    (1969, "in 1969", 2 * 1 / (2 + 1)), ("the", "a", 1.0), ("U.S.A.", "usa", 1.0), ("Paris", "Paris<|im_end|>", 1.0),
    ("yes", "<think>no</think>Yes<｜end▁of▁sentence｜>", 1.0),
])
def test_f1(label: Any, response: str, value: float) -> None:
    assert f1.reward(None, Sample(label=label, response=response)) == pytest.approx(value)


CHOICES = ["a helium atom", "a proton", "an electron", "B mesons"]


@pytest.mark.parametrize("response, letter", [
    (r"\boxed{B}", "B"), (r"\boxed{\text{B}}", "B"), (r"\boxed{\text{(B)}}", "B"), (r"\boxed{b}", "B"), (r"\boxed{A} no, \boxed{B}", "B"),
    (r"\boxed{\text{B) a proton}}", "B"), (r"\boxed{\text{a proton}}", "B"), ("The answer is (B) because of charge.", "B"), ("Answer: B", "B"),
    ("**Answer: B**", "B"), ("**Final answer:** B.", "B"), ("The correct option is C, not B", "C"), ("I would choose option (b).", "B"),
    ("Answer: A\nWait. Answer: C", "C"), ("<think>Answer: A</think>B", "B"), ("It is light.\n\n(C)", "C"), ("C. an electron", "C"),
    ("A proton", "B"), ("a helium atom", "A"), ("The answer is a proton", "B"), ("answer: A because it is", "A"), ("The answer is an electron.", "C"),
    ("The answer to this is hard.\nB", "B"), ("The correct answer is option D", "D"), ("no idea at all", None), ("", None), (r"\boxed{E}", None),
    ("Answer: Because it is so", None), ("A molecule of water is the thing", None), ("$B$", "B"), ("The choice must be D: B mesons", "D"),
    ("My answer is 'A'.", "A"), ("Hence it can only be (C).", "C"), ("The answer is not A, it is B", "B"), ("Either B, or C.", None),
    ("It is not D.", None),
    ("So C, which is lighter", "C"), ("Answer: A<|im_end|>", "A"), ("A<|im_end|>", "A"), (r"\boxed{" + "{" * 5000, None),
])
def test_gpqa_takes_the_letter_that_is_chosen(response: str, letter: str | None) -> None:
    for right in "ABCD":
        sample = Sample(label=right, response=response, metadata={"choices": CHOICES})
        assert gpqa.reward(None, sample) == float(letter == right), right


@pytest.mark.parametrize("label, metadata, letter", [
    ("B", {}, "B"), ("(b)", {}, "B"), (1, {"choices": CHOICES}, "B"), ("a proton", {"choices": CHOICES}, "B"), (None, {"correct_letter": "b"}, "B"),
    ("A", {"correct_letter": "B"}, "B"), ("J", {"valid_letters": list("ABCDEFGHIJ")}, "J"), ("Two", {"choices": {"x": "one", "y": "two"}}, "Y"),
    ("B mesons", {"choices": CHOICES}, "D"),
])
def test_gpqa_knows_the_right_choice(label: Any, metadata: dict[str, Any], letter: str) -> None:
    assert gpqa.target(label, metadata).letter == letter
    assert gpqa.reward(None, Sample(label=label, metadata=metadata, response=rf"\boxed{{{letter}}}")) == 1.0


def test_gpqa_without_letters_compares_the_text() -> None:
    for response, value in ((r"\boxed{\text{helium}}", 1.0), ("Helium.", 1.0), ("The answer is helium", 1.0), ("H", 0.0), ("neon", 0.0)):
        assert gpqa.reward(None, Sample(label="Helium", response=response)) == value


@pytest.mark.parametrize("label, metadata, text", [
    (None, {}, "nothing says which choice is right: give a label"), ("", {"choices": CHOICES}, "nothing says"),
    (4, {"choices": CHOICES}, "there are 4"),
    ("E", {"choices": CHOICES}, "the label 'E' is neither one of the letters ABCD nor the text"), (True, {}, "nothing says"),
    (None, {"correct_letter": "E", "choices": CHOICES}, "correct_letter is 'E', but the letters are ABCD"),
    ("A", {"choices": "ab"}, "choices must be"),
])
def test_gpqa_refuses_a_prompt_without_a_right_choice(label: Any, metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gpqa.check(label, metadata)


def test_random_is_a_fair_coin_that_falls_the_same_again() -> None:
    def tosses(seed: int) -> list[float]:
        return [random.reward(SimpleNamespace(rollout_seed=seed), Sample(index=i, group_index=i // 4)) for i in range(2000)]
    first = tosses(1)
    assert tosses(1) == first and set(first) == {0.0, 1.0}
    assert 900 < sum(first) < 1100                                                  # 4.5 standard deviations
    assert 900 < sum(a == b for a, b in zip(first, tosses(2), strict=True)) < 1100


# ---------------------------------------------------------------- by their names


def test_every_reward_is_there() -> None:
    assert set(RM_TYPES) == {*REWARD_TYPES, *(f"boxed_{name}" for name in REWARD_TYPES)}
    for kind in REWARD_TYPES.values():
        for path in filter(None, (kind.path, kind.answer_path, kind.check_path)):
            assert load_function(path).__doc__, path
            assert (importlib.import_module(path.rpartition(".")[0]).__doc__ or "").count("--rm-type") == 1


def test_boxed_takes_the_box_first() -> None:
    """A response with the right answer in its box, one with it beside the box, and one without a box; all rewards in one pool."""
    right: dict[str, tuple[Any, str]] = {
        "deepscaler": ("62", "62"), "dapo": ("62", "62"), "math": ("62", r"2\cdot 31"),
        "f1": ("Eiffel Tower", "the Eiffel tower"), "gpqa": ("B", "B")}

    async def main() -> None:
        pool = RewardPool(Config(rm_type="boxed_math", reward_key="score"))
        await pool.start()
        try:
            for name, (label, answer) in right.items():
                responses = (rf"<think>no</think> It is \boxed{{{answer}}}, I think", rf"{answer} \boxed{{nothing}}", f"Answer: {answer}")
                samples = [Sample(label=label, response=r, metadata={"rm_type": f"boxed_{name}"}) for r in responses]
                values = [r.value for r in await asyncio.gather(*map(pool.score, samples))]
                low = -1.0 if name == "dapo" else 0.0
                assert [v["score"] if isinstance(v, dict) else v for v in values] == [1.0, low, low], name
            assert samples[0].response.startswith("<think>")        # only the worker's copy has changed
        finally:
            await pool.close()
    asyncio.run(asyncio.wait_for(main(), 50))


def options(**values: Any) -> Any:
    none = dict.fromkeys(("custom_rm_path", "rm_type", "rm_url", "reward_key", "custom_generate_function_path"))
    return SimpleNamespace(**{**none, **values})


@pytest.mark.parametrize("args, label, metadata, text", [
    ({}, "1", {}, "there is no reward: set --rm-type"),
    ({}, "1", {"rm_type": "maths"}, "rm_type of the sample's metadata is 'maths', but must be one of deepscaler, dapo"),
    ({"rm_type": "random"}, None, {"rm_type": "math"}, "has no label, and the reward math .rm_type of the sample's metadata. compares with one"),
    ({}, None, {"rm_type": "remote_rm"}, "rm_type of the sample's metadata is remote_rm, and there is no --rm-url"),
    ({}, "1", {"rm_type": "dapo"}, "returns a dict: name the key of its number with --reward-key score"),
    ({"rm_type": "gpqa"}, None, {}, "nothing says which choice is right"),
    ({"rm_type": "boxed_gpqa"}, None, {}, "nothing says which choice is right"),
])
def test_a_prompt_that_cannot_be_judged_is_refused(args: dict[str, Any], label: Any, metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_prompt(options(**args), label, metadata)
    check_prompt(options(**args, custom_rm_path="my.own"), label, metadata)


def test_prompts_that_can_be_judged() -> None:
    check_prompt(options(rm_type="math"), "1", {})
    check_prompt(options(rm_type="math"), None, {"rm_type": "random"})
    check_prompt(options(rm_type="gpqa"), None, {"correct_letter": "C"})
    check_prompt(options(custom_generate_function_path="it.gives.rewards"), None, {})
    assert [label_required(options(rm_type=name)) for name in ("math", "boxed_dapo", "random", None)] == [True, True, False, False]
    assert not label_required(options(rm_type="math", custom_rm_path="my.own"))


def test_a_line_that_cannot_be_judged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "1+1", "label": "2"}\n{"input": "which?", "metadata": {"rm_type": "gpqa"}}\n'
                    '{"input": "any", "metadata": {"rm_type": "random"}}\n')

    def rows(skip: bool) -> int:
        rules = Rules(label_key="label", label_required=True, skip_bad_rows=skip,
                      check=lambda p: check_prompt(options(rm_type="math"), p.label, p.metadata))
        return len(open_source(str(path), rules))
    with pytest.raises(DataError, match=r"data.jsonl:2: gpqa: nothing says which choice is right.*--skip-bad-rows"):
        rows(skip=False)
    assert rows(skip=True) == 2
