"""`tritune submit`: the configuration as one readable sbatch script, checked by everything that can, then submitted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
from tritune.launch.torchrun import gpus
from tritune.trainer.__main__ import checked_config
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.compose import load_config, split_argv, to_dict
from tritune.trainer.config.launch import SlurmConfig
from tritune.trainer.errors import EXIT_INPUT, EXIT_STOPPED, INPUT_ERRORS, InputError
from tritune.trainer.redact import redact, redact_tree
from tritune.trainer.run.directory import LOCK, replace_file, run_path
from tritune.trainer.run.files import row_of
from tritune.trainer.shown import shown

TEMPLATE = Path(__file__).with_name("slurm.sh.j2")
SCRIPT = "submit.sh"
POLL_SECONDS = 5.0
# Slurm shows a job's passing flags in place of its state (SIGNALING, COMPLETING, STAGE_OUT ...): only these words are an end.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
         "TIMEOUT"}  # fmt: skip
GUARD_SECONDS = 10  # so long before the grace is over the batch script requeues a job that is still saving


def submit(argv: list[str]) -> int:
    """Render, check and submit; return 0, the job's status with `launch.wait`, or 2 for what is wrong."""
    config_dir, overrides = split_argv(argv)
    try:
        config = load_config(overrides, config_dir)
        launch = config.launch
        if not isinstance(launch, SlurmConfig):
            raise InputError("launch=local", "there is no scheduler to submit to", "Give launch=slurm")
        processes = launch.num_procs or gpus(config.backend.device.value)
        if not processes:
            rule = "this machine has no GPU, which says nothing of the cluster's"
            raise InputError("launch.num_procs=null", rule, "Give the processes of a node, one a GPU")
        checked_config(overrides, config_dir, launch.nodes * processes)
        _require_model(config.model)
        run = run_path(config.run.dir, overrides).resolve()
        text = render(launch, config.backend.device.value, run, argv, processes)
        require_no_secrets(to_dict(config), argv)
        if launch.dry_run:
            print(text, end="")
            return 0
        _require_free(run)
        run.mkdir(parents=True, exist_ok=True)
        script = run / SCRIPT
        replace_file(script, text)
        _sbatch(["--test-only", str(script)])
        job = _sbatch(["--parsable", str(script)]).partition(";")[0]
    except INPUT_ERRORS as error:
        print(f"tritune: {shown(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    print(f"submitted job {job}: {launch.nodes} node(s) x {processes} process(es)\nscript    {script}\nrun       {run}")
    print(f"output    {run}/slurm-{job}{'_*' if launch.seeds else ''}.out", flush=True)
    if not launch.wait:
        return 0
    try:
        return _status_of(job)
    except KeyboardInterrupt:
        print(f"tritune: job {job} goes on, and is no longer waited for; scancel {job} ends it", file=sys.stderr)
        return EXIT_STOPPED


def render(launch: SlurmConfig, device: str, run: Path, argv: list[str], processes: int) -> str:
    """Return the batch script.

    Args:
        device: `backend.device`.
        run: absolute; of a seed's run it is the parent.
        argv: what the user gave; `run.dir` and, with `launch.seeds`, `seed` are the script's own.
        processes: on each node.

    Raises:
        InputError: something cannot stand in a script.
    """
    for name, path in (("run.dir", run), ("the working directory", Path.cwd())):
        if not re.fullmatch(r"[\w./@+=,:-]+", str(path)):
            rule = "it becomes part of an #SBATCH line, where nothing is quoted"
            raise InputError(f"{name}={str(path)!r}", rule, "Use letters, digits and -_.+=@,: in the path")
    own = ("run.dir=", "launch.wait=", "launch.dry_run=", *(["seed="] if launch.seeds else []))
    arguments = [word for word in argv if not word.startswith(own)]
    if not launch.num_procs:
        arguments.append(f"launch.num_procs={processes}")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True)  # fmt: skip
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.from_string(TEMPLATE.read_text()).render(
        directives=_directives(launch, device, run, processes),
        srun=_srun(launch, processes),
        setup=["set +u", f"module load {shlex.join(launch.modules)}", "set -u"] if launch.modules else [],
        env=launch.env,
        seeds=launch.seeds,
        run=run,
        python=shlex.quote(interpreter(launch)),
        arguments=arguments,
        max_restarts=launch.max_restarts,
        guard_seconds=max(round(launch.grace_seconds) - GUARD_SECONDS, 5) if launch.grace_seconds else 0,
    )


def require_no_secrets(tree: dict[str, Any], argv: list[str]) -> None:
    """Refuse what would write a secret into the script: all of launch.*, and each word that the user gave.

    A word is looked at as it was written, and its value as it was read: quoting changes the letters.

    Args:
        tree: the configuration as plain values.
    """
    for key in (*(f"launch.{name}" for name in tree["launch"]), *(word.partition("=")[0] for word in argv)):
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        # Beside its key, which may be a telling one.
        if value is not None and redact_tree({key: value}) != {key: value}:
            raise _secret(key)
    for word in argv:
        if redact(word) != word:
            raise _secret(redact(word.partition("=")[0]))


