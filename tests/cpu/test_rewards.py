"""Rewards, how functions are loaded, and the pool that runs them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standin import Standin, make_config, make_folder

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.rewards import Judge, RewardError, deepscaler, judge_of
from rlmono.rewards import math as math_reward
from rlmono.rewards.answers import labels_of, last_boxed, normalise
from rlmono.rewards.load import LoadError, load_function
from rlmono.rewards.pool import RewardPool, RewardResult
from rlmono.rollout.batch import eval_statistics, rollout_statistics
from rlmono.world.messages import GroupDone

# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("text, boxed", [
    (r"so \boxed{62}.", "62"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed {3}", "3"), (r"\fbox{4}", "4"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), ("62", None), (r"\boxed{6", None), (r"\boxed{1} \boxed{\frac{1}{2}", None), (r"\boxed{}", ""),
])
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize("spellings, normal", [
    ([" 62 ", "62.", "62.0", "{62}", "$62$", r"\$62", r"62\%", r"62^\circ", r"62^{\circ}", "x = 62", r"\text{62}"], "62"),
    ([r"5\text{ cm}", r"5 \mathrm{~cm}^2", "5", "5 cm", "5 square feet", "5 km^2", "5 hours.", "5°", "+5", r"\(5\)", "5 percent"], "5"),
    (["-3", "\N{MINUS SIGN}3"], "-3"), (["1500", "1.5e3", "1,500", "1.5E+3"], "1500"), (["0.002", "2e-3"], "0.002"),
    (["1 1/2", r"1\frac{1}{2}", r"1 \frac12"], r"1\frac{1}{2}"), (["5m", "5 m"], "5m"), (["2e", "2 e"], "2e"),
    (["1/2", r"\frac12", r"\dfrac{1}{2}", r"\tfrac 1 2", r"\frac1{2}", r"\frac{1}2"], r"\frac{1}{2}"),
    ([r"-\frac{1}{3}", r"\frac{-1}{3}", "-1/3"], r"-\frac{1}{3}"),
    ([".5", "0.50", "0.5"], "0.5"), (["1,234,567", r"1{,}234{,}567", r"1\,234\,567", "1234567"], "1234567"),
    ([r"\left(1,\, 2\right)", "(1,2)"], "(1,2)"), ([r"\sqrt3", r"\sqrt{3}"], r"\sqrt{3}"),
    ([r"\text{No Solution}", "no solution"], "no solution"), ([r"\pi r", r"\pi  r"], r"\pi r"), (["100", "100.00"], "100"),
])
def test_normalise(spellings: list[str], normal: str) -> None:
    assert {spelling: normalise(spelling) for spelling in spellings} == dict.fromkeys(spellings, normal)


@pytest.mark.parametrize("label, answers", [("62", ["62"]), (62, ["62"]), (62.0, ["62"]), (0.5, ["0.5"]), (["1", 2], ["1", "2"]),
                                            (r"= \boxed{7}", ["7"])])
def test_labels(label: Any, answers: list[str]) -> None:
    assert labels_of(Sample(label=label)) == answers


@pytest.mark.parametrize("label", [None, "", [], [None]])
def test_a_missing_label_names_the_line(label: Any) -> None:
    with pytest.raises(ValueError, match="train.jsonl:7 has no label; set --label-key"):
        labels_of(Sample(label=label, metadata={"source": "train.jsonl:7"}))
    with pytest.raises(ValueError, match=r"sample 12 \(prompt 3\) has no label"):
        labels_of(Sample(index=12, group_index=3, label=label))
    with pytest.raises(ValueError, match="must be a string, a number"):
        labels_of(Sample(label={"answer": 1}))


EQUAL = [("62", "62"), ("62", "62.0"), ("007", "7"), ("1,234", "1234"), ("5", r"x=5\text{ cm}"), (r"\frac12", "0.5"),
         (r"2\sqrt{2}", r"\sqrt{8}"), ("x^2+2x+1", "(x+1)^2"), ("(1,2)", "(1, 2)"),
         (r"(\frac12,\sqrt{8})", r"(0.5, 2\sqrt2)"), (r"[0,\infty)", r"[0, \infty)"),
         (r"\frac{\pi}{2}", r"0.5\pi"), ("2^{10}", "2^10"), ("Evelyn", r"\text{evelyn}"),
         (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")]
UNEQUAL = [("62", "63"), ("62", ""), ("east", "seat"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2,3)"),
           ("0.333", "1/3"), (r"\frac12", r"\frac13"), ("x+1", "x+2"), ("x", r"\frac{"), ("1", r"1 \text{ or } 2")]


@pytest.mark.parametrize("reward", [deepscaler.reward, math_reward.reward])
@pytest.mark.parametrize("label, answer, value", [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in UNEQUAL])
def test_equal_and_unequal_answers(reward: Callable[..., float], label: str, answer: str, value: float) -> None:
    assert reward(None, Sample(label=label, response=rf"<think>\boxed{{0}}</think>It is \boxed{{{answer}}}.")) == value
    assert reward(None, Sample(label=["no", label], response=rf"<think></think>\boxed{{{answer}}}")) == value


@pytest.mark.parametrize("label, answer", [("62", "27+35"), (r"\frac12", r"\frac24"), ("1000", "10^3"), ("7", "9^{9^{9^9}}"),
                                           ("x", "9^{9^{9^9}}"), ("x", "x^{999}-(x+1)^{999}")])
def test_deepscaler_wants_it_worked_out(label: str, answer: str) -> None:
    assert deepscaler.reward(None, Sample(label=label, response=rf"</think>\boxed{{{answer}}}")) == 0.0


@pytest.mark.parametrize("response, value", [
    (r"\boxed{62}", 0.0), (r"<think>\boxed{62}</think> so 62", 0.0), (r"<think>\boxed{1}</think>\boxed{62}", 1.0),
    (r"hm ###Response \boxed{62}", 1.0), (r"###Response \boxed{62}</think>\boxed{1}", 0.0), (r"</think>\boxed{1}\boxed{62}", 1.0),
])
def test_deepscaler_takes_the_answer_after_the_thinking(response: str, value: float) -> None:
    assert deepscaler.reward(None, Sample(label=62, response=response)) == value


def test_math_needs_no_thinking_but_a_box() -> None:
    assert math_reward.reward(None, Sample(label="62", response=r"\boxed{27+35}")) == 1.0
    assert math_reward.reward(None, Sample(label="62", response="62")) == 0.0


def test_a_response_is_never_run_as_code(tmp_path: Path) -> None:
    """sympy's own parser evaluates text as Python."""
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for reward in (deepscaler.reward, math_reward.reward):
        for response in (rf"</think>\boxed{{{code}}}", rf"</think>\boxed{{1+{code}}}"):
            assert reward(None, Sample(label="2", response=response)) == 0.0
    assert not mark.exists()


