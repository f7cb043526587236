"""Layouts and families on CPU: `python tests/bench/layouts.py [PART …] [--ranks N …] [--families NAME …]`. Writes docs/benchmarks/layouts.json and
docs/benchmarks.md.

`differences` compares every layout with one rank, in every way (10 minutes); `speed` trains a few steps on each against the clock
(5 minutes), and the machine should do nothing else; `loss` is the peak memory of the loss, by cpu.py. By default all three, all families, on 2 and
on 4 ranks; other figures are kept. The models are tiny: tokens a second say what a layout costs in calls and messages here, not what it does on GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASES = {"qwen3": "case_dense", "qwen3_tied": "case_dense_tied", "qwen3_five": "case_uneven_stages", "qwen3_moe": "case_experts",
         "glm4_moe": "case_shared_expert_and_sigmoid_router", "deepseek_v3": "case_latent_attention"}
"""Of worlds/layouts.py, by family."""
PARTS = {"differences": "all", "speed": "speed"}
"""And the argument of worlds/layouts.py."""
LOSS = "loss"
TARGETS = {"loss": "<= 1e-6", "log_probs": "<= 1e-5", "gradients": "<= 1e-5", "updates": "<= 1e-5"}
TITLES = {"loss": "Loss: relative difference", "log_probs": "Logprobs: largest difference", "gradients": "Gradients: ‖Δ‖ / ‖g‖ of the worst tensor",
          "updates": "An optimizer step: ‖Δ‖ / ‖step‖ of the worst tensor", "tokens_per_s": "Tokens a second and rank, trained"}
REFERENCE = "one rank, fp32; the worst of per sample and per token, with full recompute and without"


def main() -> int:
    """0 when every figure has met its target."""
    sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cpu")]
    import figures
    from torchrun import WORLDS, run_world
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[*PARTS, LOSS], help=f"{', '.join([*PARTS, LOSS])}; the others' figures are kept")
    parser.add_argument("--ranks", nargs="*", type=int, choices=(2, 4), default=(2, 4))
    parser.add_argument("--families", nargs="*", choices=CASES, default=CASES)
    given = parser.parse_args()
    if unknown := set(given.parts) - {*PARTS, LOSS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: {', '.join([*PARTS, LOSS])}")
    status = subprocess.call([sys.executable, str(ROOT / "tests" / "bench" / "cpu.py"), LOSS]) if LOSS in given.parts else 0
    parts, sizes = [p for p in given.parts if p != LOSS], [1, *given.ranks]
    if not parts:
        return status
    cases = [CASES[family] for family in given.families]
    os.environ["CASES"] = ",".join(cases)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(WORLDS / "make_families.py"), folder], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        for part, ranks in itertools.product(parts, sizes):
            results = run_world(WORLDS / "layouts.py", ranks, folder, PARTS[part], timeout_s=3600)
            for case in cases:
                results[case].check()
                found += figures_of(part, results[case].values, ranks, figures.this_machine())
    path = figures.FOLDER / "layouts.json"
    mine = {(f["command"], f["ranks"], f["column"]) for f in found}
    kept = [f for f in (json.loads(path.read_text()) if path.exists() else []) if (f["command"], f["ranks"], f["column"]) not in mine]
    figures.write("layouts", sorted(kept + found, key=lambda f: (list(TITLES.values()).index(f["table"]), f["ranks"])))
    for title in {f["table"] for f in found if f["target"]}:
        worst = max((f for f in found if f["table"] == title), key=lambda f: f["value"])
        print(f"{worst['name']}: {worst['value']:.1e}  {worst['target']}")
    return status or int(not all(map(figures.met, found)))


def figures_of(part: str, values: dict[str, dict[str, Any]], ranks: int, machine: str) -> list[dict[str, Any]]:
    """A figure for each layout, family and quantity of the part, from {"family layout …": {quantity: value}}; of several ways the worst."""
    ways: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, found in values.items():
        family, layout, *_ = label.split()
        ways.setdefault((family, layout), []).append(found)
    out = []
    for (family, layout), several in ways.items():
        for what, title in TITLES.items():
            if (what == "tokens_per_s") != (part == "speed"):
                continue
            numbers = [way[what] for way in several if way.get(what) is not None]
            if not numbers:
                continue
            speed = part == "speed"
            out.append({"name": f"{title}, {family}, {layout} on {ranks} ranks", "table": title, "row": f"{layout} ({ranks})", "column": family,
                        "value": max(numbers), "unit": "tokens/s" if speed else "", "target": TARGETS.get(what, ""),
                        "reference": "208 tokens a step, 4 layers of 64" if speed else REFERENCE, "ranks": ranks,
                        "command": f"python tests/bench/layouts.py {part}", "machine": machine})
    return out


if __name__ == "__main__":
    sys.exit(main())
