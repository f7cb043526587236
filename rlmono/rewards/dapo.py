"""`--rm-type dapo`: the answer of the last line `Answer: …` in the last 300 characters, compared with the label as text.

As in DAPO (arXiv:2503.14476): a right answer scores 1, anything else −1. Both sides are brought into one spelling first.
"""

from __future__ import annotations

import re
from typing import Any

from rlmono.data.sample import Sample
from rlmono.rewards.answers import labels_of, last_boxed, normalise, without_end

LOOKED_AT = 300
"""Characters at the end of the response."""
INVALID = "[INVALID]"
_ANSWER = re.compile(r"answer\s*:[\s*]*([^\n]+)", re.IGNORECASE)


def reward(args: Any, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """{score: ±1, acc: 1 or 0, pred: the answer found, or [INVALID]}. ValueError for a sample without a label."""
    found = _ANSWER.findall(without_end(sample.response)[-LOOKED_AT:])
    return _judged(found[-1] if found else "", sample)


def reward_of_answer(args: Any, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """The same of a response that is the answer alone."""
    return _judged(without_end(sample.response), sample)


def _judged(answer: str, sample: Sample) -> dict[str, Any]:
    boxed = last_boxed(answer)
    pred = normalise((answer if boxed is None else boxed).strip("* ")) or INVALID
    right = pred in [normalise(label) for label in labels_of(sample)]
    return {"score": 1.0 if right else -1.0, "acc": float(right), "pred": pred}
