"""docs/options.md from the schema: `python -m rlmono.config.docs --write`, or `--check` that it is current."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, Iterable

from rlmono.config import names
from rlmono.config.kinds import kind_of
from rlmono.config.option import Option
from rlmono.config.schema import SECTIONS
from rlmono.config.words import ENV_FILE, LAUNCH_VARIABLES

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
COMMAND = "python -m rlmono.config.docs --write"

def _flags(*groups: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"`--{(prefix + name).replace('_', '-')}`" for group in groups for name in group)


HEAD = f"""# Options

This page is made from `rlmono/config/schema.py` by `{COMMAND}`; a test keeps it current.

## Where values come from
Every option has one name. Later sources win:

1. the defaults below;
2. the model's shape from `config.json` in `--hf-checkpoint`;
3. env files, `--env-file recipe.env` (any number of times) or `{ENV_FILE}=one.env:two.env`: lines `RLMONO_NAME=value`, with comments,
   quotes and `${{NAME:-default}}`, so that a shell can source them too;
4. variables, `RLMONO_ROLLOUT_BATCH_SIZE=32`;
5. flags, `--rollout-batch-size 32` (or `--rollout_batch_size`, or with `=`).

A switch is on as a bare flag; `--flag false` and `--no-flag` turn it off. A list takes several words (in a variable: separated by spaces).
An empty value sets an option without a default to nothing. What is unknown, malformed or contradictory stops the program before anything
starts, with every problem, its source and the nearest name. `--dry-run` prints and writes the resolved configuration with the source of
each value. {', '.join(f'`{v}`' for v in LAUNCH_VARIABLES)} belong to the launch scripts and are no options.

## Arguments that pass through
`--sglang-<argument>` (`RLMONO_SGLANG_<ARGUMENT>`) goes to SGLang's ServerArgs by its own name; the installed version says which there are.
Earlier names are translated with a note: {_flags(names.SGLANG_RENAMED, names.SGLANG_SWITCHES, prefix="sglang_")}.
What rlmono sets itself is refused: {_flags(names.SGLANG_OURS, prefix="sglang_")}.

The names of Megatron-core's TransformerConfig, MLATransformerConfig, ModelParallelConfig, OptimizerConfig and
DistributedDataParallelConfig go to Megatron. The model's shape may be repeated by Megatron's command-line names:
{_flags(names.SHAPE)}. It must then agree with `config.json`, except for {_flags(names.FREE_SHAPE)}.
Other command-line names are translated with a note: {_flags(names.MEGATRON_RENAMED, names.MEGATRON_SWITCHES)}.
Accepted with a note, since rlmono does so anyway: {_flags(names.ALWAYS)}.

Function paths of the system that users come from are translated with a note:
{', '.join(f'`{theirs}` is `{ours}`' for theirs, ours in names.FUNCTIONS.items())}.
"""


def page() -> str:
    """The whole of docs/options.md."""
    parts = [HEAD]
    for section in SECTIONS:
        about = " ".join((inspect.getdoc(section) or "").split())
        parts.append(f"\n## {section.__name__}\n{about}\n\n| flag | type | default | meaning |\n| --- | --- | --- | --- |\n")
        parts += [_row(field, field.metadata["option"]) for field in dataclasses.fields(section)]
    return "".join(parts)


def help_text(part: str = "") -> str:
    """The options for a terminal, by section; with `part`, those whose name has it in it."""
    part = part.strip("-").replace("-", "_")
    lines = ["Options; docs/options.md says where values come from. `--help PART` shows only those with PART in their name."]
    for section in SECTIONS:
        fields = [field for field in dataclasses.fields(section) if part in field.name]
        lines += [f"\n{section.__name__}: {' '.join((inspect.getdoc(section) or '').split())}"] if fields else []
        for field in fields:
            default = f" (default {_default(field.default).strip('`')})" if field.default not in (None, False) else ""
            kind = str(kind_of(str(field.type)))
            lines.append(f"  --{field.name.replace('_', '-')}{'' if kind == 'bool' else f' {kind}'}")
            lines += textwrap.wrap(_meaning(field.metadata["option"]).replace("*", "").replace("`", "") + default, 110, initial_indent=" " * 6,
                                   subsequent_indent=" " * 6)
    return "\n".join(lines if len(lines) > 1 else [f"no option has {part!r} in its name"])


def main(argv: list[str]) -> int:
    """Write or check the page; the exit status."""
    if argv == ["--write"]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if argv == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE} is not what the schema says: run `{COMMAND}`", file=sys.stderr)
        return 1
    print(f"usage: {COMMAND} | --check", file=sys.stderr)
    return 2


def _row(field: dataclasses.Field[Any], option: Option) -> str:
    cells = (f"`--{field.name.replace('_', '-')}`", str(kind_of(str(field.type))), _default(field.default), _meaning(option))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(option: Option) -> str:
    text = option.help
    if option.choices:
        text += f" One of {', '.join(f'`{c}`' for c in option.choices)}."
    bounds = [f"{words} {bound:g}" for words, bound in (("at least", option.minimum), ("above", option.above), ("at most", option.maximum),
                                                        ("below", option.below)) if bound is not None]
    if bounds:
        text += f" {' and '.join(bounds).capitalize()}."
    if option.later:
        text += f" *Comes later ({option.later}).*"
    if option.later_above:
        text += f" *Above {option.later_above[0]:g} comes later ({option.later_above[1]}).*"
    if option.later_choices:
        text += f" *Come later: {', '.join(option.later_choices)}.*"
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
