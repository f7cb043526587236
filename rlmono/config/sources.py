"""`resolve`: one Config from defaults, the HF config, env files, variables and flags; later ones win.

A value that no option has, or an option that does not exist, is a line in one ConfigError, with its source. Only when
every value by itself is right are they compared with each other (validate.py).
"""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Mapping, Sequence

from rlmono.config import names, validate
from rlmono.config.hf import model_shape, shape_with
from rlmono.config.kinds import parse
from rlmono.config.names import Target, UnknownName
from rlmono.config.option import ConfigError, options
from rlmono.config.schema import Config
from rlmono.config.words import ENV_FILE, Given, read_env_file, read_flags, read_variables, split


class Found:
    """Values by room and key, with their sources, and what there is to say about them."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {"field": {}, "model": {}, "sglang": {}, "megatron": {}}
        self.origin: dict[str, str] = {}
        self.notes: list[str] = []

    def put(self, given: Given) -> None:
        """Take one option. Raises ValueError with the end of a sentence about it."""
        target = names.find(given.name)
        value = _value(given, target)
        if target.room == "ignored":
            if target.expect is not names.ANY and value != target.expect:
                raise ValueError(f"can only be {target.expect}: {target.note.removeprefix('is not needed: ')}")
            self._note(given, target)
            return
        if target.means is not None:
            if not value:
                return
            value = target.means
        if target.option is not None:
            target.option.check(value)
            value = self._ours(given, target, value)
        self.values[target.room][target.key] = list(value) if isinstance(value, tuple) and target.room != "field" else value
        self.origin[target.key if target.room == "field" else f"{target.room}.{target.key}"] = given.source
        self._note(given, target)

    def _ours(self, given: Given, target: Target, value: Any) -> Any:
        """Values of our own options that users may write in a shorter or an older way."""
        if target.key == "eval_prompt_data":
            return value and eval_sets(value)
        if isinstance(value, str) and value.startswith("slime."):
            if value not in names.FUNCTIONS:
                raise ValueError(f"names {value}, which rlmono does not ship; it ships: {', '.join(dict.fromkeys(names.FUNCTIONS.values()))}")
            self.notes.append(f"{given.spelling}: {value} is {names.FUNCTIONS[value]} here")
            return names.FUNCTIONS[value]
        return value

    def _note(self, given: Given, target: Target) -> None:
        note = f"{given.spelling} {target.note}"
        if target.note and note not in self.notes:
            self.notes.append(note)


def resolve(argv: Sequence[str], environ: Mapping[str, str],
            finish: Callable[[Config, Mapping[str, str]], Config] = validate.validated) -> Config:
    """The configuration of a run, complete and free of contradictions; `finish` is what compares its values.

    argv: flags without the program and verb. environ: the process's variables. Raises ConfigError with a line a problem.
    """
    problems: list[str] = []
    files, flags = read_flags(argv, problems)
    files = [*environ.get(ENV_FILE, "").split(":"), *files]
    lines = [given for file in files if file for given in read_env_file(file, environ, problems)]
    found = Found()
    for given in [*lines, *read_variables(environ), *flags]:
        try:
            found.put(given)
        except UnknownName as error:
            problems.append(given.problem(f"{error}; did you mean {given.spell(error.nearest)}?" if error.nearest
                                          else f"{error}; docs/options.md lists them all"))
        except ValueError as error:
            problems.append(given.problem(str(error)))
    problems += _add_model(found)
    if problems:
        raise ConfigError(problems)
    return finish(_config(found), environ)


def eval_sets(words: Sequence[str]) -> tuple[str, ...]:
    """`name path [name path …]`, where a path alone takes the file's name: (name, path, name, path, …)."""
    sets: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if re.search(r"/|\.(jsonl|parquet|arrow)(@\[.*\])?$", word):
            sets += [re.sub(r"(\.\w+)?(@\[.*\])?$", "", word.rstrip("/").rsplit("/", 1)[-1]), word]
        elif rest:
            sets += [word, rest.pop(0)]
        else:
            raise ValueError(f"has the name {word!r} without a path; write: name path [name path …]")
    if len(set(sets[::2])) < len(sets[::2]):
        raise ValueError(f"has two sets of one name: {', '.join(sets[::2])}; write: name path [name path …]")
    return tuple(sets)


def _value(given: Given, target: Target) -> Any:
    words: Sequence[str] = given.words
    if given.one_text and target.kind.many and words[0] and not words[0].startswith("["):
        words = split(words[0])
    value = parse(target.kind, words)
    return not value if target.negated else value


def _add_model(found: Found) -> list[str]:
    """Put the HF config's shape under what was given of it; the problems."""
    path = found.values["field"].get("hf_checkpoint")
    if path is None:
        return []
    try:
        shape = model_shape(path)
    except ConfigError as error:
        return [f"{found.origin['hf_checkpoint']}: {problem}" for problem in error.problems]
    given = found.values["model"]
    problems = [f"{found.origin[f'model.{k}']}: {k} is {v}, but {path}/config.json says {shape.get(k)}: {why}; leave it out"
                for k, v in given.items() if (why := _misfit(k, v, shape))]
    free = {k: v for k, v in given.items() if k in names.FREE_SHAPE}
    found.values["model"] = {**shape, **free}
    found.origin.update({f"model.{k}": f"{path}/config.json" for k in shape if k not in given})
    return problems + _engine_alone(found, path)


def _misfit(key: str, given: Any, shape: Mapping[str, Any]) -> str:
    """Why a value of the shape can't be other than config.json's; empty where it is the same, may differ, or says nothing for this architecture."""
    if _same(given, shape.get(key)) or key in names.unused_shape(shape):
        return ""
    if key == "rotary_percent" and shape[key] == 1.0:
        return "the engine's model of this architecture has no partial rotary embedding"
    return "" if key in names.FREE_SHAPE else "its weights would not fit"


def _engine_alone(found: Found, path: str) -> list[str]:
    """Problems of --sglang-json-model-override-args: what it says of the shape would not reach the trainer."""
    text = found.values["sglang"].get("json_model_override_args")
    if not text:
        return []
    source = found.origin["sglang.json_model_override_args"]
    try:
        said, changed = shape_with(path, {}), shape_with(path, json.loads(text))
    except (ValueError, TypeError) as error:
        return [f"{source}: {error}"]
    return [f"{source}: it changes the engine's {k} to {v}, and not the trainer's; "
            + (f"use --{k.replace('_', '-')} {v} for both" if k in names.FREE_SHAPE else "leave it out")
            for k, v in changed.items() if v != said.get(k)]


def _same(given: Any, said: Any) -> bool:
    """Lists are equal to tuples, and what is off may be left unsaid."""
    return (list(given) if isinstance(given, (list, tuple)) else given) == said or (not given and not said)


def _config(found: Found) -> Config:
    values, sglang = found.values["field"], found.values["sglang"]
    if sglang.get("ep_size") == names.ENGINE_SIZE:
        sglang["ep_size"] = values.get("rollout_num_gpus_per_engine", 1)
    origin = {field.name: found.origin.get(field.name, "default") for field, _ in options(Config)}
    return Config(**values, model=found.values["model"], sglang=sglang, megatron=found.values["megatron"],
                  origin={**origin, **found.origin}, notes=tuple(found.notes))
