"""Figures in docs/benchmarks/*.json, and docs/benchmarks.md made of them: `python tests/bench/figures.py` writes the page anew.

A file is a list of figures: `name`, `value`, `unit`, `reference` (what it is held against, or a ceiling), `target`, `command`,
and `machine`; `note` is optional. With `table`, `row` and `column` it is a cell of a table of that title. A target is a comparison such as
"<= 1e-5", or "" where the figure is only reported.
"""

from __future__ import annotations

import json
import operator
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
KEYS = ("name", "value", "unit", "reference", "target", "command", "machine")
COMPARE = {"<=": operator.le, "<": operator.lt, ">": operator.gt, ">=": operator.ge}


def write(topic: str, figures: list[dict[str, Any]]) -> None:
    """docs/benchmarks/<topic>.json, whole or not at all, and the page."""
    for figure in figures:
        missing = [k for k in KEYS if k not in figure]
        if missing:
            raise ValueError(f"figure {figure.get('name')!r} lacks {', '.join(missing)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = FOLDER / f"{topic}.json.partial"
    partial.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, FOLDER / f"{topic}.json")
    write_page()


def met(figure: Mapping[str, Any]) -> bool:
    """The target holds, or there is none."""
    if not figure["target"]:
        return True
    sign, bound = figure["target"].split()
    return COMPARE[sign](figure["value"], float(bound))


def write_page() -> None:
    lines = ["# Benchmarks", "", "Made by `python tests/bench/figures.py` from docs/benchmarks/*.json; each table names what measured it."]
    for path in sorted(FOLDER.glob("*.json")):
        figures = json.loads(path.read_text())
        by_command: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for figure in figures:
            by_command.setdefault((figure["command"], figure["machine"]), []).append(figure)
        lines += ["", f"## {path.stem}"]
        for (command, machine), group in by_command.items():
            lines += ["", f"`{command}` on {machine}"]
            single = [figure for figure in group if "table" not in figure]
            if single:
                lines += ["", "| what | value | target | held against |", "| --- | --- | --- | --- |", *map(_row, single)]
            for title in dict.fromkeys(figure["table"] for figure in group if "table" in figure):
                lines += _table(title, [figure for figure in group if figure.get("table") == title])
    PAGE.write_text("\n".join(lines) + "\n")


def _table(title: str, cells: list[dict[str, Any]]) -> list[str]:
    """Figures of one target and reference, by row and column."""
    columns = list(dict.fromkeys(c["column"] for c in cells))
    at = {(c["row"], c["column"]): f"{c['value']:.2g}" + ("" if met(c) else " **missed**") for c in cells}
    target = f"; target {cells[0]['target']}" if cells[0]["target"] else ""
    lines = ["", f"**{title}**{target}. Held against: {cells[0]['reference']}.", "", f"| | {' | '.join(columns)} |",
             "| --- |" + " --- |" * len(columns)]
    return lines + [f"| {row} | {' | '.join(at.get((row, c), '') for c in columns)} |" for row in dict.fromkeys(c["row"] for c in cells)]


def _row(figure: Mapping[str, Any]) -> str:
    value = f"{figure['value']:.3g}" if isinstance(figure["value"], float) else str(figure["value"])
    note = f" ({figure['note']})" if figure.get("note") else ""
    target = figure["target"] + ("" if met(figure) else " **missed**")
    cells = (f"{figure['name']}{note}", f"{value} {figure['unit']}".strip(), target, figure["reference"])
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def this_machine() -> str:
    """Cores and the versions that decide the figures."""
    from importlib.metadata import version
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "megatron-core", "sglang", "transformers"))
    return f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    write_page()
