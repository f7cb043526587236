r"""`--rm-type gpqa`: 1 when the response chooses the right one of several choices, else 0 (GPQA, arXiv:2311.12022).

The metadata may have `choices` (a list, or an object of letter and text), `correct_letter`, and `valid_letters` (default: those of the
choices, else A to H). Without `correct_letter`, the label is the letter, the number of the choice (from 0), or its text. What comes before
the last `</think>` is left out; then the last `\boxed{}` counts, else the last "the answer is …", "answer: …", "option …" with a letter,
else a last line that begins with a letter, or names one letter alone ("So it is (B)."), else one of them that is the text of a choice.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlmono.data.sample import Sample
from rlmono.rewards.answers import after_thinking, last_boxed

_LETTERS = string.ascii_uppercase[:8]
_LOOKED_AT = 200
"""Characters from where a letter may stand."""
_SAID = re.compile(r"\b(?:answer|choice|option)\b[\s*_]*(?:is|would be|must be|:|=)?[\s:*_]*(?:the\s)?\s*(?:correct\s)?\s*"
                   r"(?:answer|choice|option|letter)?[\s:*_]*(\S[^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"[^\w\\]*(?:\\\w+\s*\{)?[^\w\\]*([A-Za-z])(?!\w|['’]\w)[*_`]*(.*)", re.DOTALL)
_NAMED = re.compile(r"(?<![\w'’])(?<!\bnot )(?<!\bnot \()([A-Z])(?![\w'’])[*_`]*(?=(.*))")
_ENDED = re.compile(r"$|[).:\]},;$'’\"]|\s*[-–—(\n]|\s+(?:because|since|as|due|based|which|is|with)\b")
"""What follows a letter that is no word: in "A molecule", A is an article."""


class Target(NamedTuple):
    """The right choice's letter ("" where only its text is known), all letters, and letter → text of the choices."""

    letter: str
    letters: str
    texts: dict[str, str]


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 or 0.0. ValueError when neither label nor metadata say what is right."""
    wanted = target(sample.label, sample.metadata)
    return float(_chosen(after_thinking(sample.response).strip(), wanted) == wanted.letter)


def check(label: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt without a right choice."""
    target(label, metadata)


def target(label: Any, metadata: Mapping[str, Any]) -> Target:
    """The right choice by label and metadata. ValueError says what is missing, or what is wrong with it."""
    texts = _choices(metadata.get("choices"))
    letters = "".join(str(letter).strip().upper() for letter in metadata.get("valid_letters") or texts or _LETTERS)
    named = metadata.get("correct_letter")
    if named is not None:
        letter = str(named).strip().upper()
        if len(letter) != 1 or letter not in letters:
            raise ValueError(f"gpqa: correct_letter is {named!r}, but the letters are {letters}")
        return Target(letter, letters, texts)
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(letters):
            raise ValueError(f"gpqa: the label {label} is the number of no choice: there are {len(letters)}, counted from 0")
        return Target(letters[label], letters, texts)
    if not isinstance(label, str) or not label.strip():
        raise ValueError("gpqa: nothing says which choice is right: give a label (--label-key), or correct_letter in the metadata")
    known = _of_text(label, texts) or (_letter(label, letters) if texts or len(label.strip("() .")) == 1 else None)
    if known is None and texts:
        raise ValueError(f"gpqa: the label {label!r} is neither one of the letters {letters} nor the text of a choice")
    return Target(known, letters, texts) if known else Target("", letters, {"": label})


def _choices(choices: Any) -> dict[str, str]:
    if isinstance(choices, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in choices.items()}
    if choices is None or isinstance(choices, (list, tuple)) and len(choices) <= len(string.ascii_uppercase):
        return {string.ascii_uppercase[i]: str(text) for i, text in enumerate(choices or ())}
    raise ValueError(f"gpqa: choices must be a list of at most 26, or an object of letter and text, not {choices!r:.80}")


def _chosen(text: str, wanted: Target) -> str | None:
    """The letter that a response chooses; None where it can't be told."""
    boxed = last_boxed(text)
    candidates = [boxed] if boxed is not None else [*reversed(_SAID.findall(text)), text.rpartition("\n")[2]]
    by_letter = [letter for candidate in candidates if wanted.letter and (letter := _letter(candidate, wanted.letters))]
    if not by_letter and boxed is None and wanted.letter and len(named := _named(candidates[-1], wanted.letters)) == 1:
        by_letter = [*named]
    by_text = [letter for candidate in (*candidates, text) if (letter := _of_text(candidate, wanted.texts)) is not None]
    return next(iter(by_letter or by_text), None)


def _letter(text: str, letters: str) -> str | None:
    """The letter that a text begins with: "B", "(b).", "**B** because", r"\\text{B}", "B) the text of the choice"."""
    match = _LETTER.match(text.strip()[:_LOOKED_AT])
    if match is None or match[1].upper() not in letters:
        return None
    is_word = match[1].islower() or match[1] in "AI"
    return None if is_word and not _ENDED.match(match[2]) else match[1].upper()


def _named(line: str, letters: str) -> set[str]:
    """The letters that stand in a line alone, or in brackets, before a comma or the end: not those of other words."""
    return {letter for letter, rest in _NAMED.findall(line[-_LOOKED_AT:]) if letter in letters and _ENDED.match(rest)}


def _of_text(text: str, texts: Mapping[str, str]) -> str | None:
    return next((letter for letter, choice in texts.items() if _plain(choice) == _plain(text)), None)


def _plain(text: str) -> str:
    """Words alone, in small letters."""
    return re.sub(r"\W+", " ", re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)).strip().casefold()
