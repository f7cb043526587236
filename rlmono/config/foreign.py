"""The argument names of SGLang and Megatron-core, read from their installed source.

Importing either costs many seconds and needs a device; parsing the one file that has the names costs milliseconds.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Iterator, Optional

from rlmono.config.kinds import Kind, kind_of

MEGATRON_CONFIGS = (
    ("core/transformer/transformer_config.py", ("TransformerConfig", "MLATransformerConfig")),
    ("core/model_parallel_config.py", ("ModelParallelConfig",)),
    ("core/optimizer/optimizer_config.py", ("OptimizerConfig",)),
    ("core/distributed/distributed_data_parallel_config.py", ("DistributedDataParallelConfig",)),
)


class NotInstalled(ValueError):
    """A package whose names are needed is not there; the text is the end of a sentence."""


@dataclass(frozen=True)
class Names:
    """The arguments of a package, and other spellings of some of them."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def sglang_names() -> Names:
    """The fields of SGLang's ServerArgs. Raises NotInstalled."""
    names = Names()
    for node in _fields(_source("sglang", "srt/server_args.py"), "ServerArgs"):
        name, about = node.target.id, _about(node.annotation)  # type: ignore[union-attr]
        kind = kind_of(ast.unparse(node.annotation))
        names.kinds[name] = replace(kind, choices=about.choices) if about.choices else kind
        names.aliases.update((alias.removeprefix("--").replace("-", "_"), name) for alias in about.aliases)
    return names


@lru_cache(maxsize=1)
def megatron_names() -> Names:
    """The fields of Megatron-core's transformer, parallel, optimizer and DDP configs. Raises NotInstalled."""
    names = Names()
    for file, classes in MEGATRON_CONFIGS:
        path = _source("megatron", file)
        for node in (n for c in classes for n in _fields(path, c)):
            name = node.target.id  # type: ignore[union-attr]
            if not name.startswith("_"):
                names.kinds.setdefault(name, kind_of(ast.unparse(node.annotation)))
    return names


def _source(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or () if spec else ()):
        if (path := Path(folder) / file).exists():
            return path
    raise NotInstalled(f"cannot be checked: {package} is not installed in this environment")


def _fields(path: Path, name: str) -> Iterator[ast.AnnAssign]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from (n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


@dataclass(frozen=True)
class _About:
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def _about(annotation: ast.expr) -> _About:
    """What `A[T, Arg(aliases=[…], choices=[…])]` lists literally."""
    arg = next((n for n in ast.walk(annotation) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "Arg"), None)
    return _About(_strings(arg, "aliases"), _strings(arg, "choices"))


def _strings(call: Optional[ast.Call], keyword: str) -> tuple[str, ...]:
    node = next((k.value for k in call.keywords if k.arg == keyword), None) if call else None
    if not isinstance(node, (ast.List, ast.Tuple)) or not all(isinstance(e, ast.Constant) for e in node.elts):
        return ()
    return tuple(ast.literal_eval(node))
