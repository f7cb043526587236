"""The small job of all fault tests, in any placement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from functions import HELD, HOLD
from processes import Run

FUNCTIONS = Path(__file__).with_name("functions.py")


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