# ---------------------------------------------------------------- which function, and loading it


def test_priority() -> None:
    """The sample's own, --custom-rm-path, the metadata's rm_type, --rm-type; `boxed_` is not part of the name."""
    args, named = SimpleNamespace(custom_rm_path=None, rm_type="math"), {"rm_type": "deepscaler"}
    assert judge_of(args, Sample()) == Judge("rlmono.rewards.math.reward")
    assert judge_of(args, Sample(metadata=named)) == Judge("rlmono.rewards.deepscaler.reward")
    assert judge_of(args, Sample(metadata={"rm_type": "boxed_f1"})) == Judge("rlmono.rewards.f1.reward", boxed=True)
    assert judge_of(args, Sample(metadata={"rm_type": "boxed_math"})) == Judge("rlmono.rewards.math.reward_of_answer", boxed=True)
    args.custom_rm_path = "my.reward"
    assert judge_of(args, Sample(metadata=named)) == Judge("my.reward", custom=True)
    assert judge_of(args, Sample(metadata=named, custom_rm_path="its.own")) == Judge("its.own", custom=True)
    assert judge_of(args, Sample(metadata=named, rm_type="boxed_f1")) == Judge("rlmono.rewards.f1.reward", boxed=True)
    for name in ("x", "boxed_x", ["math"], 3):
        with pytest.raises(RewardError, match="rm_type of the sample's metadata is .*, but must be one of deepscaler, dapo, math, f1"):
            judge_of(SimpleNamespace(custom_rm_path=None, rm_type="math"), Sample(metadata={"rm_type": name}))
    with pytest.raises(RewardError, match="there is no reward: set --rm-type"):
        judge_of(SimpleNamespace(custom_rm_path=None, rm_type=None), Sample())


