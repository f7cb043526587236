"""The small job of all fault tests, in any placement, and what is done to it in more than one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from disk import Disk
from functions import HELD, HOLD
from processes import Run

FUNCTIONS = Path(__file__).with_name("functions.py")
SAMPLES = 32
"""A rollout has 4 groups of 8; sample numbers count over the run."""


@dataclass
class Job:
    """A job that can be started again and again: its folders and flags."""

    folder: Path
    task: Path
    sockets: Path
    placement: tuple[object, ...]
    rollouts: int
    ranks: int
    save: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def flags(self) -> list[object]:
        """2 engines, or what the placement says; temperature 1, 8 samples a prompt, the tokens and bits of --deterministic."""
        return ["--hf-checkpoint", self.task / "model", "--prompt-data", self.task / "train.jsonl", "--input-key", "messages", "--label-key", "label",
                "--apply-chat-template", "--rollout-shuffle", "--custom-rm-path", f"{FUNCTIONS}:reward", "--reward-timeout-s", 1,
                "--custom-generate-function-path", f"{FUNCTIONS}:generate", "--rollout-batch-size", 4, "--n-samples-per-prompt", 8,
                "--rollout-max-response-len", 12, "--use-dynamic-batch-size", "--max-tokens-per-gpu", 1024, "--lr", 1e-3, "--deterministic",
                "--device", "cpu", "--num-rollout", self.rollouts, "--save-interval", 2, "--save", self.save, "--load", self.save,
                "--run-dir", self.run_dir, "--start-timeout-s", 300, "--phase-timeout-s", 300, *self.placement]

    def start(self, node: tuple[int, int] | None = None) -> Run:
        console = self.folder / f"console-{len(list(self.folder.glob('console-*')))}"
        return Run(self.flags(), self.ranks, console, self.sockets, node)

    def run_through(self, after: int | None = None) -> Job:
        """Start it and let it end; `after` is the checkpoint that it must go on from."""
        with self.start() as run:
            assert run.wait() == 0, run.text()
            assert after is None or self.resuming(after) in run.text()
            run.wait_until_gone()
        return self

    def resuming(self, rollout_id: int) -> str:
        """What a start says that goes on from the checkpoint of this rollout."""
        return f"resuming from {self.checkpoint(rollout_id)}: rollout {rollout_id + 1} of {self.rollouts}"

    def hold(self, sample: int) -> None:
        """The run will stop in the middle of generating: this sample waits, others go on."""
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / HELD).unlink(missing_ok=True)
        (self.run_dir / HOLD).write_text(str(sample))

    def held(self) -> bool:
        return (self.run_dir / HELD).exists()

    def let_go(self) -> None:
        (self.run_dir / HOLD).unlink()

    def checkpoint(self, rollout_id: int) -> Path:
        return self.save / f"rollout_{rollout_id:07d}"

    def left_sockets(self) -> list[Path]:
        return [p for p in self.sockets.iterdir() if "rlmono-" in p.name]


COLOCATED = ("--colocate", "--actor-num-gpus-per-node", 2)


@contextmanager
def killed_job(folder: Path, task: Path, sockets: Path, placement: tuple[object, ...], begin: Callable[[Job], None]) -> Iterator[Job]:
    """A job of six rollouts that `begin` kills in rollout 2; killed while it saves, then out of disk space, and at last run to its end."""
    (folder / "disk").mkdir()
    disk = Disk(folder / "disk")
    job = Job(folder, task, sockets, placement, rollouts=6, ranks=3, save=disk.folder / "save")
    try:
        begin(job)
        _kill_while_saving(job)
        _fill_disk_before_save(job, disk)
        yield job.run_through(after=3)
    finally:
        disk.close()


def _kill_while_saving(job: Job) -> None:
    """`kill -9` of a device rank as soon as the folder of checkpoint 3 has appeared."""
    with job.start() as run:
        run.until(lambda: "resuming from" in run.text(), "the run to resume")
        assert job.resuming(1) in run.text()
        pid = run.pid(rank=0)
        run.until(lambda: any(job.save.glob("partial-0000003-*")), "checkpoint 3 to be written")
        os.kill(pid, signal.SIGKILL)
        assert run.wait(120) == 128 + signal.SIGKILL, run.text()
        run.wait_until_gone()
    assert any(job.save.glob("partial-*")) and not job.checkpoint(3).exists()


def _fill_disk_before_save(job: Job, disk: Disk) -> None:
    """The torn checkpoint is not used; then the disk is full when checkpoint 5 is to be written: an error that names the folder."""
    job.hold(4 * SAMPLES + 13)
    with job.start() as run:
        run.until(job.held, "rollout 4 to be generated")
        assert job.resuming(1) in run.text()
        run.until(job.checkpoint(3).exists, "checkpoint 3 to be published")
        disk.fill(run)
        job.let_go()
        assert run.wait(120) == 1, run.text()
        run.wait_until_gone()
    (line, *_) = [x for x in run.text().splitlines() if "could not be written" in x]
    assert str(job.save / "partial-0000005-") in line and ("No space left" in line or "File too large" in line), run.text()
    assert job.checkpoint(3).exists() and not job.checkpoint(5).exists()
    disk.free()
