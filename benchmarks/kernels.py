"""Our kernels beside eager PyTorch, torch.compile, Liger, Unsloth, CCE, PEFT and bitsandbytes, on one GPU.

    python benchmarks/kernels.py [--only NAME ...] [--providers NAME ...] [--minutes 8] [--out DIR]
    python benchmarks/kernels.py --render [--out DIR]       tables and plots anew from the record; needs no GPU
    python benchmarks/kernels.py --smoke [--out DIR]        on CPU: tiny shapes, float32, Triton's interpreter, one repetition

Each provider runs in a process of its own, one after the other, so that none sees another's memory, patches or crash; a
process that dies loses the case it was in, and the next one goes on behind it. cuBLAS of the same products and a
large copy, of which the floors are made, run first and last; where they differ the GPU's clocks moved. Peers that are not
installed, or refuse a case, stand in the record with the reason. `kernel_cases.py` has the cases, `kernel_timing.py`
what is measured and how, `kernel_providers.py` who computes them; the record is `results/kernels.json`.

Nothing here downloads anything. The time is shared out over providers and cases; what it cuts is said, and is in the record.
A smoke run measures nothing, and writes only into a `--out` that it is given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case, all_cases, products, traffic
from kernel_providers import PROVIDERS, Skip, one_line
from kernel_timing import CYCLES, Timer, clocks, copy_bandwidth, floor, measure
from record import RESULTS, write_record

PEERS = ("triton", "transformers", "liger-kernel", "cut-cross-entropy", "unsloth", "peft", "bitsandbytes")
ABSENT = "not installed"
FLOORS = ("floor-first", "floor-last")
POISONED = 3  # exit code of a child whose CUDA context an error has ended
GRACE = 20.0  # seconds that a process may take over its share, to import and to compile


def child(path: Path) -> int:
    """Run one provider on some cases; each answer is a line of a file, so that a crash leaves those before it."""
    plan = json.loads(path.read_text())
    smoke, name, wanted = plan["smoke"], plan["provider"], plan["cases"]
    device, dtype = (torch.device("cpu"), torch.float32) if smoke else (torch.device("cuda"), torch.bfloat16)
    cases = {case.name: case for case in chosen(smoke)}
    answers, timer, code = path.with_suffix(".jsonl"), Timer(device), 0
    bandwidth = copy_bandwidth(timer) if name in FLOORS else 0.0

    def answer(**fields: Any) -> None:
        with answers.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    answer(clocks=clocks())
    for i, key in enumerate(wanted):
        left = plan["until"] - time.time()
        if left <= 0:
            for cut in wanted[i:]:
                answer(
                    case=cut, cell={"skipped": f"its share of the time, {plan['seconds']:.0f} s, was spent before it"}
                )
            print(f"{name}: time is up, {len(wanted) - i} case(s) cut: {', '.join(wanted[i:])}", flush=True)
            break
        answer(begun=key)
        case, seconds = cases[key], min(1.0, left / (len(wanted) - i) / 4)
        try:
            if name in FLOORS:
                cell = floor(case, timer, dtype, seconds, bandwidth)
            else:
                provider = PROVIDERS[name]
                cell = measure(case, provider.builders[case.kernel], timer, dtype, seconds, provider.masks_known)
        except Skip as reason:
            cell = {"skipped": str(reason)}
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its answer to this case
            cell = {"skipped": f"raised {one_line(error)}", "raised": True}
            code = POISONED if "CUDA error" in str(error) else 0
        answer(case=key, cell=cell)
        print(f"{name:14} {key:75} {shown(cell)}", flush=True)
        if code:
            return code
        if not smoke:
            torch.cuda.empty_cache()
    answer(clocks=clocks())
    return 0


def shown(cell: dict[str, Any]) -> str:
    if "skipped" in cell:
        return f"skipped: {cell['skipped']}"
    forward, both = (cell[k] if isinstance(cell[k], float) else cell[k]["p50"] for k in ("forward_ms", "both_ms"))
    return f"forward {forward:9.3f} ms, with backward {both:9.3f} ms"


def chosen(smoke: bool, only: Sequence[str] = ()) -> list[Case]:
    """Cases whose name has one of the words in it; of smoke's, one of each kind."""
    cases = {case.name: case for case in ((c.small() if smoke else c) for c in all_cases())}
    return [case for case in cases.values() if not only or any(word in case.name for word in only)]


def run(name: str, cases: list[str], seconds: float, smoke: bool, folder: Path) -> dict[str, Any]:
    """One provider's cells by case, and what the clocks were, over as many processes as it takes."""
    package = None if name in FLOORS else PROVIDERS[name].package
    if package is not None and versions()[package] == ABSENT:
        print(f"{name}: {package} is not installed", flush=True)
        return {"cells": {key: {"skipped": f"{package} is not installed"} for key in cases}, "clocks": []}
    cells: dict[str, Any] = {}
    seen: list[dict[str, str]] = []
    deadline, tries = time.monotonic() + seconds, 0
    while missing := [case for case in cases if case not in cells]:
        left, tries = deadline - time.monotonic(), tries + 1
        if left <= 0 or tries > 5:
            why = f"its share of the time, {seconds:.0f} s, was spent before it" if left <= 0 else "five processes died"
            print(f"{name}: {why}; cut: {', '.join(missing)}", flush=True)
            cells |= {key: {"skipped": why} for key in missing}
            break
        path = folder / f"{name}-{tries}.json"
        path.write_text(json.dumps({"provider": name, "cases": missing, "until": time.time() + left, "smoke": smoke}))
        ended = _process(path, left + GRACE, smoke)
        begun = None
        log = path.with_suffix(".jsonl")
        for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
            begun = line.get("begun", begun)
            if "case" in line:
                cells[line["case"]] = line["cell"]
            elif "clocks" in line:
                seen.append(line["clocks"])
        if ended is not None:
            at = missing[0] if begun is None else begun
            cells.setdefault(at, {"skipped": ended, "raised": True})
            print(f"{name}: {ended} in {at}", flush=True)
    return {"cells": cells, "clocks": seen}


