"""Metrics, trackers, progress, logs, samples and the report."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.observe import plots, progress, report, trackers
from rlmono.observe.metrics import MetricsError, MetricsLog, read_metrics
from rlmono.observe.progress import Progress, duration, number
from rlmono.observe.samples import write_samples
from rlmono.observe.screen import spark


class Recorder:
    """A tracker that keeps what it gets, or fails from a rollout on."""

    def __init__(self, name: str, fails_from: float = math.inf) -> None:
        self.name, self.fails_from, self.calls = name, fails_from, []

    def log(self, rollout_id, metrics):
        if rollout_id >= self.fails_from:
            raise OSError("no space left on device")
        self.calls.append((rollout_id, metrics))

    def truncate_from(self, rollout_id):
        self.calls.append(("truncate", rollout_id))

    def close(self):
        self.calls.append("close")


# ---- metrics.jsonl


def test_metrics_are_one_json_object_a_line(tmp_path):
    recorder = Recorder("recorder")
    log = MetricsLog(tmp_path, [recorder])
    log.log(0, {"rollout/raw_reward": 0.25})
    log.log(1, {"train/loss": float("nan"), "train/kl_loss": math.inf, "train/lr": 1e-6}, step=7)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["rollout_id"] == 0 and first["step"] is None and first["rollout/raw_reward"] == 0.25
    assert abs(first["time"] - time.time()) < 60 and "nonfinite" not in first
    assert second["step"] == 7 and second["nonfinite"] == 2 and second["train/lr"] == 1e-6
    assert second["train/loss"] is None and second["train/kl_loss"] is None
    assert read_metrics(tmp_path) == [first, second]
    assert recorder.calls == [(0, {"rollout/raw_reward": 0.25}), (1, {"train/lr": 1e-6})]


def test_resume_writes_each_rollout_once_and_loses_nothing(tmp_path):
    log = MetricsLog(tmp_path)
    for rollout_id in range(5):
        log.log(rollout_id, {"rollout/raw_reward": rollout_id / 10})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "rollout_id": 5, "rollout/raw_')  # killed while it wrote

    assert [row["rollout_id"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    recorder = Recorder("recorder")
    log = MetricsLog(tmp_path, [recorder])
    log.truncate_from(3)
    log.log(3, {"rollout/raw_reward": 0.9})
    assert [(row["rollout_id"], row["rollout/raw_reward"]) for row in read_metrics(tmp_path)] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.9)]
    assert recorder.calls[0] == ("truncate", 3)
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert superseded == ['{"time": 1.0, "rollout_id": 5, "rollout/raw_', *before[3:]]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"rollout_id": 0, "train/loss": 2.0}')
    MetricsLog(tmp_path).log(1, {"train/loss": 1.0})
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [2.0, 1.0]


def test_a_failing_tracker_is_switched_off_with_one_warning(tmp_path, caplog):
    bad, good = Recorder("bad", fails_from=1), Recorder("good")
    log = MetricsLog(tmp_path, [bad, good])
    with caplog.at_level(logging.WARNING):
        for rollout_id in range(4):
            log.log(rollout_id, {"train/loss": 1.0})
        log.close()
    assert len(caplog.records) == 1 and "tracker bad failed and is off" in caplog.text and "no space left" in caplog.text
    assert [call[0] for call in bad.calls] == [0]
    assert [call[0] for call in good.calls[:-1]] == [0, 1, 2, 3] and good.calls[-1] == "close"
    assert len(read_metrics(tmp_path)) == 4


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(MetricsError, match="metrics.jsonl does not exist"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"rollout_id": 0}\noops\n{"rollout_id": 1}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2 .*oops"):
        read_metrics(tmp_path)


# ---- trackers


def arguments(**changes):
    return SimpleNamespace(**{"use_tensorboard": False, "use_wandb": False, "wandb_project": "rlmono", "wandb_group": None,
                              "wandb_name": None, **changes})


def test_no_tracker_unless_asked(tmp_path):
    assert trackers.make_trackers(arguments(), tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_after_a_resume_has_each_rollout_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, trackers.make_trackers(arguments(use_tensorboard=True), tmp_path, {}))
    for rollout_id in range(4):
        log.log(rollout_id, {"rollout/raw_reward": 0.5, "train/loss": math.nan})
    log.truncate_from(2)
    log.log(2, {"rollout/raw_reward": 0.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["rollout/raw_reward"]
    assert [(event.step, event.value) for event in events.Scalars("rollout/raw_reward")] == [(0, 0.5), (1, 0.5), (2, 0.75)]


@pytest.mark.parametrize(("flag", "package"), [("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, flag, package):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(trackers.TrackerError, match=f"--{flag.replace('_', '-')} .*pip install {package}"):
        trackers.make_trackers(arguments(**{flag: True}), tmp_path, {})


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for the package, which is not a dependency: it records what it is called with."""
    run = SimpleNamespace(rows=[], log=lambda row: run.rows.append(row), define_metric=lambda *a, **k: None, finish=lambda: None)
    module = SimpleNamespace(
        inits=[], run=run, base_url="http://127.0.0.1:9", Settings=dict,
        init=lambda **kw: (module.inits.append(kw), run)[1],
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(base_url=module.base_url)),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


