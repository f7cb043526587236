r"""`--rm-type math`: 1 when math-verify finds the last `\boxed{}` of the response equal to the label, else 0."""

from __future__ import annotations

from typing import Any

from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

from rlmono.data.sample import Sample
from rlmono.rewards.answers import has_words, labels_of, last_boxed, normalise

_LONGEST = 1000
"""Characters of an answer that is taken for a formula; longer ones are loops, which take the parser seconds."""
# LaTeX only: its other parser evaluates a response's text as Python.
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 or 0.0. ValueError for a sample without a label. math-verify's own 5 s limits need the main thread."""
    return float(_equal_to_label(last_boxed(sample.response), sample))


def reward_of_answer(args: Any, sample: Sample, **kwargs: Any) -> float:
    """The same of a response that is the answer alone."""
    return float(_equal_to_label(sample.response or None, sample))


def _equal_to_label(answer: str | None, sample: Sample) -> bool:
    labels = labels_of(sample)
    if answer is None:
        return False
    if any(normalise(label) == normalise(answer) for label in labels):
        return True
    if len(answer) > _LONGEST:
        return False
    formulas = [label for label in labels if not has_words(normalise(label))]
    target = _parse(answer) if formulas else []
    return any(verify(_parse(label), target) for label in formulas)


def _parse(answer: str) -> Any:
    return parse(rf"\boxed{{{answer}}}", extraction_config=_LATEX)