def _process(path: Path, seconds: float, smoke: bool) -> str | None:
    """Run a child; return how it died, or None where it did not."""
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if smoke:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = path.with_suffix(".err")
    with log.open("w") as errors:
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(path)]
        process = subprocess.Popen(command, env=os.environ | variables, stderr=errors, start_new_session=True)
        try:
            code = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"killed {seconds:.0f} s after its start"
    if code in (0, POISONED):
        return None
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return f"its process died (exit {code})" + (f": {last[0][:200]}" if last else "")


def everything(cases: list[Case], providers: Sequence[str], minutes: float, smoke: bool) -> dict[str, Any]:
    """The providers on all cases that they have a kernel for; the fields of the record."""
    began, total = time.monotonic(), 60 * minutes
    order = [FLOORS[0], *(n for n in PROVIDERS if n in providers), FLOORS[1]]
    having = {n: [c.name for c in cases if n in FLOORS or c.kernel in PROVIDERS[n].builders] for n in order}
    order = [n for n in order if having[n]]
    weights = {n: len(having[n]) * (0.5 if n in FLOORS else PROVIDERS[n].weight) + 2 for n in order}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as where:
        if smoke:
            with ThreadPoolExecutor(2) as pool:  # nothing is measured: two at a time
                each = pool.map(lambda n: run(n, having[n], total, smoke, Path(where)), order)
                found = dict(zip(order, each, strict=True))
        else:
            for i, name in enumerate(order):
                left = total - (time.monotonic() - began) - GRACE
                share = max(left, 0.0) * weights[name] / sum(weights[n] for n in order[i:])
                found[name] = run(name, having[name], share, smoke, Path(where))
    rows = []
    for case in cases:
        cells = {n: found[n]["cells"][case.name] for n in order if n not in FLOORS and case.name in found[n]["cells"]}
        for name, provider in PROVIDERS.items():
            if case.kernel in provider.builders:
                cells.setdefault(name, {"skipped": "left out by --providers"})
            reason = provider.lacks.get(case.kernel, "no kernel for this")
            cells.setdefault(name, {"skipped": reason, "absent": case.kernel not in provider.lacks})
        floors = {n: found[n]["cells"][case.name] for n in FLOORS}
        flops = [sum(p.flops for p in side) for side in products(case)]
        rows.append({"name": case.name, **asdict(case), "flops": flops, "bytes": traffic(case, 4 if smoke else 2),
                     "floors": floors, "providers": cells})  # fmt: skip
    return {
        "smoke": smoke, "dtype": "float32" if smoke else "bfloat16", "minutes": minutes,
        "seconds": round(time.monotonic() - began), "sleep_cycles_per_second": CYCLES,
        "titles": {n: p.title for n, p in PROVIDERS.items()}, "clocks": {n: found[n]["clocks"] for n in order},
        "cases": rows,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What each provider's package is here."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ABSENT
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases with one of these in their name")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--out", type=Path, help="folder of the record, tables and plots, instead of results/")
    parser.add_argument("--smoke", action="store_true", help="exercise everything on CPU; measures nothing")
    parser.add_argument("--render", action="store_true", help="only make tables and plots from the record")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.smoke else str(os.cpu_count()))
    if args.child:
        return child(args.child)
    from kernel_tables import render  # Matplotlib: nothing for the children

    out = (args.out or RESULTS).resolve()
    if args.render:
        record = out / "kernels.json"
        if not record.is_file():
            return refuse(f"--render: there is no {record}")
        print(*render(json.loads(record.read_text()), out), sep="\n")
        return 0
    if not args.smoke and not torch.cuda.is_available():
        return refuse(
            "no CUDA GPU is here to measure on. Run it on one; `--smoke` exercises it on CPU, `--render` draws"
        )
    cases = chosen(args.smoke, args.only)
    if not cases:
        return refuse(f"--only {' '.join(args.only)}: no case has that in its name. There are: "
                      + ", ".join(c.name for c in chosen(args.smoke)))  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as where:  # what the record needs is missed now, not after the measurements
            write_record(str(Path(where) / "kernels"), {})
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        return refuse(f"the record could not be written: {one_line(error)}")
    fields = everything(cases, args.providers, args.minutes, args.smoke) | {"versions": versions()}
    if not args.smoke or args.out:
        out.mkdir(parents=True, exist_ok=True)
        path = write_record(str(out / "kernels"), {"benchmark": "kernels"} | fields)
        print(*render(json.loads(path.read_text()), out), sep="\n")
    failed = [row["name"] for row in fields["cases"] if row["providers"]["ours"].get("raised")]
    if failed:
        print(f"ours FAILED in {', '.join(failed)}")
    return 1 if failed else 0


def refuse(line: str) -> int:
    print(f"benchmarks/kernels.py: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
