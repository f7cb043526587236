"""The numbers of a run on CPU: `python tests/bench/cpu.py`. Writes docs/benchmarks/cpu.json and docs/benchmarks.md.

Its parts, all by default: `numbers` runs the worlds of tests/cpu (trainer and engine against transformers, and against
each other); `quickstart` runs the quickstart and finds where the time of its rollouts goes; `loss` and `convert` measure peak
memory (memory.py); `save` how long a checkpoint stops the loop (saves.py). The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python tests/bench/cpu.py"


def main() -> int:
    """0 when every figure has met its target."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cpu")]
    import figures
    import memory
    import saves
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = {"numbers": numbers, "quickstart": quickstart, "loss": memory.loss_figures, "convert": memory.convert_figures,
             "save": saves.save_figures}
    parser.add_argument("parts", nargs="*", default=[*every], help=f"{', '.join(every)}; the others' figures are kept")
    parts = parser.parse_args().parts
    path = figures.FOLDER / "cpu.json"
    kept = [f for f in (json.loads(path.read_text()) if path.exists() else []) if f["command"] not in {f"{COMMAND} {p}" for p in parts}]
    machine, found = figures.this_machine(), []
    for part in parts:
        found += [figure | {"command": f"{COMMAND} {part}", "machine": machine} for figure in every[part]()]
    figures.write("cpu", sorted(kept + found, key=lambda f: f["command"]))
    for figure in found:
        print(f"{'      ' if figures.met(figure) else 'MISSED'} {figure['name']}: {figure['value']:.3g} {figure['unit']}  {figure['target']}")
    return 0 if all(map(figures.met, found)) else 1


def figure(name: str, value: float, unit: str, target: str, reference: str, note: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference} | ({"note": note} if note else {})


# ---------------------------------------------------------------- numbers

def numbers() -> list[dict[str, Any]]:
    """Every case of the worlds runs; those that say how near they came are figures."""
    from test_engine import SCRIPT, WORLD
    from test_trainer import ONE, TWO
    from torchrun import run_world
    with tempfile.TemporaryDirectory() as tmp:
        one = checked(run_world(ONE, 1, tmp, timeout_s=900))
        two = checked(run_world(TWO, 2, tmp, timeout_s=900))
        # The first case makes a model only where there is none: the same models for all.
        engines = {name: checked(run_world(SCRIPT, ranks, tmp, *map(str, rest), timeout_s=900)) for name, (ranks, *rest) in WORLD.items()}
    return [*logprob_figures(one, two, engines), *layout_figures(one, two), *reference_figures(one)]


