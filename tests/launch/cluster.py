"""A throw-away Slurm on this machine: munge, a controller and some nodes, without systemd, on the loopback alone.

Each node has a host name of its own (a UTS and a mount namespace, so root is needed) and every name is 127.0.0.1. Two partitions,
of which `urgent` preempts `main`. `tracking` decides who gets a signal: with `linuxproc` every process of a job, with `cgroup`
and `pgid` only what Slurm itself started, as in production.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from tritune.launch.slurm import ENDED

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
KILL_WAIT = 5  # seconds from TERM to KILL
SLURMD_TIMEOUT = 20  # seconds of silence after which a node is down


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [p for p in PROGRAMS if not shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    if absent:
        return f"no {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "virtual nodes with names of their own need root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this container may not make namespaces"
    return None


def cgroups() -> bool:
    """Whether Slurm 22.05 can track by cgroup here: version 1, with a freezer that can be written."""
    return os.access("/sys/fs/cgroup/freezer", os.W_OK) and not Path("/sys/fs/cgroup/cgroup.controllers").exists()


@lru_cache
def trouble(tracking: str) -> str | None:
    """Why a cluster with this tracking does not work here: two nodes are started, and a step on both. None: it works."""
    why = missing()
    if why is not None:
        return why
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with Cluster(folder, 2, tracking) as found:
            names = found.call("srun", "--nodes=2", "--ntasks-per-node=1", "hostname").split()
            return None if sorted(names) == ["n1", "n2"] else f"a step on two nodes said {names}"
    except (TimeoutError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"the virtual Slurm ({tracking}) does not work here: {str(error)[:300]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """Started by `with Cluster(folder, nodes, tracking) as c`; `c.env` makes the client tools find it."""

    def __init__(self, folder: Path, nodes: int = 2, tracking: str = "linuxproc") -> None:
        self.folder, self.nodes, self.tracking = folder, nodes, tracking
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] += ":/usr/sbin:/sbin"
        self._base = _free_ports(nodes + 1)

    def __enter__(self) -> Cluster:
        if len(str(self.folder)) > 80:
            raise ValueError(f"a Unix socket's path has at most 107 bytes: {self.folder}")
        for name in ("state", "log", "run", "dev"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        for path in self.folder.iterdir():
            path.chmod(0o755)
        self._configure()
        try:
            self._start(["munged", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/run/munge.sock",
                         f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log",
                         f"--seed-file={self.folder}/run/seed"], "munged")  # fmt: skip
            self._start(["slurmctld", "-c"], "slurmctld")
            for i in range(1, self.nodes + 1):
                self.start_node(f"n{i}")
            self._wait(self._all_idle, "the nodes to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.call("scancel", "--state=PENDING", check=False)
        self.call("scancel", "--state=RUNNING", check=False)
        deadline = time.monotonic() + 15
        while self.call("squeue", "-h", "-t", "R,CG", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.1)
        names = [f"slurmd.n{i}" for i in range(1, self.nodes + 1)] + ["slurmctld", "munged"]
        for name in names:
            self._stop(name)
        for step in self._steps():
            os.kill(step, signal.SIGKILL)
        if self.tracking == "cgroup":
            found = [p for p in Path("/sys/fs/cgroup").rglob("slurm_n[0-9]*") if p.is_dir()]
            for top in found:
                for path in sorted([*top.rglob("*/"), top], key=lambda p: -len(p.parts)):
                    if path.is_dir():
                        subprocess.run(["rmdir", str(path)], capture_output=True)

    def start_node(self, name: str) -> None:
        """Its own host name and its own /etc/hosts, in which every node is this machine."""
        script = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1"'
        self._start(["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", script, "_", name,
                     str(self.folder / "hosts")], f"slurmd.{name}")  # fmt: skip

    def kill_node(self, name: str) -> None:
        """As a machine that loses power: slurmd, the steps and all they started."""
        os.kill(self._pid(f"slurmd.{name}"), signal.SIGKILL)
        for step in self._steps():
            if _hostname(step) == name:
                for pid in _descendants(step):
                    os.kill(pid, signal.SIGKILL)
        (self.folder / "run" / f"slurmd.{name}.pid").unlink()

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job as Slurm shows them."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "--oneliner", number)))

    def wait_for_end(self, number: str, timeout: float = 240.0) -> dict[str, str]:
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} after {timeout} s: {job}")
            time.sleep(0.2)
        return job

    def _steps(self) -> list[int]:
        """Slurm's own processes on the nodes of this cluster, not of another beside it."""
        mine = str(self.folder / "slurm.conf").encode()
        found = []
        for pid in _processes("slurmstepd"):
            try:
                if mine in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
            except OSError:  # it has ended meanwhile
                continue
        return found

    def _configure(self) -> None:
        d, host = self.folder, socket.gethostname().partition(".")[0]
        (d / "munge.key").write_bytes(os.urandom(128))
        (d / "munge.key").chmod(0o400)
        nodes = [f"NodeName=n{i} NodeHostname=n{i} NodeAddr=127.0.0.1 Port={self._base + i} CPUs=4 RealMemory=4000 "
                 "Gres=gpu:2 State=UNKNOWN" for i in range(1, self.nodes + 1)]  # fmt: skip
        settings = {
            "ClusterName": "throwaway", "FirstJobId": self._base % 9000,  # a job's number decides its port
            "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": self._base,
            "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "CredType": "cred/munge",
            "AuthInfo": f"socket={d}/run/munge.sock,cred_expire=5",  # so long a requeued job waits; 120 s otherwise
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny", "StateSaveLocation": f"{d}/state",
            "SlurmdSpoolDir": f"{d}/run/spool.%n", "SlurmctldPidFile": f"{d}/run/slurmctld.pid",
            "SlurmdPidFile": f"{d}/run/slurmd.%n.pid", "SlurmctldLogFile": f"{d}/log/slurmctld.log",
            "SlurmdLogFile": f"{d}/log/slurmd.%n.log", "ProctrackType": f"proctrack/{self.tracking}",
            "TaskPlugin": "task/none", "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none", "MpiDefault": "none", "MailProg": "/bin/true",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill",
            "SlurmdParameters": "config_overrides", "GresTypes": "gpu", "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE", "SlurmctldParameters": "preempt_send_user_signal",
            "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0",
            "ReturnToService": 2, "SlurmctldTimeout": 10, "SlurmdTimeout": SLURMD_TIMEOUT, "InactiveLimit": 0,
            "MinJobAge": 600, "KillWait": KILL_WAIT, "JobRequeue": 1, "Waittime": 0, "PropagateResourceLimits": "NONE",
        }  # fmt: skip
        partitions = [
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=1 "
            "PreemptMode=REQUEUE GraceTime=30",
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF",
        ]
        lines = [f"{key}={value}" for key, value in settings.items()] + nodes + partitions
        (d / "slurm.conf").write_text("\n".join(lines) + "\n")
        for i in range(2):  # a GPU is whatever file its line names
            (d / "dev" / f"gpu{i}").touch()
        (d / "gres.conf").write_text("".join(f"Name=gpu File={d}/dev/gpu{i}\n" for i in range(2)))
        plugin = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n" if self.tracking == "cgroup" else ""
        (d / "cgroup.conf").write_text(f"{plugin}ConstrainCores=no\nConstrainRAMSpace=no\n")
        others = [line for line in Path("/etc/hosts").read_text().splitlines() if not re.search(r"\bn\d+\b", line)]
        names = [f"127.0.0.1 n{i}" for i in range(1, self.nodes + 1)]
        (d / "hosts").write_text("\n".join(others + names) + "\n")

    def _start(self, command: list[str], name: str) -> None:
        subprocess.run(command, env=self.env, check=True, capture_output=True, timeout=30)
        self._wait(lambda: self._pid(name), f"{name} to start, see {self.folder}/log")

    def _stop(self, name: str) -> None:
        pid = self._pid(name)
        if not pid:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5
            while _state(pid) not in (None, "Z") and time.monotonic() < deadline:
                os.kill(pid, number)
                time.sleep(0.1)

    def _pid(self, name: str) -> int:
        path = self.folder / "run" / f"{name}.pid"
        return int(path.read_text().strip() or 0) if path.is_file() else 0

    def _all_idle(self) -> bool:
        return (
            self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).count("n") == self.nodes
        )

    def _wait(self, what, doing: str) -> None:
        deadline = time.monotonic() + 30
        while not what():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited 30 s for {doing}")
            time.sleep(0.05)


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those the system gives away and above those of the jobs.

    Two workers of pytest, whose numbers follow one another, do not look at the same ones.
    """
    for i in range(150):
        base = 30000 + (os.getpid() + i) % 150 * 17
        probes = []
        try:
            for port in range(base, base + count):
                probes.append(socket.create_server(("127.0.0.1", port)))
            return base
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise RuntimeError("no free ports")


def _state(pid: int) -> str | None:
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(") ")[2][0] if stat.exists() else None


def _processes(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def _hostname(pid: int) -> str:
    return subprocess.run(
        ["nsenter", f"--uts=/proc/{pid}/ns/uts", "hostname"], capture_output=True, text=True
    ).stdout.strip()


def _descendants(pid: int) -> list[int]:
    """A process and all that it and they started, youngest first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += parents.get(found[-1], [])
    return found[::-1]
