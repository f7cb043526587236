"""From a command line to a running rank: `python -m rlmono train …`, started by torchrun or srun."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence, TextIO

from rlmono.config.option import ConfigError
from rlmono.config.schema import Config
from rlmono.config.validate import on_device
from rlmono.world.launch import Launch, RankMisplaced, WorldError, read_launch
from rlmono.world.roles import RankGrid

if TYPE_CHECKING:                       # torch must not be imported before LD_PRELOAD is set
    from torch.distributed import Store

log = logging.getLogger(__name__)
REFUSED = 2
"""Exit status of a run that was refused before anything was started."""
LET_SPEAK_S = 10.0
"""torchrun ends all ranks with the first that exits: those that have nothing to say wait so long for the one that has."""
_PR_SET_PDEATHSIG = 1


def train(argv: Sequence[str]) -> int:
    """The verb `train`. With --dry-run it needs no torchrun, and starts nothing."""
    from rlmono.config import show
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            from rlmono.config.docs import help_text
            print(help_text(*argv[i + 1:i + 2]))
            return 0
    launch: Optional[Launch] = None
    try:
        config = _resolve(argv)
        if config.dry_run:
            show.dry_run(config)
            return 0
        launch = read_launch(os.environ)
        grid = RankGrid.for_config(config, launch.nodes, launch.local_world_size)
        refuse_unsupported(config)
        device = find_device(config)
        config = on_device(config, device)
    except RankMisplaced as e:
        return _refuse(str(e), every_rank=True)
    except (ConfigError, WorldError) as e:
        return _refuse(str(e))
    if launch.agent:
        die_with_parent()
    if device == "cuda" and config.colocate and launch.rank in grid.devices:
        from rlmono.memory.saver import preload
        preload(dict(os.environ))
    return run_rank(config, launch, grid, device)


def ranks(argv: Sequence[str]) -> int:
    """The verb `ranks`: check the whole configuration, and print how many ranks a node starts; launch/run.sh asks."""
    try:
        config = _resolve(argv)
        if not config.dry_run:
            refuse_unsupported(config)
        nodes = int(os.environ.get("NNODES", "1"))
        devices = len(RankGrid.for_config(config, None, None).devices)
        grid = RankGrid.for_config(config, nodes, int(os.environ.get("NPROC_PER_NODE") or max(1, devices // nodes) + 1))
    except (ConfigError, WorldError) as e:
        return _refuse(str(e))
    print(grid.ranks_per_node)
    return 0


def _resolve(argv: Sequence[str]) -> Config:
    from rlmono.config.sources import resolve
    return resolve(list(argv), os.environ)


def refuse_unsupported(config: Config) -> None:
    """Raises ConfigError for what is understood but does not exist yet."""
    from rlmono.config.validate import unsupported
    coming = unsupported(config)
    if coming:
        raise ConfigError(coming)


def _refuse(text: str, every_rank: bool = False) -> int:
    """Every rank finds the same fault; rank 0 says it."""
    if every_rank or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"rlmono: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(LET_SPEAK_S)
    return REFUSED


def find_device(config: Config) -> str:
    """cuda or cpu, without importing torch: that must not happen before LD_PRELOAD is set."""
    if config.device != "auto":
        return config.device
    return "cuda" if os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0") else "cpu"


def die_with_parent() -> None:
    """The kernel ends this rank with the torchrun agent that started it, however that ends; else it would live on alone."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:          # it ended before we asked
        os._exit(1)


def run_rank(config: Config, launch: Launch, grid: RankGrid, device: str) -> int:
    """Meet the others, then be a device or a host until the run ends. Ends the process."""
    from torch.distributed import DistError

    from rlmono.loop.world import RunRefused, World
    from rlmono.observe.logs import rank_log
    is_controller = launch.rank == grid.hosts[0]
    try:
        attempt, attempt_store, run_dir, log_name = _meet(config, launch, is_controller)
    except RunDirInUse:
        return REFUSED                  # the controller has said so
    except (TimeoutError, DistError) as e:
        if launch.rank != 0:
            time.sleep(LET_SPEAK_S)     # if it is not there, each speaks
        print(f"rlmono: {e}", file=sys.stderr, flush=True)
        return REFUSED
    files = rank_log(run_dir, log_name, launch.rank)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    world = World(config, launch, grid, attempt, attempt_store, run_dir, files, device, dtype)
    status = 1
    try:
        log.info("attempt %s: rank %d is %s", attempt, launch.rank, grid.role_of(launch.rank))
        _run(world)
        status = 0
    except RunRefused:
        status = REFUSED                # the controller has said so
    except BaseException as e:
        _tell(files.err, launch.rank, e, files.path)
    finally:
        _leave(status)
    return status


def _meet(config: Config, launch: Launch, is_controller: bool) -> tuple[str, Store, Path, str]:
    """(name of the attempt, its store, run directory, name of its logs) from the store. Raises TimeoutError, DistError, RunDirInUse."""
    from rlmono.world.store import join_attempt, open_store, store_get
    store = open_store(launch, config.start_timeout_s)
    attempt, attempt_store = join_attempt(store, launch.rank, launch.world_size, config.start_timeout_s)
    if is_controller:
        try:
            run_dir = _claim(config)
        except RunDirInUse as e:
            print(f"rlmono: {e}", file=sys.stderr, flush=True)      # before the others know and end
            attempt_store.set("run_dir", f"refused\n{e}")
            raise
        attempt_store.set("run_dir", f"{_next_log_name(run_dir)}\n{run_dir}")
    log_name, answer = store_get(attempt_store, "run_dir", config.start_timeout_s, "the controller").split("\n", 1)
    if log_name == "refused":
        raise RunDirInUse(answer)
    return attempt, attempt_store, Path(answer), log_name


def _run(world: object) -> None:
    from rlmono.loop.world import World
    assert isinstance(world, World)
    if world.grid.is_host(world.rank):
        from rlmono.loop.host import run_host
        run_host(world)
    else:
        from rlmono.loop.device import run_device
        run_device(world)


def _tell(console: TextIO, rank: int, error: BaseException, log_path: Path) -> None:
    """One line on the console, the whole story in the rank's log."""
    traceback.print_exc()
    lines = str(error).splitlines()
    first = lines[0] if lines else ""
    print(f"rlmono: rank {rank} failed: {type(error).__name__}: {first}\n  the whole of it is in {log_path}", file=console, flush=True)


def _leave(status: int) -> None:
    """End the process without destructors: gloo, NCCL and SGLang's threads can hang in them for minutes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class RunDirInUse(Exception):
    """Another run is alive in this run directory, or it can't be made."""


def _claim(config: Config) -> Path:
    """Make the run directory, hold its lock for as long as this process lives, and write the resolved config there."""
    from rlmono.config.show import write_config
    from rlmono.world.locks import InUse, hold
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        hold(run_dir / ".lock")
        write_config(config, run_dir)
    except InUse:
        raise RunDirInUse(f"--run-dir {run_dir} is in use by a run that is alive; end it, or take another folder") from None
    except OSError as e:
        raise RunDirInUse(f"--run-dir {run_dir} can't be written: {e.strerror}") from None
    return run_dir


def _next_log_name(run_dir: Path) -> str:
    taken = [p.name for p in (run_dir / "logs").glob("attempt-*")]
    return f"attempt-{1 + max((int(n.removeprefix('attempt-')) for n in taken), default=0)}"
