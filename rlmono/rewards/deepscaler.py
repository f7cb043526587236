r"""`--rm-type deepscaler`: 1 when the last `\boxed{}` after the thinking equals the label, as text or symbolically, else 0.

The rules of DeepScaleR's reward: the answer stands after `</think>`, else after `###Response`, else there is none. An integer
label wants an integer (`\boxed{27+35}` is no answer to 62), a fraction wants the same fraction, a tuple its elements in order.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import latex2sympy  # type: ignore[import-untyped]

from rlmono.data.sample import Sample
from rlmono.rewards.answers import has_words, labels_of, last_boxed, normalise

logger = logging.getLogger(__name__)

_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"-?\\frac\{\d+\}\{\d+\}")
# Towers of powers and long exponents take for ever.
_ENDLESS = re.compile(r"\^\{?[^{}^]*\^|\^\{?\d{4,}|\)\^\{?\d{3,}|\d{4,}!|!!")
_LONGEST = 300


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 or 0.0. ValueError for a sample without a label."""
    answer = _answer(sample.response)
    return float(_equal_to_label(answer, sample))


def reward_of_answer(args: Any, sample: Sample, **kwargs: Any) -> float:
    """The same of a response that is the answer alone."""
    return float(_equal_to_label(sample.response or None, sample))


def _equal_to_label(answer: str | None, sample: Sample) -> bool:
    labels = labels_of(sample)
    return answer is not None and any(_equal(normalise(label), normalise(answer)) for label in labels)


def _answer(response: str) -> str | None:
    for mark in ("</think>", "###Response"):
        if mark in response:
            return last_boxed(response.rpartition(mark)[2])
    return None


def _equal(label: str, answer: str) -> bool:
    if label == answer:
        return True
    if not label or not answer or len(answer) > _LONGEST:
        return False
    label_parts, answer_parts = _elements(label), _elements(answer)
    if len(label_parts) > 1 or len(answer_parts) > 1:
        same_brackets = (label[0], label[-1]) == (answer[0], answer[-1]) or not _bracketed(label) and not _bracketed(answer)
        return same_brackets and len(label_parts) == len(answer_parts) and all(map(_equal_element, label_parts, answer_parts))
    return _equal_element(label, answer)


def _equal_element(label: str, answer: str) -> bool:
    label, answer = normalise(label), normalise(answer)
    if label == answer:
        return True
    if _FRACTION.fullmatch(label) and _FRACTION.fullmatch(answer):
        return False        # the fraction is not reduced
    if _INTEGER.fullmatch(label) or _INTEGER.fullmatch(answer):
        return bool(_INTEGER.fullmatch(label) and _INTEGER.fullmatch(answer)) and int(label) == int(answer)
    return _symbolically_equal(label, answer)


def _bracketed(text: str) -> bool:
    """Whether one pair of brackets, ( or [ with ) or ], encloses the whole text."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return i > 0 and i == len(text) - 1
    return False


def _elements(text: str) -> list[str]:
    """`(a,b)`, `[a,b)` or `a,b` in its parts at the outermost commas; anything else as one part."""
    inner = text[1:-1] if _bracketed(text) else text
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if len(parts) > 1 else [text]


def _symbolically_equal(label: str, answer: str) -> bool:
    if any(has_words(text) or _ENDLESS.search(text) for text in (label, answer)):
        return False
    try:
        expressions = [sympy.nsimplify(latex2sympy(text), rational=True) for text in (label, answer)]
        return sympy.simplify(expressions[0] - expressions[1]) == 0
    except MemoryError:
        raise
    except Exception as error:      # what a model writes fails in a hundred ways; none of them is an answer
        logger.debug("not comparable: %r and %r: %s", label, answer, error)
        return False
