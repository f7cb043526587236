"""Final answers of mathematics problems: out of a response, out of a label, and in one spelling."""

from __future__ import annotations

import re
from typing import Any

from rlmono.data.sample import Sample

_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)"

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[!,;: ]|~", " "),
    (r"\{,\}", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", ""),
    (r"\\?[%$]", ""),
    (r"^\s*" + _WORDS + r"\{([^{}]*)\}\s*$", r"\1"),
    (r"(?<=\S)\s*" + _WORDS + r"\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),        # a unit
    (r"^\s*\w{1,2}\s*=(?!=)", ""),                                          # x = 5
    (r"\s+", " "),
    (r"(?<![A-Za-z]) | (?![A-Za-z])", ""),
    (r"(?<=\d)\.+$|(?<=[)\]}A-Za-z])\.$", ""),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"(?<![\d.])(\d+)\.0+(?!\d)", r"\1"),
    (r"(?<![\d.])(\d+\.\d*[1-9])0+(?!\d)", r"\1"),
    (r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac(\d)(?=\{)", r"\\frac{\1}"),
    (r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^\\frac\{-(\w+)\}", r"-\\frac{\1}"),
))


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` (or `\fbox{…}`) of a text; None without one, or when it is cut off."""
    opened = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    if not opened:
        return None
    depth, start = 1, opened[-1].end()
    for brace in re.finditer(r"\\[\\{}]|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start:start + brace.start()]
    return None


def after_thinking(response: str) -> str:
    """What a response says after its last `</think>`; all of it where there is none."""
    return response.rpartition("</think>")[2]


def normalise(answer: str) -> str:
    r"""One spelling of an answer: without spaces, units, `\left`, `$`, `%` and degrees, thousands without commas, fractions as
    `\frac{a}{b}`, numbers without idle zeros, words in lower case."""
    text = answer.strip()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1] and "}" not in text[1:-1]:
        text = text[1:-1]
    return text if "\\" in text else text.lower()


def has_words(answer: str) -> bool:
    """Whether a normalised answer has words in it, which algebra would take for products of letters ("seat" = "east")."""
    return re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", answer) is not None


def labels_of(sample: Sample) -> list[str]:
    """The label's accepted answers: itself or each of a list; numbers as text; of a boxed one what is in the box."""
    raw = sample.label if isinstance(sample.label, (list, tuple)) else [sample.label]
    labels = [_text(label, sample) for label in raw if label is not None and label != ""]
    if not labels:
        raise ValueError(f"{_where(sample)} has no label; set --label-key to the key that holds it")
    return labels


def _where(sample: Sample) -> str:
    """The sample's line in the prompt file, where the controller has noted it, else its number."""
    return str(sample.metadata.get("source") or f"sample {sample.index} (prompt {sample.group_index})")


def _text(label: Any, sample: Sample) -> str:
    if isinstance(label, bool) or not isinstance(label, (str, int, float)):
        raise ValueError(f"the label of {_where(sample)} must be a string, a number, or a list of them, not {label!r}")
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    boxed = last_boxed(text)
    return text if boxed is None else boxed