def checked(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for result in results.values():
        result.check()
    return {name: result.values for name, result in results.items()}


def logprob_figures(one: dict[str, Any], two: dict[str, Any], engines: dict[str, Any]) -> list[dict[str, Any]]:
    hf, key = "transformers on the same weights, fp32", "max_abs_logprob_difference"

    def largest(values: dict[str, Any], *words: str) -> float:
        return float(max(v[key] for name, v in values.items() if key in v and all(w in name for w in words)))
    out = [figure(f"trainer, {layout}: max |Δlogprob|", value, "", "<= 1e-5", hf, "packed sequences of unequal length")
           for layout, value in (("1 rank", largest(one)), ("DP2", largest(two, "dp2")), ("TP2", largest(two, "logprobs_tp2")))]
    for name, values in engines.items():
        words = name.replace("_", " ")
        out.append(figure(f"engine, {words}: max |Δlogprob|, greedy", values["case_greedy_is_transformers_argmax"][key], "", "<= 1e-5", hf))
        out.append(figure(f"engine and trainer, {words}: max |Δlogprob| of sampled tokens after updates",
                          values["case_trainer_and_engine_agree_after_updates"][key], "", "<= 1e-5", "each other"))
    return out


def layout_figures(one: dict[str, Any], two: dict[str, Any]) -> list[dict[str, Any]]:
    alone, out = "1 rank, every sample in a pack of its own", []
    for name, values in (("ten packings, DP1", one["case_ten_packings"]), ("ten packings, DP2", two["case_ten_packings_dp2"]),
                         ("TP2", two["case_tp2"]), ("TP2 with sequence parallel", two["case_tp2_with_sequence_parallel"])):
        out += [figure(f"{name}: relative loss difference", values["loss"], "", "<= 1e-6", alone),
                figure(f"{name}: worst ‖Δgradient‖/‖gradient‖", values["gradient"], "", "<= 1e-5", alone, values["tensor"])]
    recompute = one["case_full_recompute"]
    out.append(figure("full recompute: worst ‖Δgradient‖/‖gradient‖", recompute["gradient"], "", "<= 1e-6", "no recompute"))
    steps = one["case_two_steps_of_a_rollout"]
    old = "the policy before the rollout's first step, from a pass of its own"
    return [*out, figure("two steps a rollout: ppo_kl at the first", abs(steps["ppo_kl_step1"]), "", "< 1e-8", old, "nothing has moved"),
            figure("two steps a rollout: ppo_kl at the second", steps["ppo_kl_step2"], "", "> 0", old, "the first step has moved it")]


def reference_figures(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The furthest of all objectives: losses, KL estimators, clips, entropy, masks."""
    naive = "a loss of few lines on transformers' model, fp32"
    objectives = {name.removeprefix("case_").replace("_", " "): values for name, values in one.items()
                  if {"loss", "gradient", "tensor"} <= values.keys() and name != "case_ten_packings"}
    loss, gradient = (max(objectives, key=lambda n: objectives[n][key]) for key in ("loss", "gradient"))
    adam = one["case_rollouts_like_torch_adamw"]
    return [figure(f"{len(objectives)} objectives, one step: loss difference of the furthest", objectives[loss]["loss"], "", "<= 1e-6", naive,
                   f"{loss}; relative to the loss, or to 0.1 where that is larger"),
            figure(f"{len(objectives)} objectives, one step: ‖Δgradient‖/‖gradient‖ of the furthest tensor", objectives[gradient]["gradient"], "",
                   "<= 1e-5", naive, f"{gradient}; {objectives[gradient]['tensor']}"),
            figure("two rollouts of two steps: ‖Δweight‖/‖weight‖ of the furthest tensor", adam["weights"], "", "<= 1e-6",
                   "torch.optim.AdamW and clip_grad_norm_ on that loss", adam["tensor"])]


# ---------------------------------------------------------------- the time of a rollout

def quickstart() -> list[dict[str, Any]]:
    """The quickstart's own recipes; GRPO with a generate function that notes when requests go and answers come."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "quickstart"
        environ = os.environ | {"QUICKSTART": str(folder), "PYTHONPATH": str(ROOT), "RLMONO_PROGRESS": "plain"}
        run([sys.executable, "-m", "rlmono.quickstart", "make", str(folder / "data")], environ)
        launch = [str(ROOT / "launch" / "run.sh"), "--env-file"]
        run([*launch, "configs/recipes/quickstart-sft.env"], environ)
        run([*launch, "configs/recipes/quickstart-grpo.env", "--skip-eval-before-train", "--eval-interval", "1000",
             "--custom-generate-function-path", f"{Path(__file__).resolve()}:timed_generate"], environ)
        return time_figures(folder / "grpo")


def run(command: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


async def timed_generate(args: Any, sample: Any, sampling: Any, state: Any) -> Any:
    """rlmono's generate, and a line with the weight version, when the request was made and when its answer was there."""
    from rlmono.rollout.generate import generate
    begun = time.perf_counter()
    sample = await generate(args, sample, sampling, state)
    with open(Path(args.run_dir) / "requests.jsonl", "a") as f:
        f.write(json.dumps([sample.weight_versions[0], begun, time.perf_counter()]) + "\n")
    return sample


def time_figures(run_dir: Path) -> list[dict[str, Any]]:
    rows = [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "perf/step_time" in row]
    requests = [json.loads(line) for line in (run_dir / "requests.jsonl").read_text().splitlines()]
    spent: dict[str, float] = dict.fromkeys(("generate", "train", "update", "save"), 0.0)
    for row in rows:
        own = [(begun, ended) for version, begun, ended in requests if version == row["rollout_id"]]
        spent["generate"] += max(e for _, e in own) - min(b for b, _ in own)
        spent["train"] += sum(row.get(f"perf/{k}", 0.0) for k in ("log_probs_time", "ref_log_probs_time", "train_time"))
        spent["update"] += sum(row.get(f"perf/{k}", 0.0) for k in ("wake_up_time", "update_weights_time", "sleep_time"))
        spent["save"] += row.get("perf/save_time", 0.0)
    total = sum(row["perf/step_time"] for row in rows)
    shares = {k: v / total * 100 for k, v in spent.items()} | {"rest": (total - sum(spent.values())) / total * 100}
    what = f"all {len(rows)} rollouts of {rows[0]['rollout/samples']:g} samples, 2 colocated device ranks"
    meaning = {"generate": "first request sent to last answer", "train": "logprobs and the step", "update": "weights into the engines",
               "save": "the checkpoint after the last rollout", "rest": "rewards, packing, messages, metrics"}
    median = statistics.median(row["perf/step_time"] for row in rows)
    return [figure("quickstart, a rollout", median, "s", "", what, "median"),
            *(figure(f"quickstart, share of {k}", v, "%", "<= 15" if k == "rest" else "", "time of the rollouts", meaning[k])
              for k, v in shares.items())]


if __name__ == "__main__":
    sys.exit(main())
