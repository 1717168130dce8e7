"""`tritune verify parity | resume`: proofs for the user's own configuration, by running it."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tritune.launch import processes
from tritune.launch.torchrun import gpus
from tritune.trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT, INPUT_ERRORS, InputError

if TYPE_CHECKING:
    from tritune.trainer.config import Config
    from tritune.trainer.verify.cells import Cell, Subject

PROOFS = ("parity", "resume")


class Found(NamedTuple):
    """What a proof came to: the certificate's own part, whose `holds` says whether it holds; and lines for whoever watches."""

    content: dict[str, Any]
    lines: list[str]


def verify(argv: list[str]) -> int:
    """Run a proof; return 0 where it holds, 1 where it does not, 2 for wrong input."""
    from tritune.trainer.config.compose import split_argv, to_dict
    from tritune.trainer.run.directory import run_path
    from tritune.trainer.shown import shown
    from tritune.trainer.verify.cells import Subject

    try:
        if not argv or argv[0] not in PROOFS:
            raise InputError(
                f"verify {' '.join(argv[:1])}".strip(), f"there is {', '.join(PROOFS)}", "Write one of them"
            )
        config_dir, overrides = split_argv(argv[1:])
        config = checked(overrides, config_dir)
        directory = run_path(config.run.dir, overrides)
        devices = gpus(config.backend.device.value)
        processes.preload(on_cpu=not devices)
        kind, proof = argv[0], _parity if argv[0] == "parity" else _resume
        shutil.rmtree(directory / kind, ignore_errors=True)  # an earlier proof's runs
        given = [] if config_dir is None else ["--config-dir", config_dir]
        count = config.launch.num_procs or devices or 2
        subject = Subject(config.verify, config.backend, config.train, config.model.dtype, overrides, count)
        found = proof(subject, given, directory / kind)
        if isinstance(found, int):
            return found
        from tritune.trainer.verify.certificate import write_certificate  # torch, which wrong input need not wait for

        path = directory / f"{kind}.json"
        write_certificate(path, kind, to_dict(config), overrides, found.content)
        print(*found.lines, sep="\n")
        print(f"{kind} {'holds' if found.content['holds'] else 'does not hold'}: {path}")
        return EXIT_DONE if found.content["holds"] else EXIT_FAILED
    except INPUT_ERRORS as error:
        print(f"tritune: {shown(str(error))}", file=sys.stderr)
        return EXIT_INPUT


def checked(overrides: list[str], config_dir: str | None) -> Config:
    """The user's configuration with the proof's end: its runs have `verify.steps` steps, and need no other.

    Raises:
        InputError, ConfigFaults: what is wrong.
    """
    from tritune.trainer.__main__ import checked_config
    from tritune.trainer.config.compose import compose_partly
    from tritune.trainer.verify.cells import length

    composed, _ = compose_partly(overrides, config_dir)
    end = [] if composed is None else length(max(composed.verify.steps, 1))  # a wrong one is said of verify.steps alone
    return checked_config([*overrides, *end], config_dir, None)


def _parity(subject: Subject, given: list[str], directory: Path) -> Found | int:
    """What was found, or the status of a reference that did not come to its end."""
    from tritune.trainer.verify.cells import parity_cells
    from tritune.trainer.verify.certificate import step_lines, summary_table, worst
    from tritune.trainer.verify.compare import compare_bfloat16, compare_float32, spread

    references, candidates = parity_cells(subject, directory)
    for reference in references:
        code, said = _run(reference, given)
        if code != EXIT_DONE:
            print(said, file=sys.stderr)
            return code
    bounds = None
    if len(references) > 1:
        bounds = spread(references[0].directory, [r.directory for r in references if ", order" in r.name])
    cells: dict[str, dict[str, Any]] = {}
    ran: list[Cell] = []
    for cell in candidates:
        code, said = _run(cell, given)
        cells[cell.name] = {"processes": cell.processes, "verdict": "" if code == EXIT_DONE else _why(code, said)}
        if code == EXIT_DONE:
            ran.append(cell)
    for cell in ran:
        if bounds is None:
            steps = compare_float32(cell.directory, references[0].directory)
        else:
            others = [references[0].directory, *(o.directory for o in ran if o is not cell)]
            steps = compare_bfloat16(cell.directory, others, bounds)
        bad = [s.step for s in steps if not s.holds]
        verdict = (
            "holds" if not bad else f"does not hold at step {bad[0]}" + (f" and {len(bad) - 1} more" if bad[1:] else "")
        )
        cells[cell.name] |= {"verdict": verdict, "worst": worst(steps), "steps": [s.to_json() for s in steps]}
        print(f"\n{cell.name} on {cell.processes} process(es): {verdict}", *step_lines(steps), sep="\n")
    holds = bool(ran) and all(c["verdict"] == "holds" or c["verdict"].startswith("refused") for c in cells.values())
    content = {"holds": holds, "criterion": _criterion(bounds), "reference": _rows(references[0]), "backends": cells}
    if bounds is not None:
        content["bounds"] = [{"loss": loss, "grad_norm": norm} for loss, norm in bounds]
        content["float32"] = _rows(references[-1])
    return Found(content, ["", _criterion(bounds), "", *summary_table(cells), ""])


