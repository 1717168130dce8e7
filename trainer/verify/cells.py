"""What `verify` runs: the user's own configuration, cut to a few steps, once for each backend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tritune.trainer.config import BackendConfig, TrainConfig, VerifyConfig
from tritune.trainer.config.choices import Dtype
from tritune.trainer.config.overrides import override
from tritune.trainer.config.schema import names as names_of
from tritune.trainer.errors import InputError

# What a proof leaves out: it costs time, or it would write elsewhere, and no step depends on it.
LEFT_OUT = [
    "train.patience=null", "train.use_best=false", "train.log_every=1", "evaluation.base=false", "evaluation.splits=[]",
    "evaluation.samples=0", "evaluation.choices=[]", "evaluation.metric=loss", "evaluation.abstain=null", "export.enabled=false",
    "report.enabled=false", "tracking.wandb=false", "tracking.tensorboard=false", "checkpoint.asynchronous=false",
    "run.resume=never",
]  # fmt: skip
_OFFLOAD = {"fsdp": "true", "hsdp": "true", "zero1": "optimizer", "zero2": "optimizer", "zero3": "all"}


@dataclass(frozen=True)
class Cell:
    """One run: its name in tables, its overrides, how many processes, and where it writes."""

    name: str
    overrides: list[str]
    processes: int
    directory: Path


@dataclass(frozen=True)
class Subject:
    """The run that a proof is about: what its cells are made from.

    Attributes:
        overrides: what the user gave for it.
        processes: of a cell that names no other number.
    """

    verify: VerifyConfig
    backend: BackendConfig
    train: TrainConfig
    dtype: Dtype
    overrides: list[str]
    processes: int


def parse(entry: str, processes: int) -> tuple[str, bool, int]:
    """`fsdp+offload@4` -> ("fsdp", True, 4); without `@`, `processes`.

    Raises:
        InputError: there is no such backend, or it has nothing to offload.
    """
    match = re.fullmatch(r"(\w+)(\+offload)?(?:@(\d+))?", entry)
    names = [n for n in names_of()["backend"] if n != "auto"]
    if match is None or match[1] not in names or (match[2] and match[1] not in _OFFLOAD):
        rule = "a backend is written NAME, NAME+offload or NAME@PROCESSES"
        raise InputError(
            f"verify.backends: {entry}", rule, f"Names: {', '.join(names)}; all but single and ddp offload"
        )
    if match[1] == "single":
        return "single", False, 1
    return match[1], bool(match[2]), int(match[3] or processes)


def base_overrides(subject: Subject) -> list[str]:
    """The user's overrides without the backend's, and what every cell shares."""
    steps, backend = subject.verify.steps, subject.backend
    kept = [o for o in subject.overrides if not re.match(r"(backend|run|launch)(\.|=)", o)]
    kept += [f"backend.device={backend.device.value}", f"backend.timeout_seconds={backend.timeout_seconds}"]
    return [*kept, *LEFT_OUT, f"evaluation.every={steps}", *length(steps), "train.accumulation=null"]


def length(steps: int) -> list[str]:
    """The overrides that end a run after so many steps, whatever end the user's configuration has, or if it has none."""
    return [f"train.max_steps={steps}", "train.epochs=null"]


def backend_overrides(subject: Subject, entry: str, processes: int) -> tuple[list[str], int]:
    """The overrides that choose a backend, with the user's own settings of it where it is the configured one."""
    name, offload, count = parse(entry, processes)
    chosen = [f"backend={name}"]
    if name == subject.backend.name:
        chosen += [
            o
            for o in subject.overrides
            if o.startswith("backend.") and not (offload and o.startswith("backend.offload"))
        ]
    return chosen + ([f"backend.offload={_OFFLOAD[name]}"] if offload else []), count


def micro_batch_size(train: TrainConfig, counts: list[int]) -> int:
    """As configured, or fewer where that is more than the rows of a rank in one of the cells, on `counts` processes.

    The micro-batches must be the same in every cell: dropout inside a model is drawn for each, and bf16 rounds in each.
    """
    rows = -(-train.batch_size // max(counts))
    return min(train.micro_batch_size or rows, rows)


def reference_names(dtype: Dtype, orders: int) -> list[str]:
    """The runs on one process: in float32, and in bf16 that and as many random orders of micro-batches as are asked for."""
    if dtype is not Dtype.bfloat16:
        return ["single"]
    return ["single", *(f"single, order {k}" for k in range(1, orders + 1)), "single, float32"]


def parity_cells(subject: Subject, directory: Path) -> tuple[list[Cell], list[Cell]]:
    """References and candidates."""
    v, processes = subject.verify, subject.processes
    shared = base_overrides(subject)
    shared += [f"checkpoint.every={v.parameters_every}", f"checkpoint.keep_last={v.steps + 1}"]
    counts = [parse(entry, processes)[2] for entry in v.backends]
    shared += [f"train.micro_batch_size={micro_batch_size(subject.train, counts)}"]

    def cell(name: str, more: list[str], count: int) -> Cell:
        where = directory / re.sub(r"\W+", "-", name)
        return Cell(name, [*shared, *more, override("run.dir", str(where))], count, where)

    references = []
    for number, name in enumerate(reference_names(subject.dtype, v.orders)):
        more = ["backend=single"]
        if name == "single, float32":
            more.append("model.dtype=float32")
        elif number:
            more.append(f"verify.order={number}")
        references.append(cell(name, more, 1))
    return references, [cell(e, *backend_overrides(subject, e, processes)) for e in v.backends]


def resume_cells(subject: Subject, directory: Path) -> tuple[Cell, Cell, Cell, bool]:
    """The run that is never stopped, the one that is killed, and the one that goes on from it, in the same directory; and
    whether that has the same backend and processes."""
    v, processes = subject.verify, subject.processes
    own = subject.backend.name if subject.backend.name != "auto" else ("ddp" if processes > 1 else "single")
    mine, count = backend_overrides(subject, own, processes)
    theirs, then = (mine, count) if v.to_backend is None else backend_overrides(subject, v.to_backend, count)
    then = v.to_procs or then
    shared = base_overrides(subject)
    shared += [f"checkpoint.every={max(2 * kill_step(v) // 5, 1)}", f"checkpoint.keep_last={v.steps}"]
    shared += [f"train.micro_batch_size={micro_batch_size(subject.train, [count, then])}"]
    unbroken, killed = directory / "unbroken", directory / "killed"
    again = ["run.resume=require", override("run.dir", str(killed))]
    return (
        Cell("unbroken", [*shared, *mine, override("run.dir", str(unbroken))], count, unbroken),
        Cell("killed", [*shared, *mine, override("run.dir", str(killed))], count, killed),
        Cell("resumed", [*shared, *theirs, *again], then, killed),
        (theirs, then) == (mine, count),
    )


def kill_step(settings: VerifyConfig) -> int:
    """The step after which the run is killed."""
    return settings.kill_at or max(settings.steps // 2, 1)
