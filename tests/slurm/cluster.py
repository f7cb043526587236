"""A Slurm of two nodes on this machine: its daemons and its commands."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class Slurm:
    """`folder` gets the configuration and the logs. `start` before the rest, `stop` at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises AssertionError with the daemons' logs when the nodes don't come up."""
        self._munge()
        cpus = os.cpu_count() or 1
        nodes = "\n".join(f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={17010 + i} CPUs={cpus} RealMemory=4000" for i in (1, 2))
        (self.folder / "slurm.conf").write_text(f"""ClusterName=rlmono
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17009
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=10
JobRequeue=1
MpiDefault=none
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
""")
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes", 60)

    def _munge(self) -> None:
        user = pwd.getpwnam("munge")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        home = self.folder / "munge"
        home.mkdir()
        for path in (key, home):
            os.chown(path, user.pw_uid, user.pw_gid)
        self._daemons.append(subprocess.Popen(
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={home}/pid",
             f"--log-file={home}/log", f"--seed-file={home}/seed"], user="munge", group="munge", extra_groups=[], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL))
        self.until((self.folder / "munge.socket").exists, "munge's socket", 20)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self._daemons)}.out", "wb") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=out, stderr=out, start_new_session=True))

    def stop(self) -> None:
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.environ, capture_output=True, timeout=30, check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, **more: str) -> str:
        """What a Slurm command prints. CalledProcessError when it fails."""
        return subprocess.run(command, env=self.environ | more, capture_output=True, text=True, timeout=60, check=True).stdout

    def state(self, job: str) -> str:
        text = self.run("scontrol", "show", "job", job)
        return text.partition("JobState=")[2].split()[0]

    def until(self, condition: Callable[[], object], what: str, timeout_s: float, text: Callable[[], str] = str) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}:\n{text() or self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in files)
