"""`launch=`: how many processes, what happens when they stop or hang, and what a Slurm job asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class LaunchConfig:
    """Processes on this machine, watched by the launcher."""

    num_procs: int | None = None  # processes on each machine; default: one per GPU, else one
    nodes: int = 1  # machines; more than one through launch=slurm, or your own torchrun
    max_restarts: int = 0  # restarts in a row after a crash without a new checkpoint in between
    backoff_seconds: float = 5.0  # before the first restart; doubled for each after it, up to ten minutes
    watchdog: bool = True  # several processes: end the run when one of them hangs
    hang_factor: float = 4.5  # a step may be silent for so many times the median of the last ones
    hang_seconds: float = 25.0  # at least so long a step may be silent: a hung run ends within five medians, or 30 s
    quiet_seconds: float = 1800.0  # what has no steps may be silent for so long: loading, evaluation, saving, export
    grace_seconds: float | None = None  # what the scheduler leaves between its request to stop and the kill, if known


@dataclass
class SlurmConfig(LaunchConfig):
    """One Slurm job; `sbatch`'s own words are in brackets."""

    max_restarts: int = 3  # times in a row that the job is requeued after a crash without a new checkpoint
    grace_seconds: float | None = 120.0  # the stop is asked for so long before the time limit, or one minute earlier
    job_name: str = "tritune"  # [--job-name]
    partition: str | None = None  # [--partition]; default: the cluster's
    account: str | None = None  # [--account]; default: yours
    qos: str | None = None  # [--qos]
    time: str | None = None  # [D-]HH:MM:SS, or minutes
    memory: str | None = None  # of each node, e.g. 200G [--mem]
    cpus_per_proc: int | None = None  # for each process; default: the cluster's
    gpus: bool = True  # one GPU for each process; false for a job on CPUs
    constraint: str | None = None  # features that a node must have [--constraint]
    reservation: str | None = None  # [--reservation]
    exclusive: bool = False  # no other job on the nodes [--exclusive]
    directives: list[str] = field(default_factory=list)  # further #SBATCH words, e.g. --mail-type=FAIL
    modules: list[str] = field(default_factory=list)  # module load ...
    venv: str | None = None  # a virtual environment; default: the one that submits
    container: str | None = None  # image for pyxis [--container-image]; Python is then the image's
    mounts: list[str] = field(default_factory=list)  # for the container, SOURCE:TARGET
    env: dict[str, str] = field(
        default_factory=dict
    )  # variables to set; secrets belong in the environment that submits
    seeds: list[int] = field(default_factory=list)  # an array of runs, one a seed, in run.dir/seed-<n>
    wait: bool = False  # stay until the job ends, and end with its status
    dry_run: bool = False  # print the script; submit nothing


SCHEMAS: dict[str, type] = {"local": LaunchConfig, "slurm": SlurmConfig}
_TIME = re.compile(r"\d+|(\d+-)?\d{1,2}(:\d{2}){0,2}|\d{1,2}:\d{2}(:\d{2})?")
_WORD = re.compile(r"[\w.,:@%+=/&|()*\[\]-]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def check_launch(c: LaunchConfig, rule: Callable[[bool, str, str], None]) -> None:
    """Call `rule(holds, key, text)` for each rule."""
    rule(c.num_procs is None or c.num_procs >= 1, "launch.num_procs", "it must be at least 1. Use 1 or more")
    rule(c.nodes >= 1, "launch.nodes", "it must be at least 1. Use 1 or more")
    rule(c.max_restarts >= 0, "launch.max_restarts", "it must be at least 0. Use 0 for none")
    rule(c.backoff_seconds >= 0, "launch.backoff_seconds", "it must be at least 0 seconds. Use e.g. 5")
    rule(
        c.hang_factor > 1,
        "launch.hang_factor",
        "it must be above 1: half of all steps take longer than the median. Use e.g. 5",
    )
    for key in ("hang_seconds", "quiet_seconds"):
        rule(
            getattr(c, key) > 0,
            f"launch.{key}",
            "it must be above 0 seconds: a rank needs some time between two signs. Use e.g. 30",
        )
    rule(
        c.grace_seconds is None or 1 <= c.grace_seconds < 1e7,
        "launch.grace_seconds",
        "it must be at least 1 second and below 10,000,000. Use e.g. 120",
    )
    if isinstance(c, SlurmConfig):
        _check_slurm(c, rule)


def _check_slurm(c: SlurmConfig, rule: Callable[[bool, str, str], None]) -> None:
    for key in ("job_name", "partition", "account", "qos", "memory", "constraint", "reservation"):
        value = getattr(c, key)
        rule(
            value is None or _WORD.fullmatch(value) is not None,
            f"launch.{key}",
            "it becomes a word of an #SBATCH line, where nothing is quoted or expanded. Use letters, digits and -_.,:@&|",
        )
    for word in c.directives:
        rule(
            re.fullmatch(r"--[a-z][\w-]*(=[^\s$`\"'\\]+)?", word) is not None,
            "launch.directives",
            f"{word!r} is no option of sbatch in one word. Write e.g. --mail-type=FAIL; variables are not expanded there",
        )
    rule(
        c.time is None or _TIME.fullmatch(c.time) is not None,
        "launch.time",
        "no time limit. Write minutes, HH:MM:SS or D-HH:MM:SS",
    )
    rule(
        c.cpus_per_proc is None or c.cpus_per_proc >= 1, "launch.cpus_per_proc", "it must be at least 1. Use 1 or more"
    )
    rule(len(set(c.seeds)) == len(c.seeds), "launch.seeds", "a seed is given twice, and would be one run twice")
    rule(
        all(_VARIABLE.fullmatch(name) for name in c.env),
        "launch.env",
        "a variable's name is letters, digits and _, and does not begin with a digit",
    )
    rule(
        not (c.container and c.venv),
        "launch.venv",
        "in a container Python is the image's. Give launch.container or launch.venv, not both",
    )
    rule(
        not c.mounts or bool(c.container), "launch.mounts", "there is no container to mount into. Give launch.container"
    )