def start_wandb(folder):
    return trackers.make_trackers(arguments(use_wandb=True, wandb_group="g"), folder, {"lr": 1.0})[0]


def test_wandb_is_offline_without_a_key_or_a_network(tmp_path, monkeypatch, wandb, caplog):
    start_wandb(tmp_path / "run")
    assert wandb.inits[0]["mode"] == "offline" and "no API key" in caplog.text
    monkeypatch.setenv("WANDB_API_KEY", "k")
    start_wandb(tmp_path / "run")
    assert wandb.inits[1]["mode"] == "offline" and "http://127.0.0.1:9 does not answer" in caplog.text
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"] and wandb.inits[1]["resume"] == "allow"


def test_wandb_is_online_with_a_key_and_a_server(tmp_path, monkeypatch, wandb):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers every request with an error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        wandb.base_url = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:{server.server_port} login user password {'k' * 40}\n")
        tracker = start_wandb(tmp_path / "run")
    finally:
        server.shutdown()
        server.server_close()
    assert wandb.inits[0]["mode"] == "online" and wandb.inits[0]["group"] == "g" and wandb.inits[0]["config"] == {"lr": 1.0}
    tracker.log(3, {"train/loss": 1.0})
    assert wandb.run.rows == [{"train/loss": 1.0, "rollout_id": 3}]


