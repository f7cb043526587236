"""Dynamic sampling, partial rollout and the data buffer: the pieces, and whole runs that are killed at any message (`whole_run.py`)."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from whole_run import Run, fresh, whole_runs  # noqa: F401

from rlmono.config.schema import Config
from rlmono.data.sample import ABORTED, COMPLETED, PENDING, TRUNCATED, Group, Sample
from rlmono.rewards.load import LoadError
from rlmono.rollout import filters
from rlmono.rollout.buffer import DataBuffer, cut, mask_old_tokens
from rlmono.rollout.filters import Verdict, judge
from rlmono.rollout.loads import Loads
from rlmono.rollout.selection import Selection
from rlmono.world.messages import GroupDone, Sampling


def group(number: int, rewards: tuple[float, ...] = (0.0, 1.0), **values: Any) -> Group:
    return [Sample(index=number * len(rewards) + i, group_index=number, tokens=[1, 2, 3, 4, 5], response_length=3, reward=r, status=COMPLETED,
                   rollout_log_probs=[-1.0, -2.0, -3.0], weight_versions=[0, 0, 1], **values) for i, r in enumerate(rewards)]


def config(**values: Any) -> Config:
    return dataclasses.replace(Config(), **{"n_samples_per_prompt": 2, **values})


# ---------------------------------------------------------------- filters

@pytest.mark.parametrize(("name", "samples", "expected"), [
    ("check_reward_nonzero_std", group(0, (0.0, 1.0)), (True, None)),
    ("check_reward_nonzero_std", group(0, (1.0, 1.0, 1.0)), (False, "zero_std_1.0")),
    ("check_reward_nonzero_std", group(0, (0.3, 0.3 + 1e-7)), (False, "zero_std_0.3")),         # equal but for rounding
    ("check_reward_nonzero_std", group(0, (0.3, 0.3 + 2e-6)), (True, None)),                    # std is 1.4e-6
    ("check_reward_nonzero_std", group(0, (1e9, 1e9 + 1)), (True, None)),                       # 0 in fp32
    ("check_reward_nonzero_std", group(0, (1.0,)), (False, "zero_std_1.0")),
    ("check_not_all_correct", group(0, (1.0, 2.0)), (False, "all_correct")),
    ("check_not_all_correct", group(0, (1.0, 0.9)), (True, None)),
    ("check_not_all_wrong", group(0, (0.5, 0.9)), (False, "all_wrong")),
    ("check_not_all_wrong", group(0, (0.5, 1.0)), (True, None)),
    ("check_no_truncated", [*group(0), *[msgspec.structs.replace(s, status=TRUNCATED) for s in group(0)]], (False, "truncated")),
    ("check_no_truncated", group(0), (True, None)),
    ("check_not_all_truncated", [*group(0), *[msgspec.structs.replace(s, status=TRUNCATED) for s in group(0)]], (True, None)),
    ("check_not_all_truncated", [msgspec.structs.replace(s, status=TRUNCATED) for s in group(0)], (False, "all_truncated")),
    ("check_no_overlong", group(0), (False, "overlong")),
    ("check_reward_failed", group(0, remarks=["reward_timeout"]), (False, "reward_timeout")),
    ("check_reward_failed", group(0, remarks=["remote_rm_down"]), (False, "remote_rm_down")),
    ("check_reward_failed", group(0, remarks=["refused"]), (True, None)),
])
def test_filters(name: str, samples: Group, expected: tuple[bool, str | None]) -> None:
    assert getattr(filters, name)(config(rollout_max_response_len=4, overlong_buffer_len=2), samples) == expected


def test_dict_rewards_go_by_their_key() -> None:
    samples = group(0)
    for s, score in zip(samples, (-1.0, 1.0), strict=True):
        s.reward = {"score": score, "acc": 1.0}
    assert filters.check_reward_nonzero_std(config(reward_key="score"), samples).keep
    assert not filters.check_reward_nonzero_std(config(reward_key="acc"), samples).keep


def users_bool(args: Any, samples: Group, **kwargs: Any) -> Any:
    return np.bool_(samples[0].group_index % 2)


def users_object(args: Any, samples: Group, **kwargs: Any) -> Any:
    return SimpleNamespace(keep=False, reason="too long / 32k")


def users_nothing(args: Any, samples: Group, **kwargs: Any) -> Any:
    return None


def users_fault(args: Any, samples: Group, **kwargs: Any) -> Any:
    raise KeyError("x")


def test_filters_of_users_answer_in_the_ways_that_they_know() -> None:
    c = config(dynamic_sampling_filter_path="mine.keep")
    assert judge(None, c, group(0)) == (True, None)
    assert [judge(users_bool, c, group(i)) for i in (0, 1)] == [(False, "users_bool"), (True, None)]
    assert judge(users_object, c, group(0)) == (False, "too_long_32k")
    both = filters.all_of(users_bool, users_object)
    assert [judge(both, c, group(i)).reason for i in (0, 1)] == ["users_bool", "too_long_32k"]
    for bad, text in ((users_nothing, "it returned None"), (users_fault, "KeyError")):
        with pytest.raises(RuntimeError, match=f"--dynamic-sampling-filter-path mine.keep, on group 7: .*{text}"):
            judge(bad, c, group(7))


# ---------------------------------------------------------------- which groups count

def keep_even(g: Group) -> Verdict:
    return Verdict(g[0].group_index % 2 == 0, None if g[0].group_index % 2 == 0 else "odd")


def test_a_selection_takes_what_finishes_first() -> None:
    s = Selection(2, keep_even, in_order=False)
    assert s.short == 2 and list(s.submit(4)) == [0, 1, 2, 3] and s.short == 0
    for n in (3, 2, 1):
        s.finish(n, group(n))
    assert not s.full and s.short == 0          # one is kept, and one in flight: exactly enough
    s.finish(0, group(0))
    assert s.full and list(s.kept) == [2, 0] and s.reasons == {"odd": 2} and s.surplus() == []


def test_a_selection_that_falls_short_wants_more() -> None:
    s = Selection(2, keep_even, in_order=False)
    s.submit(3)
    s.finish(1, group(1))
    assert s.short == 0
    s.finish(2, group(3))
    assert s.short == 1 and list(s.submit(3)) == [3, 4, 5] and s.short == 0
    for n in (4, 0):
        s.finish(n, group(n))
    assert s.full and s.surplus() == [3, 5]
    s.finish(3, group(3))                       # late: it is not judged
    assert s.surplus() == [3, 5] and s.reasons == {"odd": 2}


@given(st.permutations(range(12)))
def test_in_order_nothing_depends_on_what_finishes_first(order: list[int]) -> None:
    s, waiting = Selection(3, keep_even, in_order=True), []
    while not s.full:
        while s.short:
            waiting += s.submit(4)
        n = min(waiting, key=lambda i: order.index(i % 12))
        waiting.remove(n)
        s.finish(n, group(n))
    assert (list(s.kept), list(s.dropped), s.submitted) == ([0, 2, 4], [1, 3], 8)


# ---------------------------------------------------------------- the data buffer

def bad_filter(args: Any, rollout_id: int, buffer: list[Group], num_samples: int) -> Any:
    how = args.dynamic_sampling_filter_path
    return {"many": buffer, "twice": [buffer[0], buffer[0]], "strange": [group(99)], "half": [buffer[0][:1]], "none": None}[how]


def last_and_forget_the_rest(args: Any, rollout_id: int, buffer: list[Group], num_samples: int) -> list[Group]:
    taken = [buffer[-1]]
    del buffer[1:]
    return taken


def leaves_what_it_takes(args: Any, rollout_id: int, buffer: list[Group], num_samples: int) -> list[Group]:
    return buffer[:num_samples]


def buffer_with(path: str | None, n: int = 4, **values: Any) -> DataBuffer:
    b = DataBuffer(config(buffer_filter_path=path and f"{__file__}:{path}", **{"partial_rollout": True, **values}))
    b.put([group(i) for i in range(n)])
    return b


def numbers(groups: list[Group]) -> list[int]:
    return [g[0].group_index for g in groups]


def test_groups_come_out_in_the_order_in_which_they_came_back() -> None:
    b = buffer_with(None)
    assert numbers(b.take(1, 3)) == [0, 1, 2] and numbers(b.groups) == [3]
    assert numbers(b.take(1, 3)) == [3] and b.take(1, 3) == [] and b.discarded == 0


def test_a_users_buffer_filter_chooses_and_what_it_throws_away_is_counted() -> None:
    b = buffer_with("last_and_forget_the_rest")
    assert numbers(b.take(1, 4)) == [3] and numbers(b.groups) == [0] and b.discarded == 2
    b = buffer_with("leaves_what_it_takes")
    assert numbers(b.take(1, 2)) == [0, 1] and numbers(b.groups) == [2, 3] and b.discarded == 0


@pytest.mark.parametrize(("how", "text"), [("many", "returned 4 groups, and was asked for 2"), ("twice", "a group twice"),
                                           ("strange", "not in the buffer"), ("half", "changed the number of samples"),
                                           ("none", "must return a list"), ("other", "KeyError: 'other'")])
def test_a_buffer_filter_that_makes_no_sense_is_named(how: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"--buffer-filter-path .*bad_filter.*{text}"):
        buffer_with("bad_filter", dynamic_sampling_filter_path=how).take(1, 2)
    with pytest.raises(LoadError):
        buffer_with("missing")


def test_samples_that_are_too_old_begin_anew() -> None:
    assert [s.response_length for s in buffer_with(None, partial_rollout_max_age=2).take(2, 1)[0]] == [3, 3]
    b = buffer_with(None, partial_rollout_max_age=2)
    (again, _), *_ = b.take(3, 1)               # its oldest token is of version 0
    assert again == Sample(index=0, group_index=0, tokens=[1, 2]) and again.status == PENDING and b.restarted == 2
    assert [s.response_length for s in buffer_with(None).take(99, 1)[0]] == [3, 3]      # without a bound
    assert [s.response_length for s in buffer_with(None, partial_rollout=False).take(1, 1)[0]] == [0, 0]


def test_a_buffer_survives_a_checkpoint() -> None:
    b, again = buffer_with(None), buffer_with(None, n=0)
    again.restore(b.state(), b.dump())
    assert again.groups == b.groups and again.state() == b.state()
    with pytest.raises(ValueError, match="groups of 2 samples, and --n-samples-per-prompt is 3"):
        buffer_with(None, n=0, n_samples_per_prompt=3).restore(b.state(), b.dump())


def test_a_sample_is_cut_to_what_it_was_earlier() -> None:
    (s, _) = group(0)
    assert cut(s, 3) is s
    half = cut(s, 1)
    assert (half.tokens, half.response_length, half.rollout_log_probs, half.weight_versions) == ([1, 2, 3], 1, [-1.0], [0])
    assert half.status == ABORTED and half.reward is None
    turns = msgspec.structs.replace(s, loss_mask=[1, 0, 1])
    assert cut(turns, 1) is turns


def test_only_tokens_of_these_weights_are_trained_on() -> None:
    for mask, expected in ((None, [0, 0, 1]), ([1, 1, 0], [0, 0, 0])):
        s = msgspec.structs.replace(group(0)[0], loss_mask=mask)
        mask_old_tokens(s, 1)
        assert s.loss_mask == expected
    s = group(0)[0]
    mask_old_tokens(s, 0)
    assert s.loss_mask is None


# ---------------------------------------------------------------- engines

def test_groups_go_to_the_engine_with_the_fewest_tokens_that_has_room() -> None:
    loads, sampling = Loads(3, concurrency=4), Sampling(100)

    def bare(n: int, prompt: int) -> Group:
        return [Sample(tokens=[1] * prompt) for _ in range(n)]
    with loads.carried(bare(2, 50), sampling) as a, loads.carried(bare(1, 50), sampling) as b, loads.carried(bare(4, 10), sampling) as c:
        assert (a, b, c) == (0, 1, 2)           # 300, 150, 440 tokens
        with loads.carried(bare(2, 10), sampling) as d, loads.carried(bare(2, 10), sampling) as e:
            assert (d, e) == (1, 0)             # 370 tokens on 1: now 0 has fewest, and is full with it
            with loads.carried(bare(1, 10), sampling) as f:
                assert f == 1                   # 3 of 4 requests; the others have no room
    done = [Sample(response_length=10, status=COMPLETED)]
    loads.heard(0, GroupDone(0, done))
    with loads.carried(bare(1, 5), sampling) as a, loads.carried(done, sampling) as b, loads.carried(bare(1, 6), sampling) as c:
        assert (a, b, c) == (0, 1, 1)           # what is finished asks for nothing


def test_the_share_of_time_that_engines_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("rlmono.rollout.loads.time.monotonic", lambda: clock[0])
    loads = Loads(2, 8)
    loads.begin()
    clock[0] = 106.0
    loads.heard(0, GroupDone(0, [], idle_s=1.0, slack_s=4.0))
    clock[0] = 110.0
    loads.heard(1, GroupDone(1, [], idle_s=0.0, slack_s=2.0))
    values = loads.end()
    assert values["perf/engine_idle_ratio"] == pytest.approx((5 + 0) / 20)      # engine 0 had nothing from 105 on
    assert values["perf/engine_slack_ratio"] == pytest.approx((8 + 2) / 20)


# ---------------------------------------------------------------- whole runs

def odd_prompts_fail(args: Any, samples: Group, **kwargs: Any) -> bool:
    return samples[0].group_index % 3 != 1


SELECTING: dict[str, Any] = dict(over_sampling_batch_size=6, dynamic_sampling_filter_path="rlmono.rollout.filters.check_reward_nonzero_std")
PARTIAL: dict[str, Any] = dict(**SELECTING, partial_rollout=True)
AGED: dict[str, Any] = dict(over_sampling_batch_size=9, partial_rollout=True, partial_rollout_max_age=1, mask_offpolicy_in_partial_rollout=True)


def finished(c: Config, seed: int, kills: list[int]) -> tuple[dict[int, Any], Run]:
    """Start it until it ends by itself: what each rollout trained on (of one that was done twice, the last), and the last attempt."""
    lineage: dict[int, Any] = {}
    for attempt in range(len(kills) + 1):
        run = Run(c, seed + attempt, (kills + [0])[attempt]).go()
        lineage |= run.trained
        if not run.killed:
            break
    return lineage, run


def left(run: Run) -> tuple[Any, ...]:
    """What a run leaves for a next one, but for the paths of its files."""
    cursor = run.prompts.cursor
    groups = [[msgspec.structs.replace(s, metadata={**s.metadata, "source": ""}) for s in g] for g in run.prompts.buffer.groups]
    return groups, run.prompts.buffer.restarted, cursor.epoch, cursor.position, cursor.groups, cursor.samples


def account(lineage: dict[int, Any], run: Run) -> None:
    """No prompt is trained on twice, and each one that was given out has been trained on, dropped, or is in the buffer."""
    trained = [g for batches in lineage.values() for g in {g for g, _, _ in batches[0].rewards}]
    assert len(set(trained)) == len(trained) == 4 * len(lineage) == 24
    waiting = numbers(run.prompts.buffer.groups)
    assert len(set(waiting)) == len(waiting) and not set(waiting) & set(trained)
    assert set(trained) | set(waiting) <= set(range(run.prompts.cursor.groups))
    for batches in lineage.values():
        for sample in (s for b in batches for step in b.steps for pack in step.packs for s in pack):
            assert len(sample.loss_mask) == sample.response_length == len(sample.rollout_log_probs) // 4 <= 40


@pytest.mark.parametrize("values", [{}, SELECTING, PARTIAL, AGED], ids=["plain", "selecting", "partial", "aged"])
def test_a_deterministic_run_killed_at_any_message_ends_as_if_it_had_not_been(whole_runs: Any, values: dict[str, Any]) -> None:  # noqa: F811
    straight, run = finished(fresh(deterministic=True, **values), 0, [])
    account(straight, run)
    again, other = finished(fresh(deterministic=True, **values), 1, [])
    assert again == straight and other.turns != run.turns           # another timing, the same samples

    @settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.integers(2, 10**6), st.lists(st.integers(1, run.messages), min_size=1, max_size=4))
    def killed(seed: int, kills: list[int]) -> None:
        c = fresh(deterministic=True, **values)
        lineage, last = finished(c, seed, kills)
        assert lineage == straight and left(last) == left(run)
        shutil.rmtree(Path(str(c.hf_checkpoint)).parent)
    killed()


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.sampled_from([SELECTING, PARTIAL, AGED]), st.integers(0, 10**6), st.lists(st.integers(1, 900), max_size=4))
def test_a_run_killed_at_any_message_loses_and_doubles_no_prompt(whole_runs: Any, values: dict[str, Any], seed: int, kills: list[int]) -> None:  # noqa: F811
    c = fresh(**values)
    lineage, run = finished(c, seed, kills)
    account(lineage, run)
    shutil.rmtree(Path(str(c.hf_checkpoint)).parent)


def test_what_is_reported_adds_up(whole_runs: Any) -> None:  # noqa: F811
    run = Run(fresh(**PARTIAL, log_samples=100), 3).go()
    rows = run_metrics(run)
    dropped = sum(v for row in rows for k, v in row.items() if k.startswith("rollout/dynamic_filter/drop_"))
    submitted = sum(row["rollout/submitted_groups"] for row in rows)
    aborted = sum(row["rollout/aborted_groups"] for row in rows)
    assert submitted == 24 + dropped + aborted and dropped > 0 and aborted > 0
    assert submitted - aborted + len(run.prompts.buffer) == run.prompts.cursor.groups       # what was aborted came again, or waits
    assert rows[-1]["rollout/buffer/groups"] == len(run.prompts.buffer)
    engine = sum(client.tokens for client in run.host.engines.values())
    assert sum(row["rollout/generated_tokens"] for row in rows) == engine
    assert any(row["rollout/old_tokens_ratio"] > 0 for row in rows) and all(0 <= row["perf/engine_idle_ratio"] <= 1 for row in rows)
    assert Counter(k for row in rows for k in row)["rollout/dropped_tokens"] == 6
    begun = [s.metadata.get("start_rollout_id") for g in run.prompts.buffer.groups for s in g if s.response_length]
    assert all(0 <= r < 6 for r in begun)


def run_metrics(run: Run) -> list[dict[str, Any]]:
    from rlmono.observe.metrics import read_metrics
    return [row for row in read_metrics(Path(str(run.config.run_dir))) if "rollout/raw_reward" in row]


def drop_all(args: Any, samples: Group, **kwargs: Any) -> Verdict:
    samples[0].remarks = ["reward_timeout"]     # as the reward pool leaves it
    return Verdict(False, "never")


def test_a_filter_that_drops_everything_ends_the_run(whole_runs: Any) -> None:  # noqa: F811
    c = fresh(over_sampling_batch_size=6, dynamic_sampling_filter_path=f"{__file__}:drop_all", max_over_sampling_batches=3)
    with pytest.raises(RuntimeError, match="rollout 0: of 3 batches of 6 prompts the filter has kept 0 groups.*4 are needed; dropped: never x(1[58]) "
                                           r"\(remarks of their samples: reward_timeout x\1\)"):
        Run(c, random.randrange(9)).go()