def _secret(key: str) -> InputError:
    rule = "it holds a secret, which would be written into the script"
    remedy = "Export it in your shell, since sbatch hands the environment on (HF_TOKEN, WANDB_API_KEY), and leave it out here"
    return InputError(key, rule, remedy)


def _directives(launch: SlurmConfig, device: str, run: Path, processes: int) -> list[str]:
    """sbatch's options, one word each: sbatch reads them before any shell does, so that nothing in them is expanded."""
    output = f"{run}/slurm-%A_%a.out" if launch.seeds else f"{run}/slurm-%j.out"
    words = resources(launch, device, processes)
    if launch.seeds:
        words.append(f"--array=0-{len(launch.seeds) - 1}")
    words += ["--requeue", "--open-mode=append", f"--output={output}", f"--chdir={Path.cwd()}"]
    if launch.grace_seconds:
        words.append(f"--signal=B:USR1@{round(launch.grace_seconds)}")  # to the batch shell, which asks the run to stop
    return words + launch.directives


def resources(launch: SlurmConfig, device: str, processes: int) -> list[str]:
    """What to ask for, in the words of sbatch and srun."""
    words = [f"--job-name={launch.job_name}", f"--nodes={launch.nodes}", "--ntasks-per-node=1"]
    if launch.gpus and device != "cpu":
        words.append(f"--gres=gpu:{processes}")
    if launch.cpus_per_proc:
        words.append(f"--cpus-per-task={launch.cpus_per_proc * processes}")
    for option, value in (("mem", launch.memory), ("time", launch.time), ("partition", launch.partition),
                          ("account", launch.account), ("qos", launch.qos), ("constraint", launch.constraint),
                          ("reservation", launch.reservation)):  # fmt: skip
        if value is not None:
            words.append(f"--{option}={value}")
    if launch.exclusive:
        words.append("--exclusive")
    return words


def _srun(launch: SlurmConfig, processes: int) -> list[str]:
    words = ["--kill-on-bad-exit=0", "--wait=120"]  # each machine's launcher ends by itself, once they agree how
    if launch.cpus_per_proc:
        words.append(f"--cpus-per-task={launch.cpus_per_proc * processes}")  # not handed down since Slurm 22.05
    return words + [shlex.quote(word) for word in container(launch)]


def container(launch: SlurmConfig) -> list[str]:
    """srun's words for pyxis."""
    words = [f"--container-image={launch.container}"] if launch.container else []
    return words + ([f"--container-mounts={','.join(launch.mounts)}"] if launch.mounts else [])


def interpreter(launch: SlurmConfig) -> str:
    """The Python that a job runs: the image's, a virtual environment's, or the one that submits."""
    if launch.container:
        return "python"
    return f"{launch.venv}/bin/python" if launch.venv else sys.executable


def _sbatch(arguments: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        rule = "sbatch is not found on this machine"
        raise InputError(
            "launch=slurm", rule, "Submit from a login node; launch.dry_run=true prints the script"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"sbatch ended with {done.returncode}"
        raise InputError("launch=slurm", said.removeprefix("sbatch: ").rstrip("."), "See `sinfo` for what there is")
    return done.stdout.strip()


def _require_model(model: ModelConfig) -> None:
    """A folder that is written as one must be there; a hub id is known to the hub alone."""
    for key, value in (("path", model.path), ("tokenizer", model.tokenizer)):
        if value is not None and value.startswith(("/", ".", "~")) and not Path(value).is_dir():
            raise InputError(f"model.{key}={value}", "there is no such folder on this machine", "Check the path")


def _require_free(run: Path) -> None:
    """Refuse a run directory whose job is still waiting or running."""
    owner = run / LOCK
    said = owner.read_text(errors="replace") if owner.is_file() else ""
    job = (row_of(f"{said}\n") or {}).get("job")
    if job is None:
        return
    found = subprocess.run(["squeue", "--noheader", f"--job={job}", "--format=%T"], capture_output=True, text=True)
    if found.returncode == 0 and found.stdout.strip():
        rule = f"job {job} has this directory, and is {found.stdout.split()[0].lower()}"
        raise InputError(f"run.dir={run}", rule, f"Wait for it, `scancel {job}`, or give another run.dir")


def _status_of(job: str) -> int:
    """Wait for a job and all its requeues; return its exit status."""
    while True:
        found = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True)
        states = re.findall(r"\bJobState=(\w+)", found.stdout)
        codes = [int(c) for c in re.findall(r"\bExitCode=(\d+):", found.stdout)]
        if "Invalid job id" in found.stderr:
            print(f"tritune: job {job}: Slurm no longer knows it", file=sys.stderr)
            return 1
        if states and set(states) <= ENDED:
            failed = any(s != "COMPLETED" for s in states)
            return max(codes, default=0) or int(failed)
        time.sleep(POLL_SECONDS)