def test_wandb_mode_of_the_user_wins_and_a_failing_start_is_an_error(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_wandb(tmp_path / "run")
    assert wandb.inits[0]["mode"] == "disabled"

    def refuse(**kw):
        raise RuntimeError("permission denied")

    wandb.init = refuse
    with pytest.raises(trackers.TrackerError, match="permission denied.*WANDB_MODE=offline"):
        start_wandb(tmp_path / "run")


# ---- progress


def run_progress(mode: str, stream, title: str = "GRPO") -> None:
    shown = Progress(mode, 2, title, stream)
    shown.start()
    for rollout_id in range(2):
        shown.phase("generate", rollout_id, 4)
        shown.advance(3)
        shown.advance()
        shown.phase("train", rollout_id)
        shown.show(rollout_id, {"rollout/raw_reward": 0.5 + rollout_id / 4, "train/loss": 0.1, "perf/step_time": 1.0})
    shown.message("saved [0] to x")
    shown.phase("evaluate", 2, 1)
    shown.show(2, {"eval/arithmetic": 0.954, "eval/arithmetic/pass@4": 0.99})
    shown.stop()


def test_plain_progress_is_a_line_a_phase_and_a_rollout():
    stream = io.StringIO()
    run_progress("auto", stream)  # not a terminal
    lines = [re.sub(r"\S+ s$", "T", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "GRPO  started in T",
        "GRPO  rollout 1/2  generate  4/4 samples  T",
        "GRPO  rollout 1/2  reward 0.5",
        "GRPO  rollout 1/2  train  T",
        "GRPO  rollout 2/2  generate  4/4 samples  T",
        "GRPO  rollout 2/2  reward 0.75  ETA T",
        "saved [0] to x",
        "GRPO  rollout 2/2  train  T",
        "GRPO  after the last rollout  eval arithmetic 0.954",
        "GRPO  after the last rollout  evaluate  0/1 samples  T",
    ]


def test_no_progress_still_shows_messages():
    stream = io.StringIO()
    run_progress("none", stream)
    assert stream.getvalue() == "saved [0] to x\n"
    with pytest.raises(ValueError, match="'fancy'.*auto, rich, plain or none"):
        Progress("fancy", 1, "GRPO", stream)


def on_terminal(columns: int, lines: int, monkeypatch) -> str:
    """What live progress writes to a terminal of that size."""
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (lines, columns))
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(master, 65536):
                chunks.append(chunk)
        except OSError:  # the terminal's other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        run_progress("auto", stream)
    reader.join(timeout=10)
    os.close(master)
    assert not reader.is_alive()
    return b"".join(chunks).decode()


@pytest.mark.parametrize(("columns", "lines"), [(120, 40), (50, 24), (24, 12)])
def test_live_progress_fits_the_terminal(columns, lines, monkeypatch):
    output = on_terminal(columns, lines, monkeypatch)
    assert "\x1b[?25h" in output, "the cursor must not stay hidden"
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace("\r", "\n")
    assert max(len(line) for line in text.split("\n")) <= columns
    last_frame = text[text.rindex("ended"):]
    assert re.search(r"reward +0\.75", last_frame) and "0.954" in last_frame and "pass@4" not in last_frame
    assert "saved [0] to x" in text
    assert ("first" in last_frame) == (columns >= 50) and ("course" in last_frame) == (columns >= 76)


def test_time_left_is_told_from_the_last_rollouts(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress("none", 10, "GRPO", io.StringIO())
    shown.phase("generate", 4)  # a resumed run
    assert shown.status.eta_s() is None
    clock[0] += 30
    shown.phase("generate", 5)
    clock[0] += 10
    shown.phase("generate", 6)
    clock[0] += 5
    assert shown.status.eta_s() == pytest.approx(20 * 4 - 5)


def test_numbers_read_well():
    assert [duration(s) for s in (0.04, 0.84, 12.3, 59.9, 185, 3723)] == ["0.04 s", "0.84 s", "12 s", "60 s", "3:05", "1:02:03"]
    assert [number(v) for v in (0.0, 0.95432, 1.3e-6, 912.3, 65096.2, math.nan)] == ["0", "0.954", "1.3e-06", "912", "65,096", "nan"]
    assert spark((0.0, 1.0, math.nan, 0.5)) == "▁█▅" and spark((2.0, 2.0)) == "▁▁" and spark((math.nan,)) == ""
    assert len(spark(tuple(map(float, range(1000))), width=24)) == 24


# ---- logs


def test_all_output_of_a_rank_lands_in_its_log_and_the_console_stays_usable(tmp_path):
    program = """
import logging, os, subprocess, sys
from pathlib import Path
from rlmono.observe.logs import rank_log
log = rank_log(Path(sys.argv[1]), "attempt-0", 3)
print("printed")
os.write(2, b"from C++\\n")
subprocess.run(["echo", "from a child"], check=True)
logging.getLogger("rlmono.x").warning("logged")
print("to the user", file=log.out)
print("error to the user", file=log.err)
print(log.path.name, file=log.out)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "to the user\nrank-00003.log\n" and done.stderr == "error to the user\n"
    text = (tmp_path / "logs" / "attempt-0" / "rank-00003.log").read_text()
    assert text.startswith("printed\nfrom C++\nfrom a child\n")
    assert re.search(r"\d\d:\d\d:\d\d,\d+ rank 3 WARNING rlmono\.x: logged", text)


def test_the_room_does_not_import_torch():
    program = """
import pkgutil, importlib, sys, rlmono.observe
for module in pkgutil.iter_modules(rlmono.observe.__path__, "rlmono.observe."):
    importlib.import_module(module.name)
print(sorted({"torch", "sglang", "megatron", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# ---- samples and the report

ATTACK = "<script>alert('x')</script>"


def samples(reward, status="completed"):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": [{"type": "text", "text": "17 + 26"}]}]
    return [Sample(index=i, prompt=messages, tokens=[0] * 12, response=f"43 {ATTACK}", response_length=4, label="43", reward=reward,
                   status=status) for i in range(6)]


def make_run(folder: Path, rollouts: int = 6) -> Path:
    log = MetricsLog(folder)
    log.log(0, {"eval/arithmetic": 0.4, "perf/eval_time": 1.5})
    for i in range(rollouts):
        log.log(i, {
            "rollout/raw_reward": 0.5 + i / 20, "rollout/response_len/mean": 10.0 + i, "rollout/truncated_ratio": 0.01,
            "train/kl_loss": 1e-3 * i, "train/ppo_kl": 1e-10, "train/train_rollout_logprob_abs_diff": 0.0 if i == 0 else 1e-6,
            "train/grad_norm": 1.0, "train/lr": 1e-3, "perf/rollout_time": 3.0, "perf/train_time": 2.0, "perf/update_weights_time": 0.25,
            "perf/step_time": 5.5, "perf/tokens_per_gpu_per_sec": 900.0,
        })
    log.log(rollouts, {"eval/arithmetic": 0.92})
    write_samples(folder / "samples" / "eval_arithmetic_0.jsonl", samples(0.0, "truncated"), 4)
    write_samples(folder / "samples" / "eval_arithmetic_10.jsonl", samples(1.0), 4)
    write_samples(folder / "samples" / "rollout_5.jsonl", samples({"score": -1.0}), 4)
    config = {name: {"value": getattr(Config(), name), "source": "default"} for name in ("seed", "sglang", "rollout_stop", "clip_grad")}
    config |= {"lr": {"value": 1e-3, "source": "--lr"}, "weight_decay": {"value": 0.0, "source": "recipe.env:3"},
               "rollout_batch_size": {"value": 4, "source": "RLMONO_ROLLOUT_BATCH_SIZE"},
               "n_samples_per_prompt": {"value": 8, "source": "--n-samples-per-prompt"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_samples_are_readable_text(tmp_path):
    path = tmp_path / "samples" / "rollout_0.jsonl"
    write_samples(path, samples({"score": 1.0}), 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == {"index": 0, "group_index": 0, "prompt": "system: Add.\nuser: 17 + 26", "response": f"43 {ATTACK}", "label": "43",
                       "reward": {"score": 1.0}, "status": "completed", "prompt_length": 8, "response_length": 4}


def test_report_is_one_page_with_everything_in_it(tmp_path):
    run = make_run(tmp_path / "a<b>run")
    index = report.write_report(run)
    page = index.read_text()
    assert index == run / "report" / "index.html"
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert set(re.findall(r"src='([^,]*),", page)) == {"data:image/png;base64"}
    pictures = {path.stem for path in index.parent.glob("*.png")}
    assert pictures == {"reward", "accuracy", "length", "kl", "logprob_diff", "optimizer", "time", "throughput"}
    assert len(re.findall("<figure>", page)) == len(pictures)
    for path in index.parent.glob("*.png"):
        assert min(png_size(path)) > 400
    assert "Entropy (train/entropy_loss)" in page and "Training loss (train/loss)" in page, "what has no data is said"
    assert "a&lt;b&gt;run" in page and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert "0.4 → </span>0.92" in page and "0.5 → </span>0.75" in page
    assert f"<b>{4 * 8 * (10 + 11 + 12 + 13 + 14 + 15):,}</b>" in page
    for heading in ("Evaluation arithmetic, at rollout 0", "Evaluation arithmetic, at rollout 10", "Training, rollout 5"):
        assert heading in page
    assert "system: Add.\nuser: 17 + 26" in page and "{&quot;score&quot;: -1.0}" in page


def test_report_lists_options_off_their_default(tmp_path):
    config = json.loads((make_run(tmp_path) / "config.json").read_text())
    assert report.changed_options(config) == [
        ("lr", "0.001", "--lr"), ("weight_decay", "0.0", "recipe.env:3"), ("rollout_batch_size", "4", "RLMONO_ROLLOUT_BATCH_SIZE"),
        ("n_samples_per_prompt", "8", "--n-samples-per-prompt"),
    ]


def test_report_of_supervised_training_elsewhere(tmp_path, capsys):
    log = MetricsLog(tmp_path / "sft")
    for i in range(100):
        log.log(i, {"train/loss": 3.0 / (i + 1)})
    assert report.main([str(tmp_path / "sft"), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'index.html'}\n"
    assert [path.stem for path in (tmp_path / "page").glob("*.png")] == ["loss"]
    page = (tmp_path / "page" / "index.html").read_text()
    assert "3 → </span>0.03" in page and "wrote no samples" in page


def test_report_needs_metrics(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path}/metrics.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 2
    assert "is empty" in capsys.readouterr().err and not (tmp_path / "report").exists()
    MetricsLog(tmp_path).log(0, {"train/loss": 1.0})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(report.ReportError, match="config.json is not JSON"):
        report.write_report(tmp_path)


def test_series_spreads_the_steps_of_a_rollout():
    rows = [{"rollout_id": 0, "x": 1.0}, {"rollout_id": 0, "x": 2.0}, {"rollout_id": 1, "x": None}, {"rollout_id": 2, "x": 3.0}]
    assert plots.series(rows, "x") == ([0.0, 0.5, 2.0], [1.0, 2.0, 3.0])


def test_what_no_phase_accounts_for_is_the_rest():
    rows = [{"rollout_id": 0, "perf/eval_time": 1.0}, {"rollout_id": 0, "perf/rollout_time": 3.0, "perf/step_time": 5.0},
            {"rollout_id": 1, "perf/rollout_time": 4.0, "perf/step_time": 4.5}]
    rollouts, seconds = plots.phase_seconds(rows)
    assert rollouts == [0, 1] and seconds == {"generate": [3.0, 4.0], "evaluate": [1.0, 0.0], "rest": [1.0, 0.5]}


def test_smoothing_leaves_a_slope_where_it_is():
    slope = [float(i) for i in range(50)]
    assert plots._moving_average(slope, 5) == slope
    assert plots._moving_average([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]


def test_a_trace_names_the_phases_and_holds_the_beginning_of_generate(tmp_path):
    """Operators of `--profile-phase-s` seconds of it, the phase whole; and every operator of what comes after."""
    import torch

    from rlmono.loop.profiling import RankPhases
    config = SimpleNamespace(profile=True, profile_rollouts=(0,), profile_phase_s=0.05)
    phases, x = RankPhases(SimpleNamespace(config=config, device="cpu", run_dir=tmp_path, rank=0)), torch.randn(8, 8)
    with phases.rollout(0, SimpleNamespace(report=lambda *a, **k: None)):
        with phases("generate"):
            for _ in range(40):
                torch.mm(x, x)
                phases.tick()
                time.sleep(0.005)
        with phases("train"):
            for _ in range(3):
                torch.add(x, x)
    with gzip.open(tmp_path / "profile" / "rollout-0-rank-0.json.gz") as f:
        events = [e for e in json.load(f)["traceEvents"] if e.get("ph") == "X"]
    names = Counter(e["name"] for e in events)
    assert 1 <= names["aten::mm"] < 30 and names["aten::add"] == 3, names
    assert next(e["dur"] for e in events if e["name"] == "phase: generate") > 190_000 and names["phase: train"] == 1
