"""`--rm-type ifbench`: 1 when the response follows every instruction that its prompt's metadata lists, else 0.

The metadata is that of IFEval (arXiv:2311.07911) and IFBench (arXiv:2507.02833): `instruction_id_list`, and `kwargs`, a list with one object of
arguments for each (null where there is none). The checks are in `ifeval.py` and `held_out.py`; they are this project's own, written from the
instructions' wording, so that a sentence or a word may now and then be counted otherwise than by the benchmarks' own programs. What comes
before the last `</think>` is left out.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Mapping
from typing import Any

from rlmono.data.sample import Sample
from rlmono.rewards.answers import after_thinking
from rlmono.rewards.ifbench.held_out import HELD_OUT, PACKAGES
from rlmono.rewards.ifbench.ifeval import IFEVAL
from rlmono.rewards.ifbench.text import Check

INSTRUCTIONS: dict[str, Check] = {**IFEVAL, **HELD_OUT}


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 or 0.0. ValueError for metadata that `check` refuses."""
    checks = instructions_of(sample.metadata)
    response = after_thinking(sample.response).strip()
    return float(bool(response) and all(follows(response) for follows in checks))


def check(label: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt with an unknown instruction, or with one that lacks an argument."""
    instructions_of(metadata)


def instructions_of(metadata: Mapping[str, Any]) -> list[Check]:
    """A check of a response for each instruction of a prompt's metadata. ValueError names what is missing or unknown."""
    ids = metadata.get("instruction_id_list")
    if not isinstance(ids, list) or not ids:
        raise ValueError("ifbench: the metadata has no instruction_id_list, a list of the instructions to follow")
    arguments = metadata.get("kwargs")
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if arguments is None:
        arguments = [{}] * len(ids)
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise ValueError(f"ifbench: kwargs must be a list of {len(ids)} objects, one for each instruction of instruction_id_list")
    return [_instruction(id, given or {}) for id, given in zip(ids, arguments, strict=True)]


def _instruction(id: Any, given: Mapping[str, Any]) -> Check:
    if id not in INSTRUCTIONS:
        raise ValueError(f"ifbench: the instruction {id!r} is unknown; there are {', '.join(sorted(INSTRUCTIONS))}")
    if id in PACKAGES and importlib.util.find_spec(PACKAGES[id]) is None:
        raise ValueError(f"ifbench: {id} needs the package {PACKAGES[id]}: pip install 'rlmono[ifbench]'")
    parameters = list(inspect.signature(INSTRUCTIONS[id]).parameters.values())[1:]
    missing = [p.name for p in parameters if p.default is p.empty and given.get(p.name) is None]
    if missing:
        raise ValueError(f"ifbench: the kwargs of {id} lack {', '.join(missing)}")
    # Tables have every key in every row, with null for what does not belong there, and 3.0 for 3.
    chosen = {p.name: given[p.name] for p in parameters if given.get(p.name) is not None}
    whole = {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in chosen.items()}
    return functools.partial(INSTRUCTIONS[id], **whole)
