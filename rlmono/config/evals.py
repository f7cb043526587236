"""Evaluation sets: from `--eval-prompt-data` and the `--eval-*` options, or from the YAML file of `--eval-config`.

    defaults: {temperature: 0.6, n_samples_per_eval_prompt: 4}
    datasets:
      - {name: aime, path: /data/aime.jsonl, n_samples_per_eval_prompt: 16, rm_type: deepscaler}
      - {name: gpqa, path: "/data/gpqa.parquet@[:100]", label_key: letter, rm_type: gpqa}

What a set leaves open it has from `defaults`, then from the `--eval-*` options, then from the rollout's.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Mapping, Optional

import msgspec
import yaml

from rlmono.config.option import ConfigError
from rlmono.config.schema import Config

Text = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class EvalSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One set, with everything resolved; the names are those of the YAML file."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.+-]+$")]
    path: Text
    input_key: Text
    label_key: Optional[Text] = None
    metadata_key: Text
    tool_key: Optional[Text] = None
    n_samples_per_eval_prompt: Count
    max_response_len: Count
    temperature: Annotated[float, msgspec.Meta(ge=0)]
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)]
    top_k: Annotated[int, msgspec.Meta(ge=-1)]
    stop: tuple[Text, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    rm_type: Optional[Text] = None
    custom_rm_path: Optional[Text] = None
    custom_generate_function_path: Optional[Text] = None
    reward_key: Optional[Text] = None
    metadata_overrides: dict[str, Any] = {}

    def config(self, config: Config) -> Config:
        """The run's config with this set's keys and reward in it."""
        judge: dict[str, Any] = {"rm_type": self.rm_type, "custom_rm_path": self.custom_rm_path} if self.rm_type or self.custom_rm_path else {}
        return dataclasses.replace(config, label_key=self.label_key, reward_key=self.reward_key, eval_reward_key=None, **judge)


def eval_sets(config: Config) -> tuple[EvalSet, ...]:
    """All sets of a run. Raises ConfigError that lists what is wrong with the file."""
    if config.eval_config is not None:
        return _read(config.eval_config, config)
    words, base = config.eval_prompt_data or (), _base(config)
    return tuple(EvalSet(**base, name=name, path=path) for name, path in zip(words[::2], words[1::2], strict=True))


def _base(config: Config) -> dict[str, Any]:
    """What a set has that says nothing."""
    def either(name: str) -> Any:
        value = getattr(config, f"eval_{name}")
        return getattr(config, f"rollout_{name}", getattr(config, name, None)) if value is None else value
    return {"input_key": either("input_key"), "label_key": either("label_key"), "metadata_key": config.metadata_key, "tool_key": config.tool_key,
            "n_samples_per_eval_prompt": config.n_samples_per_eval_prompt, "reward_key": either("reward_key"),
            "stop": config.rollout_stop or (), "stop_token_ids": config.rollout_stop_token_ids or (),
            **{name: either(name) for name in ("max_response_len", "temperature", "top_p", "top_k")}}


def _read(path: str, config: Config) -> tuple[EvalSet, ...]:
    defaults, entries = _sections(path)
    problems, sets = [], []
    for entry in entries:
        where = f"eval_config {path}: set {entry.get('name', '?')!r}"
        unknown = [name for name in {**defaults, **entry} if name not in EvalSet.__struct_fields__]
        problems += [f"{where}: {_unknown(name)}" for name in unknown]
        try:
            found = msgspec.convert(_base(config) | defaults | entry, EvalSet)
        except msgspec.ValidationError as error:
            if not unknown:
                problems.append(f"{where}: {str(error).replace('`', '').replace('$.', '')}")
            continue
        if found.rm_type and found.custom_rm_path:
            problems.append(f"{where}: has rm_type and custom_rm_path; give one of the two")
        sets.append(found)
    names = [s.name for s in sets]
    problems += [f"eval_config {path}: two sets are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return tuple(sets)


def _sections(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(defaults, sets) as they stand in the file, which may have all of it under `eval`."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"eval_config {path} cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"eval_config {path} is not YAML: {' '.join(str(error).split())}"]) from None
    found = found["eval"] if isinstance(found, dict) and set(found) == {"eval"} else found
    sections = found if isinstance(found, dict) else {}
    if other := sorted(map(str, set(sections) - {"defaults", "datasets"})):
        raise ConfigError([f"eval_config {path}: has {', '.join(other)}, but its sections are defaults and datasets"])
    defaults, sets = sections.get("defaults") or {}, sections.get("datasets")
    if isinstance(sets, dict):          # name: path, or name: {path: …}
        sets = [{"name": name, **(about if isinstance(about, dict) else {"path": about})} for name, about in sets.items()]
    if not isinstance(defaults, Mapping) or not isinstance(sets, list) or not sets or not all(isinstance(s, dict) for s in sets):
        raise ConfigError([f"eval_config {path}: needs `datasets`, a list of sets with name and path each, and may have `defaults`, "
                           "values for all of them"])
    return dict(defaults), sets


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(str(name), EvalSet.__struct_fields__, 1, 0.5)
    return f"{name} is not an option of a set" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(EvalSet.__struct_fields__)}")
