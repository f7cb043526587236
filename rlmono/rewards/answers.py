"""Final answers of mathematics problems: out of a response, out of a label, and in one spelling."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rlmono.data.sample import Sample

_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)"

_UNITS = (r"degrees?|[mck]m|(?:centi|milli|kilo)?met(?:er|re)s?|inch(?:es)?|f(?:oo|ee)?t|yards?|miles?|mph|seconds?|minutes?|hours?|days?|"
          r"weeks?|months?|years?|(?:kilo)?grams?|kg|pounds?|dollars?|cents?|percent|units?|points?")

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[!,;: ]|~", " "),
    (r"\{,\}", ""),
    (r"(?<!\\)\\[()]|°", ""),
    ("\N{MINUS SIGN}", "-"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", ""),
    (r"\\?[%$]", ""),
    (r"^\s*" + _WORDS + r"\{([^{}]*)\}\s*$", r"\1"),
    (r"(?<=\S)\s*" + _WORDS + r"\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),        # a unit
    (r"(?<=[\d})])\s*(?:(?:square|cubic)\s+)?(?:" + _UNITS + r")(?:\s*\^\{?\d\}?)?[\s.]*$", ""),
    (r"^\s*\w{1,2}\s*=(?!=)", ""),                                          # x = 5
    (r"^\s*\+(?=\s*[\d.\\])", ""),
    (r"^\s*(-?\d+)\s+(\d+)\s*/\s*(\d+)\s*$", r"\1\\frac{\2}{\3}"),          # 1 1/2
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


_END = re.compile(r"(?:(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)\s*)+\Z")
_LONGEST_END = 200


def without_end(response: str) -> str:
    """A response without the tokens that end it, which are in its text (unless --rollout-skip-special-tokens): `34<|im_end|>` says 34."""
    end = _END.search(response, max(len(response) - _LONGEST_END, 0))
    return response[:end.start()] if end else response


def after_thinking(response: str) -> str:
    """What a response says after its last `</think>`, or all of it where there is none, up to the token that ends it."""
    return without_end(response.rpartition("</think>")[2])


def normalise(answer: str) -> str:
    r"""One spelling of an answer: without spaces, units, `\left`, `$`, `\(`, `%` and degrees, thousands without commas, fractions as
    `\frac{a}{b}`, numbers without idle zeros or exponents, words in lower case."""
    text = answer.strip()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"-?\d+(\.\d+)?[eE][+-]?\d{1,2}", text):
        text = f"{Decimal(text):f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
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
