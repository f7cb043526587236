"""From a command line to a running rank: `python -m rlmono train …`, started by torchrun or srun."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Optional, Sequence, TextIO

from rlmono.config.option import ConfigError
from rlmono.config.schema import Config
from rlmono.world.launch import Launch, WorldError, read_launch
from rlmono.world.roles import RankGrid

log = logging.getLogger(__name__)
REFUSED = 2
"""Exit status of a run that was refused before anything was started."""


def train(argv: Sequence[str]) -> int:
    """The verb `train`. With --dry-run it needs no torchrun, and starts nothing."""
    from rlmono.config import show
    launch: Optional[Launch] = None
    try:
        config = _resolve(argv)
        if config.dry_run:
            show.dry_run(config)
            return 0
        launch = read_launch(os.environ)
        grid = RankGrid.for_config(config, launch.nodes, launch.local_world_size)
        refuse_unsupported(config)
    except (ConfigError, WorldError) as e:
        return _refuse(str(e))
    device = find_device(config)
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
        asked = os.environ.get("NPROC_PER_NODE")
        grid = RankGrid.for_config(config, nodes if asked else None, int(asked) if asked else None)
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


def _refuse(text: str) -> int:
    """Every rank finds the same fault; rank 0 says it."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"rlmono: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)                   # torchrun ends the others with the first that exits: let rank 0 speak
    return REFUSED


def find_device(config: Config) -> str:
    """cuda or cpu, without importing torch: that must not happen before LD_PRELOAD is set."""
    if config.device != "auto":
        return config.device
    return "cuda" if os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0") else "cpu"


def run_rank(config: Config, launch: Launch, grid: RankGrid, device: str) -> int:
    """Meet the others, then be a device or a host until the run ends. Ends the process."""
    from rlmono.loop.world import RunRefused, World
    from rlmono.observe.logs import rank_log
    from rlmono.world.store import join_attempt, open_store, store_get
    store = open_store(launch, config.start_timeout_s)
    attempt, attempt_store = join_attempt(store, launch.rank, launch.world_size, config.start_timeout_s)
    console = sys.stderr
    is_controller = launch.rank == grid.hosts[0]
    try:
        if is_controller:
            run_dir, _lock = _claim(config)
            attempt_store.set("run_dir", f"{run_dir}\n{_next_log_name(run_dir)}")
        answer = store_get(attempt_store, "run_dir", config.start_timeout_s, "the controller")
        if not answer:
            return REFUSED
    except RunDirInUse as e:
        attempt_store.set("run_dir", "")
        print(f"rlmono: {e}", file=console, flush=True)
        time.sleep(1)
        return REFUSED
    run_dir, log_name = Path(answer.split("\n")[0]), answer.split("\n")[1]
    files = rank_log(run_dir, log_name, launch.rank)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    world = World(config, launch, grid, attempt, attempt_store, run_dir, files, device, dtype)
    status = 1
    try:
        log.info("attempt %s: rank %d is %s", attempt, launch.rank, grid.role_of(launch.rank))
        _run(world)
        status = 0
    except RunRefused as e:
        status = REFUSED
        if is_controller:
            print(f"rlmono: {e}", file=files.err, flush=True)
    except BaseException as e:
        _tell(files.err, launch.rank, e, files.path)
    finally:
        _leave(status)
    return status


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
    """Another run is alive in this run directory."""


def _claim(config: Config) -> tuple[Path, int]:
    """Make the run directory, hold its lock for as long as this process lives, and write the resolved config there."""
    from rlmono.config.show import write_config
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunDirInUse(f"--run-dir {run_dir} can't be made: {e.strerror}") from None
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise RunDirInUse(f"--run-dir {run_dir} is in use by a run that is alive; end it, or take another folder") from None
    write_config(config, run_dir)
    return run_dir, lock


def _next_log_name(run_dir: Path) -> str:
    taken = [p.name for p in (run_dir / "logs").glob("attempt-*")]
    return f"attempt-{1 + max((int(n.removeprefix('attempt-')) for n in taken), default=0)}"
