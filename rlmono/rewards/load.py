"""`load_function`: a user's function from `package.module.function` or `path/file.py:function`."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class LoadError(ValueError):
    """A function cannot be loaded; the message says what is missing, and what is there instead."""


@functools.cache
def load_function(path: str) -> Callable[..., Any]:
    """The function at `path`. LoadError for a missing file, module or name, and for a module that fails on import."""
    file, colon, name = path.rpartition(":")
    if colon:
        module = _from_file(file, path)
    else:
        package, _, name = path.rpartition(".")
        if not package:
            raise LoadError(f"{path!r} names no function; write package.module.function or path/file.py:function")
        module = _from_package(package, path)
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, [n for n in vars(module) if callable(getattr(module, n))], 3)
        raise LoadError(f"{path!r}: {module.__file__ or module.__name__} has no {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    if not callable(function):
        raise LoadError(f"{path!r} is no function but a {type(function).__name__}")
    return function


def _from_package(package: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None and (package + ".").startswith(error.name + ".")
        hint = f" (searched from {Path.cwd()} and PYTHONPATH; a file goes in as path/file.py:function)" if missing else ""
        raise LoadError(f"{path!r}: importing {package} failed with {type(error).__name__}: {error}{hint}") from error


def _from_file(file: str, path: str) -> ModuleType:
    source = Path(file).expanduser().absolute()
    if source.suffix != ".py" or not source.is_file():
        raise LoadError(f"{path!r}: {source} is not a Python file; write package.module.function or path/file.py:function")
    name = f"{source.stem}_{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"      # two files of one name stay apart
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path!r}: {source} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise LoadError(f"{path!r}: importing {source} failed with {type(error).__name__}: {error}") from error
    return module
