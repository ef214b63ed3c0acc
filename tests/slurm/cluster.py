"""A real Slurm of two nodes on this machine, in a folder and on ports of its own.

Nothing of the machine's own Slurm, if it has one, is touched, and :meth:`Cluster.close` ends all of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
NODES = ("n1", "n2")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIGURATION = """\
ClusterName=two-nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
FirstJobId={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=6
InactiveLimit=0
KillWait=20
MinJobAge=300
ReturnToService=2
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


def _free_ports(number: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(number)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


class Cluster:
    """Two nodes, ``n1`` and ``n2``, of two cores and one GPU in name each, which share this machine.

    Args:
        folder: an empty one, which only root can write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Jobs are counted from it, too, since ranks meet at a port that follows from their job.
        controller, *nodes = _free_ports(1 + len(NODES))
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:1"
            for name, port in zip(NODES, nodes, strict=True)
        ]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(host=host, controller=controller, folder=folder, nodes="\n".join(lines))
        )
        # A GPU in name only: what the batch scripts ask for.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        names = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "seed-file=munge.seed")
        options = [f"--{name.replace('=', f'={self.folder}/')}" for name in (*names, "log-file=munge.log")]
        self._start("munged", "munged", "--foreground", "--force", *options)
        wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged listens", self.logs)
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.idle() == set(NODES), 60, "both nodes are idle", self.logs)

    def start_node(self, node: str) -> None:
        """Bring a node up."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """A node goes down without a word: its slurmd and all that runs on it are killed."""
        self._end(node, signal.SIGKILL)
        for process in processes_with(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder}/slurm.conf"):
            _kill(process, signal.SIGKILL)

    def _start(self, name: str, *command: str) -> None:
        output = (self.folder / f"{name}.out").open("ab")
        with output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def _end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def close(self) -> None:
        """End the daemons and whatever their jobs have left."""
        for name in list(self._daemons)[::-1]:
            self._end(name)
        for process in processes_with(f"SLURM_CONF={self.folder}/slurm.conf"):
            _kill(process, signal.SIGKILL)

    def call(self, *command: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str, cwd: Path, variables: Mapping[str, str] | None = None) -> Job:
        """``sbatch`` with these words, in the folder and with the variables."""
        done = subprocess.run(
            ["sbatch", "--parsable", *command],
            env={**self.environment, **(variables or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip())

    def idle(self) -> set[str]:
        """Nodes that take jobs."""
        return {name for name, state in self._states().items() if state == "IDLE"}

    def down(self) -> set[str]:
        """Nodes that Slurm has given up."""
        return {name for name, state in self._states().items() if "DOWN" in state}

    def _nodes(self) -> str:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "nodes"], env=self.environment, capture_output=True, text=True
        )
        return done.stdout

    def _states(self) -> dict[str, str]:
        lines = [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in self._nodes().splitlines()
        ]
        return {line["NodeName"]: line["State"] for line in lines if "State" in line}

    def logs(self) -> str:
        """What Slurm knows of its nodes, and the end of what each daemon has written."""
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        tails = [
            f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:])
            for path in paths
        ]
        return "\n\n".join([self._nodes(), *tails])


class Job:
    """A job of the cluster."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.number = number
        self._cluster = cluster

    def facts(self) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, ExitCode ..."""
        words = self._cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        """RUNNING, COMPLETED ..."""
        return self.facts()["JobState"]

    def signal_batch(self, name: str) -> None:
        """Send a signal to the batch script alone."""
        self._cluster.call("scancel", "--batch", f"--signal={name}", self.number)


def wait_until(holds: Callable[[], bool], seconds: float, what: str, logs: Callable[[], str]) -> None:
    """Wait until something holds, or fail with the logs."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{logs()}"
        time.sleep(0.1)


def processes_with(*variables: str) -> list[int]:
    """Processes whose environment has all of these ``NAME=value``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = set(entry.read_bytes().split(b"\0"))
        except OSError:  # it has ended
            continue
        if {variable.encode() for variable in variables} <= words:
            found.append(int(entry.parent.name))
    return found


def _kill(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
