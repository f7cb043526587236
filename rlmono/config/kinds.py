"""From words to values: what a type annotation allows, and how text becomes such a value."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Callable, Sequence

WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "json": "JSON"}
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Kind:
    """What a value may be. `many`: several words make a tuple; `single`: where `many`, one word alone is a plain
    value. `base` is a key of WORDS, or "none" for what cannot be written as text (functions, torch types)."""

    base: str
    many: bool = False
    single: bool = False
    optional: bool = False
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.base} …" if self.many else self.base


def kind_of(annotation: str) -> Kind:
    """The kind of a type annotation as it stands in the source, `Optional[tuple[str, ...]]` say."""
    return _kind(ast.parse(annotation, mode="eval").body)


def parse(kind: Kind, words: Sequence[str]) -> Any:
    """The value of one option's words. Raises ValueError with the end of a sentence: `needs a number, but got 'x'`."""
    if kind.optional and list(words) == [""]:
        return None
    if kind.base == "none":
        raise ValueError("cannot be written as text: rlmono sets it itself")
    if kind.many:
        if len(words) == 1 and words[0].startswith("[") and kind.base != "str":
            return _layer_list(kind, words[0])
        if kind.single and len(words) == 1:
            return _one(kind, words[0])
        if not words:
            raise ValueError(f"needs one or more values ({WORDS[kind.base]})")
        return tuple(_one(kind, word) for word in words)
    if not words and kind.base == "bool":
        return True
    if len(words) != 1:
        raise ValueError(f"needs {WORDS[kind.base]}, but got {'nothing' if not words else ' '.join(map(repr, words))}")
    return _one(kind, words[0])


def is_bool_word(word: str) -> bool:
    return word.lower() in TRUE + FALSE


def _one(kind: Kind, word: str) -> Any:
    try:
        value = _READ[kind.base](word)
    except ValueError:
        raise ValueError(f"needs {WORDS[kind.base]}, but got {word!r}") from None
    if kind.choices and value not in kind.choices:
        raise ValueError(f"is {word!r}, but must be one of {', '.join(map(str, kind.choices))}")
    return value


def _bool(word: str) -> bool:
    if not is_bool_word(word):
        raise ValueError
    return word.lower() in TRUE


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError
    return value


def _text(word: str) -> str:
    if not word:
        raise ValueError
    return word


_READ: dict[str, Callable[[str], Any]] = {"bool": _bool, "int": int, "float": _finite, "str": _text, "json": json.loads}


def _layer_list(kind: Kind, word: str) -> tuple[Any, ...]:
    """`[0, 1]`, or Megatron's `[0]*3+[1]*58`."""
    values: list[Any] = []
    for term in word.replace(" ", "").split("+"):
        match = re.fullmatch(r"\[([^\[\]]+)\](?:\*(\d+))?", term)
        if match is None:
            raise ValueError(f"needs a list such as [0,1] or [0]*3+[1]*58, but got {word!r}")
        values += [_one(kind, item) for item in match[1].split(",")] * int(match[2] or 1)
    return tuple(values)


def _kind(node: ast.expr) -> Kind:
    if isinstance(node, ast.Name):
        return Kind({"Dict": "json", "dict": "json"}.get(node.id, node.id if node.id in WORDS else "none"))
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return Kind("none")
    name, inner = node.value.id, node.slice
    parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
    if name == "A":     # SGLang's alias of Annotated
        return _kind(parts[0])
    if name == "Optional":
        return replace(_kind(parts[0]), optional=True)
    if name == "Literal":
        choices = [p.value for p in parts if isinstance(p, ast.Constant)]
        values = tuple(c for c in choices if c is not None)
        return Kind(type(values[0]).__name__, choices=values, optional=None in choices)
    if name in ("List", "list", "Tuple", "tuple", "set"):
        item = _kind(parts[0])
        return Kind("json") if item.base == "json" else replace(item, many=item.base != "none")
    if name == "Union":
        return _union([_kind(p) for p in parts])
    return Kind("json" if name in ("Dict", "dict") else "none")


def _union(kinds: list[Kind]) -> Kind:
    """Of `X | list[X]`: one word is an X, several are a list; of others whatever can be written as text."""
    written = [k for k in kinds if k.base != "none"]
    if not written:
        return Kind("none")
    bases = {k.base for k in written}
    if len(bases) > 1:
        return Kind("str" if "str" in bases else "json")
    return Kind(written[0].base, many=any(k.many for k in written), single=not all(k.many for k in written))
