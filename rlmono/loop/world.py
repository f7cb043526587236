"""What every rank knows after it has met the others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import msgspec
from torch.distributed import Store

from rlmono.config.schema import Config
from rlmono.observe.logs import RankLog
from rlmono.world.launch import Launch
from rlmono.world.roles import RankGrid
from rlmono.world.store import Deadline, store_get


class Source(msgspec.Struct, frozen=True):
    """Where weights come from: an HF folder, or a torch_dist checkpoint (with or without its optimizer and random states)."""

    folder: str
    kind: str
    with_optimizer: bool = False


class RunPlan(msgspec.Struct, frozen=True):
    """What the controller has found out before anything is built; device ranks wait for it."""

    start: int
    num_rollout: int
    total_steps: int
    actor: Source
    reference: Source
    refused: str = ""
    notes: tuple[str, ...] = ()
    critic: Optional[Source] = None
    teacher: Optional[Source] = None


class RunRefused(Exception):
    """The controller has refused the run, and said why on the console."""


@dataclass(frozen=True)
class World:
    """One rank's surroundings. `store` is this attempt's alone."""

    config: Config
    launch: Launch
    grid: RankGrid
    attempt: str
    store: Store
    run_dir: Path
    log: RankLog
    device: str
    dtype: str

    @property
    def rank(self) -> int:
        return self.launch.rank

    def publish_plan(self, plan: RunPlan) -> None:
        self.store.set("plan", msgspec.json.encode(plan).decode())

    def await_plan(self) -> RunPlan:
        """The controller's plan. Raises RunRefused, TimeoutError."""
        deadline = Deadline(self.config.start_timeout_s, f"rank {self.rank} waits for the controller to check the data and the checkpoint")
        while not self.store.check(["plan"]):
            deadline.left()
            time.sleep(0.02)
        plan = msgspec.json.decode(self.store.get("plan"), type=RunPlan)
        if plan.refused:
            raise RunRefused(plan.refused)
        return plan

    def host_address(self) -> str:
        """The unix socket of this node's host."""
        return store_get(self.store, f"node/{self.launch.node}/address", self.config.start_timeout_s, f"host rank {self.grid.host_of(self.rank)}")
