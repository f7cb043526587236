"""Reading what users wrote: env files, environment variables and flags, each with its source."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

PREFIX = "RLMONO_"
LAUNCH_VARIABLES = ("RLMONO_TORCH_INDEX", "RLMONO_PYTHON", "RLMONO_VENV")
"""Variables with our prefix that launch scripts read; no options."""
ENV_FILE = "RLMONO_ENV_FILE"

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VALUE = re.compile(r"""(?:'(?P<literal>[^']*)'|"(?P<quoted>[^"]*)"|(?P<bare>(?:[^\s'"#]|(?<=\S)\#)*))\s*(?:(?<=\s)\#.*)?""")
_REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True)
class Given:
    """One option as a user gave it: `name` in lower case with underscores, `words` as written, and where."""

    name: str
    words: tuple[str, ...]
    source: str
    spelling: str
    one_text: bool = False
    """True where the words of a list come as one text, to be split as a shell would."""

    def problem(self, text: str) -> str:
        """A line for ConfigError; `text` is the end of a sentence about the option."""
        return f"{self.source} {text}" if self.spelling in self.source else f"{self.source}: {self.spelling} {text}"

    def spell(self, name: str) -> str:
        """Another option's name, spelt as this one is."""
        return "--" + name.replace("_", "-") if self.spelling.startswith("--") else PREFIX + name.upper()


def read_flags(argv: Sequence[str], problems: list[str]) -> tuple[list[str], list[Given]]:
    """(the env files named by --env-file, all other flags). A flag has the words up to the next `--`."""
    files: list[str] = []
    flags: list[Given] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"{word!r} on the command line belongs to no option: options begin with --")
            continue
        spelling, equals, value = word.partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name = spelling[2:].replace("-", "_")
        if name != "env_file":
            flags.append(Given(name, tuple(values), f"flag {spelling}", spelling))
        elif values:
            files += values
        else:
            problems.append("flag --env-file needs the path of a file")
    return files, flags


def read_variables(environ: Mapping[str, str]) -> list[Given]:
    """The RLMONO_ variables that are options, by name."""
    return [_variable(key, value, f"variable {key}") for key, value in sorted(environ.items())
            if key.startswith(PREFIX) and key not in LAUNCH_VARIABLES and key != ENV_FILE]


def read_env_file(path: str, environ: Mapping[str, str], problems: list[str]) -> list[Given]:
    """The lines `RLMONO_NAME=value` of a file that a shell could source too.

    `'…'` is taken as it is; elsewhere `$NAME`, `${NAME}` and `${NAME:-default}` stand for earlier lines of the file and
    for the environment. Other keys than RLMONO_ ones are only for that.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        problems.append(f"env file {path} cannot be read: {why}")
        return []
    known, given = dict(environ), []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        source = f"{path}:{number}"
        try:
            key, value = _assignment(text, known)
        except ValueError as error:
            problems.append(f"{source}: {error}")
            continue
        known[key] = value
        if key.startswith(PREFIX) and key not in LAUNCH_VARIABLES:
            given.append(_variable(key, value, source))
    return given


def _variable(key: str, value: str, source: str) -> Given:
    return Given(key.removeprefix(PREFIX).lower(), (value,), source, key, one_text=True)


def _assignment(text: str, known: Mapping[str, str]) -> tuple[str, str]:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"is not NAME=value: {text!r}")
    key, written = match.groups()
    value = _VALUE.fullmatch(written)
    if value is None:
        raise ValueError(f"the value of {key} is not one word: put it in quotes ({written!r})")
    if value["literal"] is not None:
        return key, value["literal"]
    return key, _REFERENCE.sub(lambda m: _look_up(m, known), value["quoted"] if value["quoted"] is not None else value["bare"])


def _look_up(match: re.Match[str], known: Mapping[str, str]) -> str:
    name, default = match[1] or match[2], match[3]
    if known.get(name):
        return known[name]
    if default is None:
        raise ValueError(f"{name} is not set; export it, or write ${{{name}:-default}}")
    return default


def split(text: str) -> list[str]:
    """The words of a list, as a shell would split them. Raises ValueError with the end of a sentence."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words ({error}): {text!r}") from None
