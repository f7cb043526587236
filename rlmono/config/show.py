"""The resolved configuration for people, and as `config.json` for programs."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, Iterator, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from rlmono.config.batches import batch_arithmetic
from rlmono.config.option import options
from rlmono.config.schema import SECTIONS, Config
from rlmono.config.validate import unsupported

ROOMS = {"model": "Model shape", "sglang": "To SGLang", "megatron": "To Megatron"}


def resolved(config: Config) -> dict[str, dict[str, Any]]:
    """{name: {value, source}}, with `model.x`, `sglang.x` and `megatron.x` for what has no flat name."""
    values = {field.name: getattr(config, field.name) for field, _ in options(Config)}
    values.update((f"{room}.{name}", value) for room in ROOMS for name, value in getattr(config, room).items())
    return {name: {"value": value, "source": config.origin.get(name, "default")} for name, value in values.items()}


def write_config(config: Config, run_dir: Path) -> Path:
    """Write `<run_dir>/config.json`; the path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.json"
    path.write_text(json.dumps(resolved(config), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def show_config(config: Config, out: TextIO) -> None:
    """Print every value and its source, by section; what is not the default stands out. Plain text where `out` is no terminal."""
    plain = not out.isatty()
    console = Console(file=out, highlight=False, width=160 if plain else None)
    for title, rows in _sections(config):
        table = Table(title=title, title_justify="left", title_style="bold", box=None if plain else box.SIMPLE_HEAD, show_header=not plain,
                      padding=(0, 2, 0, 0))
        for column in ("option", "value", "source"):
            table.add_column(column, overflow="fold")
        for name, value, source in rows:
            given = source != "default"
            label = f"{'*' if given else ' '} {name}" if plain else name
            table.add_row(label, value, source, style="bold cyan" if given and not plain else None)
        console.print(table)


def dry_run(config: Config) -> None:
    """Print what a run would be, and write it to config.json and dry-run.txt in the run directory. Starts nothing.

    Raises WorldError when no grid of ranks fits, ConfigError when the batch does not divide among its ranks.
    """
    from rlmono.world.roles import RankGrid  # the world room imports this one
    grid = RankGrid.for_config(config, None, None)
    plan = batch_arithmetic(config, grid.data_parallel_size)
    run_dir = Path(config.run_dir or f"runs/dry-run-{time.strftime('%Y%m%d-%H%M%S')}")
    blocks = (("Notes", config.notes), ("Comes later: train refuses to start with", unsupported(config)),
              ("Ranks", grid.lines()), ("Batches", plan.lines()))
    text = "".join(f"\n{title}\n" + "".join(f"  {line}\n" for line in lines) for title, lines in blocks if lines)
    written = io.StringIO()
    show_config(config, written)
    path = write_config(config, run_dir)
    (run_dir / "dry-run.txt").write_text(written.getvalue() + text, encoding="utf-8")
    show_config(config, sys.stdout)
    print(f"{text}\nDry run: nothing was started. {path} has the values and their sources, {run_dir / 'dry-run.txt'} this page.")


def _sections(config: Config) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    values = resolved(config)
    for section in SECTIONS:
        yield section.__name__, [_row(f.name, f.name, values) for f in dataclasses.fields(section)]
    for room, title in ROOMS.items():
        if names := getattr(config, room):
            yield title, [_row(n, f"{room}.{n}", values) for n in names]


def _row(label: str, name: str, values: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    value = values[name]["value"]
    text = "" if value is None else " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return label, text.replace("[", r"\["), values[name]["source"].replace("[", r"\[")
