"""The count of responses that repeat themselves: what it finds, against a regular expression that says the same (and takes 7 ms a response)."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from rlmono.rollout.batch import has_repetition

SAME = re.compile(r"(.{20,200}?)\1{3,}\Z", re.DOTALL)
PASSAGE = st.text(alphabet="ab\n", min_size=1, max_size=60)


def test_four_times_is_repetition() -> None:
    passage = "wait, let me check this again. "
    assert has_repetition("The answer is 4. " + passage * 4) and has_repetition(passage * 100)
    assert not has_repetition(passage * 3) and not has_repetition(passage * 4 + "So: 4.") and not has_repetition("")
    assert has_repetition("x" * 200 + ("y" * 199 + "\n") * 4) and not has_repetition(("y" * 200 + "\n") * 4)       # 200 characters at most


@given(before=PASSAGE, passage=PASSAGE, times=st.integers(1, 12), after=st.sampled_from(["", "c"]))
@settings(deadline=None, max_examples=300)
def test_it_is_the_regular_expressions_answer(before: str, passage: str, times: int, after: str) -> None:
    text = before + passage * times + after
    assert has_repetition(text) == (SAME.search(text[-1000:]) is not None)
