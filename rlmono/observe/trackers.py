"""TensorBoard and Weights & Biases, only where the user asked for them."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_REACH_TIMEOUT_S = 5.0
_FIRST_HOST = "api.wandb.ai"
"""The service's host before it moved (wandb 0.31); wandb still takes a key that was stored for it."""


class TrackerError(ValueError):
    """A tracker that was asked for and cannot start."""


class Tracker(Protocol):
    """What metrics are forwarded to. Methods may raise: `MetricsLog` then goes on without the tracker."""

    name: str

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Finite values of one rollout, which is the x axis."""

    def truncate_from(self, rollout_id: int) -> None:
        """What was logged from `rollout_id` on will be logged again."""

    def close(self) -> None:
        """Writes what is still held."""


class TensorBoard:
    """Events in `<run_dir>/tensorboard`."""

    name = "tensorboard"

    def __init__(self, run_dir: Path) -> None:
        _require("tensorboard", "--use-tensorboard")
        self.folder = str(Path(run_dir) / "tensorboard")
        self.writer = self._open()

    def _open(self, **arguments: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, **arguments)

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, rollout_id)
        self.writer.flush()

    def truncate_from(self, rollout_id: int) -> None:
        self.writer.close()
        self.writer = self._open(purge_step=rollout_id)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases under `<run_dir>/wandb`; a resumed rlmono run goes on in the same one.

    Offline (to be sent later with `wandb sync`) where WANDB_MODE says so, or by itself without an API key or
    a network. Raises TrackerError if wandb is missing or refuses to start.
    """

    name = "wandb"

    def __init__(self, args: Any, run_dir: Path, config: Mapping[str, Any]) -> None:
        _require("wandb", "--use-wandb")
        import wandb  # type: ignore[import-not-found,unused-ignore]

        mode = os.environ.get("WANDB_MODE") or _wandb_mode(wandb.setup().settings.base_url)
        try:
            self.run = wandb.init(
                project=args.wandb_project, group=args.wandb_group, name=args.wandb_name or Path(run_dir).name,
                id=_wandb_id(Path(run_dir)), resume="allow", dir=str(run_dir), config=dict(config), mode=mode,
                settings=wandb.Settings(console="off"),
            )
        except Exception as error:
            raise TrackerError(f"--use-wandb: wandb.init failed ({error}); set WANDB_MODE=offline, or leave --use-wandb out") from error
        # wandb drops what is logged at an earlier step than the last; an axis of ours lets a resumed run write its rollouts again.
        self.run.define_metric("*", step_metric="rollout_id")

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, "rollout_id": rollout_id})

    def truncate_from(self, rollout_id: int) -> None:
        """Nothing to do: a value logged again stands beside the old one, at the same rollout."""

    def close(self) -> None:
        self.run.finish()


def make_trackers(args: Any, run_dir: Path, config_dict: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that `--use-tensorboard` and `--use-wandb` ask for. Raises TrackerError where one cannot start."""
    trackers: list[Tracker] = []
    if args.use_tensorboard:
        trackers.append(TensorBoard(run_dir))
    if args.use_wandb:
        trackers.append(Wandb(args, run_dir, config_dict))
    return trackers


def _require(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TrackerError(f"{flag} needs the package {package}, which is not installed: pip install {package}")


def _wandb_mode(base_url: str) -> str:
    """online with an API key and a server that answers, else offline."""
    if not _has_api_key(base_url):
        reason = f"no API key for {base_url} in WANDB_API_KEY or .netrc (wandb login)"
    elif not _reachable(base_url):
        reason = f"{base_url} does not answer"
    else:
        return "online"
    logger.warning("wandb runs offline: %s. `wandb sync` sends the run later; WANDB_MODE=online insists", reason)
    return "offline"


def _has_api_key(base_url: str) -> bool:
    """Looks where wandb looks; wandb itself would ask on the terminal, from which a rank cannot read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
        return urlsplit(base_url).netloc in hosts or _FIRST_HOST in hosts
    except FileNotFoundError:
        return False
    except (OSError, netrc.NetrcParseError) as error:
        logger.warning("cannot read the .netrc file: %s", error)
        return False


def _reachable(url: str) -> bool:
    """Whether anything answers at the URL; urllib goes through the proxy where there is one."""
    try:
        urllib.request.urlopen(url, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _wandb_id(run_dir: Path) -> str:
    """The id in `<run_dir>/wandb.id`, made at the first start."""
    path = run_dir / "wandb.id"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
