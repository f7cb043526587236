"""`--rm-type f1`: F1 of the response's words against the label's, the best of several labels (SQuAD, arXiv:1606.05250, section 6.1).

Words are in lower case, without punctuation and articles. What comes before the last `</think>` is left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from rlmono.data.sample import Sample
from rlmono.rewards.answers import after_thinking, labels_of

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VERDICTS = ("yes", "no", "noanswer")
"""Labels that are right or wrong as a whole."""


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """From 0 to 1. ValueError for a sample without a label."""
    words = _words(after_thinking(sample.response))
    return max(token_f1(words, _words(label)) for label in labels_of(sample))


def token_f1(predicted: list[str], wanted: list[str]) -> float:
    """The harmonic mean of precision and recall of words, each counted as often as it stands; 1 when both are empty."""
    if not predicted or not wanted or any(" ".join(words) in _VERDICTS for words in (predicted, wanted)):
        return float(predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()
