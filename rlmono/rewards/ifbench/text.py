"""Words, sentences, paragraphs and lines of a response."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

Check = Callable[..., bool]
"""(response, **arguments) -> whether the instruction is followed."""

_NO_END = re.compile(r"(?:\b(?i:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|vol|fig|inc|ltd|approx|e\.g|i\.e|cf|a\.m|p\.m)|\b[A-Z]|(?:^|\n)\s*\d+)\.$")
"""An abbreviation, an initial, or the number of a list's item."""
_SENTENCE_END = re.compile(r"""[.!?…。！？]+["'”’)\]*_]*(?=\s|$)|(?<=[。！？])""")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def plain_words(text: str) -> list[str]:
    """What spaces separate, in small letters and without the punctuation around it; nothing that is punctuation alone."""
    stripped = (part.strip(string.punctuation + "“”‘’…–—").lower() for part in text.split())
    return [word for word in stripped if word]


def sentences(text: str) -> list[str]:
    """Sentences with their final punctuation. Abbreviations, initials and numbers of a list end none; an empty line ends one."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        start = 0
        for end in _SENTENCE_END.finditer(block):
            piece = block[start:end.end()]
            last = end.end() == len(block.rstrip())
            if not last and end.group() == "." and _NO_END.search(piece):
                continue
            found.append(piece)
            start = end.end()
        found.append(block[start:])
    return [piece.strip() for piece in found if re.search(r"\w", piece)]


def paragraphs(text: str) -> list[str]:
    """What empty lines separate."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def lines(text: str) -> list[str]:
    """Lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()]


def holds(count: float, relation: str | None, wanted: float) -> bool:
    """`count` stands in a relation to `wanted`: at least, less than, at most, more than, exactly."""
    match (relation or "at least").strip().lower():
        case "at least":
            return count >= wanted
        case "less than":
            return count < wanted
        case "at most":
            return count <= wanted
        case "more than":
            return count > wanted
        case "exactly" | "equal to":
            return count == wanted
    raise ValueError(f"ifbench: the relation {relation!r} is none of at least, less than, at most, more than, exactly")