def test_load_function(tmp_path: Path) -> None:
    assert load_function("rlmono.rewards.math.reward") is math_reward.reward
    (tmp_path / "mine.py").write_text("value = 3\ndef score(): return 7\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    assert load_function(f"{tmp_path}/mine.py:score")() == 7
    for path, problem in ((f"{tmp_path}/mine.py:scores", "has no 'scores'; near: score"),
                          (f"{tmp_path}/mine.py:value", "is no function but a int"),
                          (f"{tmp_path}/no.py:f", "is not a Python file"), (f"{tmp_path}/broken.py:f", "SyntaxError"),
                          (f"{tmp_path}/needs.py:f", "No module named 'no_such_package'"), ("score", "names no function"),
                          ("no_such_package.f", "PYTHONPATH"), ("rlmono.rewards.math.rewards", "has no 'rewards'; near: reward")):
        with pytest.raises(LoadError) as error:
            load_function(path)
        assert path in str(error.value) and problem in str(error.value)


# ---------------------------------------------------------------- the pool

REWARDS = '''
import asyncio, ctypes, math, os, sys, time
from pathlib import Path
import numpy as np
from rlmono.rewards import RewardFailure

CYCLE = {"score": 1.0}
CYCLE["self"] = CYCLE
KEPT = []

def plain(args, sample, **kwargs):
    """Does what the response says."""
    word, _, rest = sample.response.partition(" ")
    if word == "hang":
        while True: pass
    if word == "wait": return 1.0
    if word == "sleep": time.sleep(float(rest))
    if word == "raise": raise RuntimeError("a fault of the reward")
    if word == "named": raise RewardFailure("judge_is_ill", "with a cold")
    if word == "exit": sys.exit(3)
    if word == "die": os.kill(os.getpid(), 11)
    if word == "leave": os._exit(4)
    if word == "print": print("noise", flush=True); sys.stdin.read()
    if word == "args": return args.rollout_batch_size + 0.5 * (args.prompt_data is None)
    if word == "leak":
        while True: KEPT.append(bytearray(1 << 26))
    if word == "some": bytearray(1 << 27)
    if word == "segfault": ctypes.string_at(0)
    return {"nan": math.nan, "inf": -math.inf, "none": None, "text": "1", "true": True, "numpy": np.float32(0.5), "list": [1.0],
            "dict": {"score": 0.25, "pred": np.int64(3)}, "large": {"score": 1, "pred": "x" * (17 << 20)} if word == "large" else 0, "cycle": CYCLE,
            "baddict": {"score": None}, "pid": float(os.getpid())}.get(word, 1.0)

async def waits(args, sample, **kwargs):
    word, _, rest = sample.response.partition(" ")
    if word == "block": time.sleep(30)
    if word == "raise": raise asyncio.TimeoutError("of a judge")
    if word == "die": os._exit(1)
    if word in ("leak", "some"): await asyncio.sleep(0.1); plain(args, sample)
    await asyncio.sleep(float(rest or 0))
    return 1.0

def whole(args, samples, **kwargs):
    """Of a group: each sample's share of its characters; or what the first response says."""
    word = samples[0].response
    if word == "hang":
        while True: pass
    if word == "segfault": ctypes.string_at(0)
    if word == "memory": bytearray(1 << 31)
    total = sum(len(s.response) for s in samples)
    shares = [len(s.response) / total for s in samples]
    return {"short": shares[1:], "one": 1.0, "array": np.array(shares), "holes": [*shares[:-1], math.nan],
            "dicts": [{"score": s, "of": len(samples)} for s in shares]}.get(word, shares)

async def whole_async(args, samples, **kwargs):
    await asyncio.sleep(0.2)
    return [float(len(samples))] * len(samples)

class Judge:
    async def __call__(self, args, sample):
        await asyncio.sleep(0.2)
        return 2.0
judge = Judge()
'''


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., None]:
    """`use(body, function="plain", **args)`: runs a coroutine function with a started pool."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def use(body: Callable[[RewardPool], Coroutine[Any, Any, None]], function: str = "plain", **args: Any) -> None:
        args = {"reward_timeout_s": 1.0, **args}
        config = Config(custom_rm_path=f"{tmp_path}/mine.py:{function}", **args)

        async def main() -> None:
            pool = RewardPool(config)
            await pool.start()
            try:
                await body(pool)
            finally:
                await pool.close()
        asyncio.run(asyncio.wait_for(main(), 50))
    return use


async def scores(pool: RewardPool, *responses: str) -> list[RewardResult]:
    return await asyncio.gather(*(pool.score(Sample(index=i, response=response)) for i, response in enumerate(responses)))


def test_values(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        assert [r.value for r in await scores(pool, "", "true", "numpy", "args", "print")] == [1.0, 1.0, 0.5, 32.5, 1.0]
        own = await pool.score(Sample(response="raise", reward=0.75))
        assert own == RewardResult(0.75, None) and pool.outcomes == {"ok": 5}
    use(body)


def test_failures_are_counted_outcomes(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    responses = ("ok", "raise", "nan", "ok", "inf", "none", "text", "list", "dict", "raise", "exit", "named", "ok")

    async def body(pool: RewardPool) -> None:
        with caplog.at_level(logging.WARNING):
            results = await scores(pool, *responses)
        assert [r.remark for r in results] == [None, "reward_error", "reward_invalid", None, *["reward_invalid"] * 5, "reward_error",
                                               "reward_error", "judge_is_ill", None]
        assert [r.value for r in results] == [float(response == "ok") for response in responses]
        assert pool.outcomes == {"ok": 3, "reward_error": 3, "reward_invalid": 6, "judge_is_ill": 1}
    use(body)
    assert caplog.text.count("RuntimeError: a fault of the reward") == 1 and "mine.py" in caplog.text
    assert "judge_is_ill at sample 11 (reward 0; counted, and not shown again for this cause): with a cold" in caplog.text
    assert "SystemExit: 3" in caplog.text and "name the key of its number with --reward-key" in caplog.text


def test_dict_rewards(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        assert [tuple(r) for r in await scores(pool, "dict", "baddict", "raise", "large", "cycle", "ok")] == [
            ({"score": 0.25, "pred": 3}, None), ({"score": 0.0}, "reward_invalid"), ({"score": 0.0}, "reward_error"),
            ({"score": 0.0}, "reward_invalid"), ({"score": 0.0}, "reward_invalid"), (1.0, None)]
    use(body, reward_key="score")


@pytest.mark.parametrize("fault, remark", [("hang", "reward_timeout"), ("sleep 30", "reward_timeout"), ("die", "reward_crashed"),
                                           ("leave", "reward_crashed"), ("segfault", "reward_crashed")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_worker_costs_one_sample(use: Callable[..., None], caplog: pytest.LogCaptureFixture, fault: str, remark: str,
                                        workers: int) -> None:
    async def body(pool: RewardPool) -> None:
        with caplog.at_level(logging.WARNING):
            results = await scores(pool, *["ok"] * 10, fault, *["ok"] * 10, fault, "ok")
        assert [r.remark for r in results] == [None] * 10 + [remark] + [None] * 10 + [remark, None]
        assert pool.outcomes == {"ok": 21, remark: 2}
    use(body, reward_workers=workers)
    assert caplog.text.count(f"{remark} at sample") == 1


def test_a_stalled_loop_does_not_make_rewards_late(use: Callable[..., None]) -> None:
    """The pool's process was busy for longer than the deadline, while the worker had long answered."""
    async def body(pool: RewardPool) -> None:
        waiting = asyncio.ensure_future(scores(pool, "sleep 0.1", "sleep 0.1"))
        await asyncio.sleep(0.05)
        time.sleep(1.5)
        assert [r.remark for r in await waiting] == [None, None]
    use(body)


