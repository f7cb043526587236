"""`rlmono report RUN`: one HTML page about a run, with its pictures as PNGs beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlmono.config.schema import Config
from rlmono.observe.metrics import read_metrics
from rlmono.observe.page import Card, render
from rlmono.observe.phases import read_timeline
from rlmono.observe.plots import draw_all, eval_names, series
from rlmono.observe.progress import duration, number
from rlmono.observe.timeline import draw_timeline

_ROWS_SHOWN = 3


class ReportError(ValueError):
    """A run folder that no report can be made of."""


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes `index.html` and PNGs to `out` (default `<run_dir>/report`); returns the path of the page.

    Reads metrics.jsonl, and config.json and samples/*.jsonl where there are any. Raises MetricsError or
    ReportError (both ValueError) for a folder without metrics or with a broken file.
    """
    run_dir = Path(run_dir)
    out = Path(out) if out else run_dir / "report"
    rows = read_metrics(run_dir)
    if not rows:
        raise ReportError(f"{run_dir}/metrics.jsonl is empty: the run stopped before its first rollout was over; see {run_dir}/logs")
    config = _config(run_dir / "config.json")
    pictures, missing = draw_all(rows)
    if timeline := read_timeline(run_dir):
        pictures.append(draw_timeline(timeline))
    page = render(
        title=run_dir.resolve().name, subtitle=_subtitle(rows, config), cards=cards(rows, config), pictures=pictures, missing=missing,
        samples=_samples(run_dir / "samples"), options=changed_options(config),
    )
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (out / f"{picture.name}.png").write_bytes(picture.png)
    index = out / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def cards(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Card]:
    """The numbers on top: rollouts, accuracy of each set before and after, reward, loss, time, tokens."""
    trained = {row["rollout_id"] for row in rows if any(name.startswith(("train/", "rollout/")) for name in row)}
    result = [Card("rollouts", f"{len(trained):,}")]
    for name in eval_names(rows):
        result += _first_last(f"accuracy, {name.removeprefix('eval/')}", rows, name)
    reward = _first_last("mean reward", rows, "rollout/raw_reward")
    result += reward or _first_last("loss", rows, "train/loss")
    result.append(Card("total time", duration(rows[-1]["time"] - rows[0]["time"] + _first_rollout_s(rows))))
    tokens = _tokens(rows, config)
    return result + ([Card("rollout tokens", f"{tokens:,.0f}")] if tokens else [])


def changed_options(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and source of the options whose value is not the schema's default."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(Config)}
    return [
        (name, _shown(entry["value"]), str(entry.get("source", "")))
        for name, entry in config.items()
        if name not in defaults or entry["value"] != defaults[name]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `report`: prints the path of the page."""
    parser = argparse.ArgumentParser(prog="rlmono report", description="Write one HTML page with plots about a run.")
    parser.add_argument("run", type=Path, help="folder of the run (--run-dir)")
    parser.add_argument("--out", type=Path, help="folder to write to; default: RUN/report")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run, arguments.out))
    except ValueError as error:
        print(f"rlmono report: {error}", file=sys.stderr)
        return 2
    return 0


def _default(field: dataclasses.Field[Any]) -> Any:
    """A schema default as JSON would give it back."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.loads(json.dumps(default))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _first_last(label: str, rows: Sequence[Mapping[str, Any]], name: str) -> list[Card]:
    values = series(rows, name)[1]
    if not values:
        return []
    return [Card(label, number(values[-1]), number(values[0]) if len(values) > 1 else "")]


def _first_rollout_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Lines are written when a rollout is over: the time of the first line's own work, which no difference of times holds."""
    return float(rows[0].get("perf/step_time") or rows[0].get("perf/eval_time") or 0.0)


def _tokens(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float:
    """Tokens of all rollouts; 0 where they are not known."""
    if "rollout_batch_size" not in config:
        return 0.0
    samples = config["rollout_batch_size"]["value"] * config["n_samples_per_prompt"]["value"]
    return samples * sum(series(rows, "rollout/response_len/mean")[1])


def _subtitle(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    first, last = (datetime.fromtimestamp(rows[i]["time"]).strftime("%Y-%m-%d %H:%M") for i in (0, -1))
    values = (config.get(name, {}).get("value") for name in ("loss_type", "advantage_estimator", "hf_checkpoint"))
    loss_type, estimator, model = values
    algorithm = "supervised fine-tuning" if loss_type == "sft" else estimator
    return " · ".join(str(part) for part in (algorithm, model, f"{first} to {last}") if part)


def _config(path: Path) -> dict[str, Any]:
    """`{name: {value, source}}` as the run resolved it; empty where there is none."""
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); restore it or move it away") from error
    return {name: entry for name, entry in config.items() if isinstance(entry, dict) and "value" in entry}


def _samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Heading -> rows: of each evaluation set the first and the last, and of the rollouts the last."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.jsonl"):
        if match := re.fullmatch(r"(rollout|eval_.+)_(\d+)", path.stem):
            found.setdefault(match[1], []).append((int(match[2]), path))
    result = {}
    for kind, files in sorted(found.items()):
        files.sort()
        for rollout_id, path in dict.fromkeys((files[0], files[-1]) if kind != "rollout" else (files[-1],)):
            what = f"Evaluation {kind.removeprefix('eval_')}, at rollout" if kind != "rollout" else "Training, rollout"
            result[f"{what} {rollout_id}"] = list(_read_samples(path))
    return {heading: rows for heading, rows in result.items() if rows}


def _read_samples(path: Path) -> Iterable[dict[str, Any]]:
    for line_number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:_ROWS_SHOWN], 1):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            raise ReportError(f"{path}:{line_number} is not JSON ({error}); remove that line") from error
        if row is not None:
            yield row


if __name__ == "__main__":
    sys.exit(main())
