"""Who this process is: read once from what torchrun or srun exported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Mapping


class WorldError(ValueError):
    """The world of ranks is not what the configuration needs; the message says what to start instead."""


class RankMisplaced(WorldError):
    """A fault that only some ranks can see, so that each of them must say it."""


HOW_TO_START = "Start it with `launch/run.sh` (or `torchrun --nproc-per-node <devices + 1> -m rlmono train …`; under Slurm: slurm/train.sbatch)."


@dataclass(frozen=True)
class Launch:
    """One process's place. `node` counts nodes from 0; `local_rank` counts the ranks of a node from 0."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    agent_store: bool
    """True where torchrun's agent already serves the store at the master's port."""
    agent: bool = False
    """True where this process was started by torchrun's agent, on this node."""

    @property
    def node(self) -> int:
        return self.rank // self.local_world_size

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size


def read_launch(environ: Mapping[str, str]) -> Launch:
    """The launch from torchrun's variables, else from srun's.

    Raises WorldError when neither is there, or when nodes have unequal numbers of ranks.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "MASTER_PORT")
    else:
        raise WorldError(f"This process was started by neither torchrun nor srun (no RANK, no SLURM_PROCID in its environment). {HOW_TO_START}")
    missing = [n for n in (*names, "MASTER_ADDR") if n not in environ]
    if missing:
        raise WorldError(f"{', '.join(missing)} missing in the environment. {HOW_TO_START}")
    rank, world, local, local_world, port = (_integer(n, environ[n]) for n in names)
    if local_world < 1 or world % local_world:
        raise WorldError(f"{world} ranks don't divide into nodes of {local_world}: "
                         "every node needs the same number of device ranks and one host rank.")
    launch = Launch(rank, world, local, local_world, environ["MASTER_ADDR"], port, environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                    "TORCHELASTIC_RUN_ID" in environ)
    if launch.rank != launch.node * local_world + local:
        raise RankMisplaced(f"rank {rank} is not local rank {local} of node {launch.node}: "
                            "ranks must be dealt node by node (srun --distribution=block).")
    return launch


def _integer(name: str, text: str) -> int:
    """srun writes 9(x2) for two nodes of nine tasks, and 9,8 for unequal ones."""
    number = re.fullmatch(r"(\d+)(\(x\d+\))?", text)
    if number is None:
        raise WorldError(f"{name}={text!r}: every node needs the same number of ranks, as one whole number.")
    return int(number[1])