def _resume(subject: Subject, given: list[str], directory: Path) -> Found | int:
    """What was found, or the status of a run that neither was killed nor came to its end."""
    from tritune.trainer.verify.cells import kill_step, resume_cells
    from tritune.trainer.verify.certificate import step_lines
    from tritune.trainer.verify.compare import bit_equal, compare_float32, parameter_difference, read_rows

    unbroken, killed, resumed, same = resume_cells(subject, directory)
    last = subject.verify.steps
    code, said = _run(unbroken, given)
    if code == EXIT_DONE:
        code, said = _run(killed, given, kill_at=kill_step(subject.verify))
    reached = read_rows(killed.directory)[-1]["step"] if code == EXIT_DONE else 0
    if code == EXIT_DONE and reached >= last:
        rule = "the run came to its end before it could be killed"
        raise InputError(f"verify.steps={last}", rule, "Give it more steps")
    if code == EXIT_DONE:
        code, said = _run(resumed, given)
    if code != EXIT_DONE:
        print(said, file=sys.stderr)
        return code
    steps = compare_float32(resumed.directory, unbroken.directory)
    ours, theirs = read_rows(resumed.directory), read_rows(unbroken.directory)
    found = {
        "same_backend_and_processes": same,
        "killed_after": reached,
        "losses_equal": [r["loss"] for r in ours] == [r["loss"] for r in theirs],
        "batches_equal": [r["batch"] for r in ours] == [r["batch"] for r in theirs],
        "rng_equal": [r["rng"] for r in ours] == [r["rng"] for r in theirs],
        "weights": parameter_difference(resumed.directory, unbroken.directory, last),
        "moments": parameter_difference(resumed.directory, unbroken.directory, last, "optim."),
        "bit_equal": bit_equal(resumed.directory, unbroken.directory, last),
    }
    exact = found["bit_equal"] and found["losses_equal"] and found["rng_equal"]
    holds = bool(found["batches_equal"] and (exact if same else all(s.holds for s in steps)))
    content = {"holds": holds, **found, "steps": [s.to_json() for s in steps]}
    return Found(content, [*step_lines(steps), *(f"{k.replace('_', ' '):28} {v}" for k, v in found.items()), ""])


def _run(cell: Cell, given: list[str], kill_at: int | None = None) -> tuple[int, str]:
    """Run a cell to its end, or kill all its ranks once `kill_at` is logged; return its exit status and what it said."""
    began = time.monotonic()
    job = processes.start([[*given, *cell.overrides]], cell.directory / "output", cell.processes)
    metrics = cell.directory / "metrics.jsonl"
    while job.alive():
        if kill_at is not None and metrics.is_file() and metrics.read_bytes().count(b"\n") >= kill_at:
            job.signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    codes = job.wait()
    print(f"verify    {cell.name} on {cell.processes} process(es): {time.monotonic() - began:.1f} s", flush=True)
    if any(code == -signal.SIGKILL for code in codes):
        return EXIT_DONE, ""
    return max(codes, key=abs), job.output()


def _why(code: int, said: str) -> str:
    faults = [line for line in said.splitlines() if line.startswith(("tritune:", "  - "))]
    text = (faults[-1] if faults else "see its output").removeprefix("tritune:").strip(" -")
    return f"{'refused' if code == EXIT_INPUT else 'failed'}: {text}"


def _criterion(bounds: Any) -> str:
    from tritune.trainer.verify.compare import GRAD_NORM, LOSS, PARAMETERS

    if bounds is None:
        return (
            f"Against one process, every step: loss within {LOSS:g} and gradient norm within {GRAD_NORM:g}, relative; "
            f"the same rows; at the end each parameter within {PARAMETERS:g}."
        )
    return (
        "Against one process and every other backend, every step: at most twice the 95th percentile of how far random orders "
        "of the same micro-batches move one process; for the gradient norm plus 2^-8 of it; the same rows."
    )


def _rows(cell: Cell) -> list[dict[str, Any]]:
    from tritune.trainer.verify.compare import read_rows

    return [{k: row[k] for k in ("step", "loss", "grad_norm", "batch")} for row in read_rows(cell.directory)]
