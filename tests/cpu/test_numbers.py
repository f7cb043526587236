"""Numbers that are kept as bytes, and read as lists."""

from __future__ import annotations

import copy
import math
import random
from array import array
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from rlmono.data.numbers import to_bytes
from rlmono.data.sample import Sample

IDS, VERSIONS = [0, 7, 2**31 - 1, -1], [3, 3, 4, 3]
LOG_PROBS = [-0.5, -1.25, 0.0, -3.0]


def packed(**more: Any) -> Sample:
    s = Sample(index=1, tokens=list(IDS), response_length=4, rollout_log_probs=list(LOG_PROBS), weight_versions=list(VERSIONS), **more)
    s.pack()
    return s


def kept_as_bytes(s: Sample) -> list[bool]:
    return [isinstance(value, bytes) for value in (msgspec.structs.asdict(s)[n] for n in ("tokens", "rollout_log_probs", "weight_versions"))]


def test_who_reads_gets_lists_and_who_sends_or_counts_makes_none() -> None:
    s = packed()
    assert s.length == 4 and s.prompt_length == 0 and Sample.weight_versions.count(s) == 4 and Sample.rollout_log_probs.count(s) == 4
    assert list(Sample.tokens.view(s)) == IDS and list(Sample.weight_versions.view(s)) == VERSIONS and Sample.tokens.peek(s) == IDS
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(s), type=Sample)
    assert kept_as_bytes(s) == kept_as_bytes(again) == [True] * 3
    assert (again.tokens, again.rollout_log_probs, again.weight_versions) == (IDS, LOG_PROBS, VERSIONS)
    assert again == s and kept_as_bytes(again) == [False] * 3


def test_a_file_has_lists_and_the_sample_keeps_its_bytes() -> None:
    s = packed(metadata={"a": 1})
    assert s.to_dict() == {"index": 1, "tokens": IDS, "response_length": 4, "rollout_log_probs": LOG_PROBS, "weight_versions": VERSIONS,
                           "metadata": {"a": 1}}
    assert kept_as_bytes(s) == [True] * 3 and msgspec.json.decode(msgspec.json.encode(s.to_dict()), type=Sample) == s
    assert Sample(index=2).to_dict() == {"index": 2} and Sample(tokens=np.array([1, 2])).to_dict() == {"tokens": [1, 2]}
    s.pack()
    assert f"tokens={IDS}, " in repr(s) and f"weight_versions={VERSIONS}, " in repr(s) and kept_as_bytes(s) == [True] * 3


def test_a_list_that_was_read_may_be_changed_in_place_and_a_copy_stays_as_it_was() -> None:
    s = packed()
    other = copy.copy(s)
    s.tokens.append(9)
    s.weight_versions = [5] * 5
    assert s.length == 5 and s.tokens == [*IDS, 9] and other.tokens == IDS
    s.pack()
    assert s.tokens == [*IDS, 9] and s.weight_versions == [5] * 5
    shared = copy.copy(s)           # of a list: one for both, as Python's copies are
    Sample.tokens.extend(s, [1])    # makes bytes of its own
    assert shared.tokens == [*IDS, 9] and s.tokens == [*IDS, 9, 1] and s != shared


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda x: array("i", x)], ids=["list", "tuple", "numpy", "torch", "array"])
def test_numbers_come_in_any_form(form: Any) -> None:
    s = Sample(tokens=[1], weight_versions=[])
    Sample.tokens.extend(s, form([2, 3]))
    s.weight_versions = form(VERSIONS)
    s.pack()
    assert s.tokens == [1, 2, 3] and s.weight_versions == VERSIONS


def test_runs_are_as_long_as_what_they_stand_for() -> None:
    draw, s, expected = random.Random(0), Sample(), list[int]()
    for _ in range(200):
        number, times = draw.randrange(3), draw.randrange(4)
        Sample.weight_versions.repeat(s, number, times)
        expected += [number] * times
        assert Sample.weight_versions.count(s) == len(expected) and Sample.weight_versions.peek(s) == expected
    made = Sample.weight_versions.bytes_of(s)
    assert s.weight_versions == expected
    s.pack()
    assert Sample.weight_versions.bytes_of(s) == made, "one form, however it came about"
    whole = Sample(weight_versions=[5] * 8192)
    whole.pack()
    assert len(Sample.weight_versions.bytes_of(whole)) == 8


@pytest.mark.parametrize(("field", "value", "what"), [
    ("tokens", [1.5], "whole numbers of 32 bits"), ("tokens", [2**31], "whole numbers of 32 bits"), ("tokens", [[1]], "whole numbers of 32 bits"),
    ("rollout_log_probs", ["a"], "numbers of fp32"), ("rollout_log_probs", [None], "numbers of fp32"),
    ("weight_versions", [None], "whole numbers of 32 bits"), ("weight_versions", 5, "whole numbers of 32 bits"),
    ("weight_versions", torch.zeros(2, 2, dtype=torch.int64), "whole numbers of 32 bits"), ("weight_versions", [3, 3.0], "whole numbers of 32 bits"),
    ("weight_versions", ["a", "a"], "whole numbers of 32 bits")])
def test_what_is_no_number_is_named(field: str, value: Any, what: str) -> None:
    s = packed()
    setattr(s, field, value)
    with pytest.raises(ValueError, match=f"{field} are not all {what}"):
        s.pack()


def test_beyond_fp32_is_infinite_and_bytes_that_are_cut_short_are_refused() -> None:
    assert np.frombuffer(to_bytes("f", [-1e300, math.nan]), np.float32)[0] == -math.inf
    for name in ("tokens", "rollout_log_probs", "weight_versions"):
        with pytest.raises(msgspec.ValidationError, match="not whole numbers"):
            msgspec.msgpack.decode(msgspec.msgpack.encode({name: bytes(7)}), type=Sample)
    for times in (0, -3):
        with pytest.raises(msgspec.ValidationError, match="less than once"):
            msgspec.msgpack.decode(msgspec.msgpack.encode({"weight_versions": to_bytes("i", [5, times])}), type=Sample)