def test_async_rewards_work_at_the_same_time(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        results = await scores(pool, *["wait 0.5"] * 60, "wait 30", "raise")       # one after the other, only two would be in time
        assert [r.remark for r in results] == [None] * 60 + ["reward_timeout", "reward_error"]
    use(body, "waits")

    async def called(pool: RewardPool) -> None:
        assert {r.value for r in await scores(pool, *[""] * 40)} == {2.0}
    use(called, "judge")


def test_an_async_reward_that_blocks_or_dies(use: Callable[..., None]) -> None:
    """It may take others down with it: they are tried again, each alone."""
    async def blocks(pool: RewardPool) -> None:
        results = await scores(pool, "block")
        assert results[0].remark == "reward_timeout"
        assert (await scores(pool, "wait 0.1"))[0].remark is None
    use(blocks, "waits", reward_timeout_s=0.4)

    async def dies(pool: RewardPool) -> None:
        results = await scores(pool, "wait 0.1", "die", "wait 0.1", "die", *["wait 0.1"] * 3)
        assert [r.remark for r in results] == [None, "reward_crashed", None, "reward_crashed", None, None, None]
        assert [r.remark for r in await scores(pool, *["wait 0.1"] * 20)] == [None] * 20
    use(dies, "waits", reward_timeout_s=2.0)


def test_a_reward_that_cannot_be_loaded_stops_the_start(use: Callable[..., None], tmp_path: Path) -> None:
    async def body(pool: RewardPool) -> None:
        raise AssertionError("it started")
    with pytest.raises(RewardError, match="the reward cannot be loaded: .*has no 'plane'; near: plain"):
        use(body, "plane")
    (tmp_path / "dies.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(RewardError, match="died while it imported .*dies.py:f: .*exit code 5"):
        asyncio.run(RewardPool(Config(custom_rm_path=f"{tmp_path}/dies.py:f")).start())


def test_a_worker_that_does_not_come_up_again_ends_the_run(use: Callable[..., None], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmono.rewards.lane.RESTARTS", 1)

    async def body(pool: RewardPool) -> None:
        (tmp_path / "mine.py").write_text("syntax error")
        with pytest.raises(RewardError, match="cannot be loaded: .*SyntaxError"):
            await scores(pool, "leave", "ok", "ok")
        with pytest.raises(RewardError, match="SyntaxError"):
            await scores(pool, "ok")
    use(body, reward_workers=1)


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (7, 1), (16, 4), (32, 8), (256, 8)])
def test_workers_by_cores(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    pool = RewardPool(Config())
    assert len(pool._new_lane([], False)._workers) == workers
    assert len(RewardPool(Config(reward_workers=3))._new_lane([], False)._workers) == 3


@pytest.mark.parametrize("function", ["plain", "waits"])
def test_memory_that_a_reward_takes_and_keeps_costs_no_other_sample(use: Callable[..., None], function: str) -> None:
    async def body(pool: RewardPool) -> None:
        results = await scores(pool, "some", "leak", "some", "some")
        assert [r.remark for r in results] == [None, "reward_out_of_memory", None, None]
        assert pool.outcomes == {"ok": 3, "reward_out_of_memory": 1}
    use(body, function, reward_memory_limit_gb=0.5, reward_timeout_s=10.0, reward_workers=1)
    assert Config().reward_memory_limit_gb == 4.0


# ---------------------------------------------------------------- groups, and functions of both kinds


def group(*responses: str, **values: Any) -> list[Sample]:
    return [Sample(index=i, response=response, **values) for i, response in enumerate(responses)]


def test_a_group_is_one_call(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        assert await pool.score_group(group("a", "bb", "c")) == [(0.25, None), (0.5, None), (0.25, None)]
        assert [r.value for r in await pool.score_group(group("array", "12345"))] == [0.5, 0.5]
        assert await pool.score_group([]) == []
        samples = group("aa", "b", "c")
        samples[1].reward = 0.875
        await pool.reward(samples, group=True)      # its own wins, and yet it is compared with
        assert [s.reward for s in samples] == [0.5, 0.875, 0.25] and not any(s.remarks for s in samples)
    use(body, "whole", group_rm=True)


def test_a_failure_of_a_group_is_its_own(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    async def body(pool: RewardPool) -> None:
        faults = {"hang": "reward_timeout", "segfault": "reward_crashed", "memory": "reward_out_of_memory", "short": "reward_invalid",
                  "one": "reward_invalid"}
        groups = [group(word, "x") for word in faults for word in ("fine", word)]
        with caplog.at_level(logging.WARNING):
            results = await asyncio.gather(*map(pool.score_group, groups))
        for (word, remark), good, bad in zip(faults.items(), results[::2], results[1::2], strict=True):
            assert good == [(0.8, None), (0.2, None)] and bad == [(0.0, remark)] * 2, word
        assert [r.remark for r in await pool.score_group(group("holes", "y", "z"))] == [None, None, "reward_invalid"]
        assert pool.outcomes == {"ok": 12, "reward_timeout": 2, "reward_crashed": 2, "reward_out_of_memory": 2, "reward_invalid": 5}
    use(body, "whole", group_rm=True, reward_memory_limit_gb=0.5, reward_timeout_s=1.0)
    assert "at sample 0 and 1 others of its group" in caplog.text and "is no list of 2 values, one for each sample of the group" in caplog.text


def test_groups_with_keys_and_async_functions(use: Callable[..., None], tmp_path: Path) -> None:
    async def dicts(pool: RewardPool) -> None:
        assert [r.value for r in await pool.score_group(group("dicts", "12345"))] == [{"score": 0.5, "of": 2}] * 2
        assert await pool.score_group(group("one", "x")) == [({"score": 0.0}, "reward_invalid")] * 2
        # Samples of one group with a function of their own, beside those without.
        mixed = [*group("a", "b"), *group("c", "d", "e", custom_rm_path=f"{tmp_path}/mine.py:whole_async")]
        assert [r.value for r in await pool.score_group(mixed)] == [0.5, 0.5, 3.0, 3.0, 3.0]
    use(dicts, "whole", group_rm=True, reward_key="score")


def test_a_shipped_reward_judges_each_of_a_group() -> None:
    async def main() -> None:
        pool = RewardPool(Config(rm_type="math", group_rm=True))
        await pool.start()
        try:
            assert [r.value for r in await pool.score_group(group(r"\boxed{2}", r"\boxed{3}", label="2"))] == [1.0, 0.0]
        finally:
            await pool.close()
    asyncio.run(asyncio.wait_for(main(), 50))


def test_sync_and_async_rewards_do_not_hold_each_other_up(use: Callable[..., None], tmp_path: Path) -> None:
    """Whichever the option names, a sample's own function of the other kind has workers of its own; a hang there costs nothing here."""
    def mixed(own: str) -> list[Sample]:
        path = f"{tmp_path}/mine.py:{own}"
        return [Sample(index=i, response="wait 0.3", custom_rm_path=path if i % 2 else None) for i in range(40)]

    async def body(pool: RewardPool, own: str, hung: Sample) -> None:
        jobs = [asyncio.ensure_future(pool.score(s)) for s in (hung, *mixed(own))]
        results = await asyncio.gather(*jobs)
        assert [r.remark for r in results] == ["reward_timeout"] + [None] * 40
    hang = Sample(response="hang", custom_rm_path=f"{tmp_path}/mine.py:plain")
    use(lambda pool: body(pool, "waits", hang), "plain", reward_timeout_s=3.0)
    use(lambda pool: body(pool, "plain", hang), "waits", reward_timeout_s=3.0)


def test_a_function_of_a_sample_that_cannot_be_loaded_costs_the_sample(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        samples = [Sample(response="ok", custom_rm_path="no.such.function"), Sample(response="ok")]
        assert [r.remark for r in await asyncio.gather(*map(pool.score, samples))] == ["reward_error", None]
    use(body)


def test_at_most_reward_concurrency_at_a_time(use: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(textwrap.dedent("""
        import asyncio, os
        now = 0
        async def most(args, sample):
            global now
            now += 1
            seen = now
            await asyncio.sleep(0.02)
            now -= 1
            return seen + 1000 * os.getpid()
    """))

    async def body(pool: RewardPool) -> None:
        samples = [Sample(custom_rm_path=f"{tmp_path}/count.py:most") for _ in range(60)]
        values = [r.value for r in await asyncio.gather(*map(pool.score, samples))]
        most: dict[int, int] = {}
        for value in values:
            assert isinstance(value, float)
            worker, seen = divmod(int(value), 1000)
            most[worker] = max(most.get(worker, 0), seen)
        assert sorted(most.values()) == [2, 3]
    use(body, reward_workers=2, reward_concurrency=5, reward_timeout_s=5.0)


def test_a_sample_may_have_a_key_of_its_own(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        sample, config = Sample(response="dict"), pool._args
        assert (await pool.score(sample)).remark is None
        await pool.reward([sample])
        assert sample.reward == {"score": 0.25, "pred": 3} and sample.get_reward_value(config) == 0.25
        mine = Sample(response="dict", reward_key="pred")
        assert await pool.score(Sample(response="raise", reward_key="pred")) == ({"pred": 0.0}, "reward_error")
        await pool.reward([mine])
        assert mine.reward == {"score": 0.25, "pred": 3.0} and mine.get_reward_value(config) == 3.0
    use(body, reward_key="score")


def test_shipped_rewards_in_the_pool() -> None:
    async def main() -> None:
        pool = RewardPool(Config(rm_type="deepscaler"))
        with pytest.raises(RewardError, match="not running"):
            await pool.score(Sample())
        await pool.start()
        try:
            right = Sample(label="62", response=r"</think>\boxed{62}")
            other = Sample(label="62", response=r"\boxed{60+2}", metadata={"rm_type": "math"})
            unlabelled = Sample(response=r"</think>\boxed{62}")
            assert await asyncio.gather(*map(pool.score, (right, other, unlabelled))) == [(1.0, None), (1.0, None), (0.0, "reward_error")]
        finally:
            await pool.close()
    asyncio.run(asyncio.wait_for(main(), 50))


def test_cancelled_and_closed(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool) -> None:
        waiting = [asyncio.ensure_future(pool.score(Sample(response="sleep 0.3"))) for _ in range(30)]
        await asyncio.sleep(0.1)
        for task in waiting[1:]:
            task.cancel()
        assert (await waiting[0]).remark is None
        stuck = asyncio.ensure_future(pool.score(Sample(response="hang")))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(15):     # it does not wait for a reward that is at work
            await pool.close(40.0)
        with pytest.raises(RewardError, match="closed before this sample"):
            await stuck
    use(body, reward_timeout_s=20.0)


def test_abandoned(use: Callable[..., None]) -> None:
    """Calls that wait are cancelled, for a sample, for several and for a group; the workers go on with what comes then."""
    async def body(pool: RewardPool) -> None:
        samples = [Sample(index=i, response="sleep 0.2") for i in range(12)]
        waiting = [asyncio.ensure_future(pool.reward(s, group)) for s, group in ((samples[:1], False), (samples[1:4], False), (samples[4:], True))]
        await asyncio.sleep(0.1)
        pool.abandon()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*waiting, return_exceptions=True))
        assert all(s.reward is None for s in samples)
        assert [r.value for r in await scores(pool, "1", "2")] == [1.0, 1.0]
    use(body)


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    """Not when the parent is killed, and not while a reward hangs with its pipes unread."""
    (tmp_path / "mine.py").write_text(REWARDS)
    program = textwrap.dedent(f"""
        import asyncio
        from rlmono.config.schema import Config
        from rlmono.data.sample import Sample
        from rlmono.rewards.pool import RewardPool
        async def main():
            pool = RewardPool(Config(custom_rm_path="{tmp_path}/mine.py:plain"))
            await pool.start()
            print(int((await pool.score(Sample(response="pid"))).value), flush=True)
            await pool.score(Sample(response="hang"))
        asyncio.run(main())
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        time.sleep(0.3)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"worker {worker} is still there"
        time.sleep(0.02)


# ---------------------------------------------------------------- on a host, and in the metrics


@pytest.mark.parametrize("whole", [False, True], ids=["each sample", "the group"])
def test_outcomes_reach_the_metrics(tmp_path: Path, whole: bool) -> None:
    """A node's host with an engine that writes what the prompt says: the counted outcomes of a rollout, and of an evaluation."""
    (tmp_path / "mine.py").write_text(REWARDS)
    tokenizer = make_folder(tmp_path / "language")
    function = f"{tmp_path}/mine.py:{'whole' if whole else 'plain'}"
    config = make_config(tokenizer, custom_rm_path=function, group_rm=whole, reward_timeout_s=2.0)

    async def run(*texts: str) -> GroupDone:
        left = list(texts)
        async with Standin(config, lambda _: tokenizer.render(left.pop(0))) as host:
            await host.host.rewards.start()
            return await host.run([Sample(index=i, tokens=tokenizer.render("1"), prompt="1") for i in range(len(texts))])
    if whole:
        groups = [asyncio.run(run("12", "3456")).samples, asyncio.run(run("one", "3")).samples]
        assert [[s.reward for s in group] for group in groups] == [[1 / 3, 2 / 3], [0.0, 0.0]]
        expected = {"reward_invalid": 2.0}
    else:
        groups = [asyncio.run(run("1", "raise", "segfault", "hang", "nan")).samples]
        assert [s.reward for s in groups[0]] == [1.0, 0.0, 0.0, 0.0, 0.0]
        expected = {"reward_error": 1.0, "reward_crashed": 1.0, "reward_timeout": 1.0, "reward_invalid": 1.0}
    for prefix, statistics in (("rollout/remarks/", rollout_statistics(groups, config)), ("eval/x/remarks/", eval_statistics("x", groups, config))):
        assert {name.removeprefix(prefix): n for name, n in statistics.items() if name.startswith(prefix)} == expected
