"""Time, peak memory and stops of every phase over vocabulary and depth: what a real model costs before and after its steps.

    python benchmarks/phases.py                    # tiny widths: 32,768 to 262,144 tokens, 16 to 128 layers
    python benchmarks/phases.py --half-billion     # the shape of Qwen2.5 0.5B, 151,936 tokens, random weights
    python benchmarks/phases.py --half-billion --stops dry_run,export

Each verb is a process of its own; its peak is the operating system's (ru_maxrss). Phases within `train` are told apart by the
signs of life that the launcher's watchdog reads. With --stops a run gets a SIGTERM in each phase named, and is waited for.
Writes results/phases.json and phases.md, or phases-half-billion.*.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import harness
import sizes
from record import RESULTS, write_record

CELLS = [(32_768, 16), (131_072, 16), (262_144, 16), (32_768, 64), (32_768, 128)]
QWEN = {"hidden": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
HALF_BILLION = (151_936, 24)
POLL_SECONDS = 0.01
PHASES = (
    "data",
    "model",
    "export rehearsal",
    "backend",
    "dry run",
    "base",
    "train",
    "save",
    "finish",
    "export",
    "report",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half-billion", action="store_true")
    parser.add_argument("--stops", default="", help="phases of train, with _ for a space; `all` for each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cells = [HALF_BILLION] if arguments.half_billion else CELLS
    wanted = PHASES if arguments.stops == "all" else [s.replace("_", " ") for s in arguments.stops.split(",") if s]
    rows, stops = [], []
    for vocabulary, layers in cells:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            make(work, vocabulary, layers, QWEN if arguments.half_billion else {"hidden": 64})
            for row in measure(work):
                rows.append({"vocabulary": vocabulary, "layers": layers, **row})
                print(f"{vocabulary:>8,} x {layers:<4} {row['phase']:<24} {row['seconds']:7.2f} s {row['peak_mib']:8,.0f} MiB",
                      flush=True)  # fmt: skip
            for phase in wanted:
                stops.append({"phase": phase, **stop_in(phase, work)})
                print(f"SIGTERM in {phase:<20} {stops[-1]}", flush=True)
    name = "phases-half-billion" if arguments.half_billion else "phases"
    grown = [] if arguments.half_billion else growth(rows)
    path = write_record(name, {"rows": rows, "growth": grown, "stops": stops}, arguments.out)
    path.with_suffix(".md").write_text(table(rows, grown, stops))
    print(path)


def make(work: Path, vocabulary: int, layers: int, shape: dict[str, int]) -> None:
    """A model and rows for it, in a process of its own: a child's ru_maxrss begins with what its parent holds."""
    child = os.fork()
    if child == 0:
        sizes.save_llama(work / "model", vocabulary, layers, **shape)
        harness.write_prompts(work / "rows.jsonl", 32, seed=7)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the model could not be made")


def overrides(work: Path, run: str) -> list[str]:
    return [
        "method=lora", "objective=sft", f"model.path={work / 'model'}", f"data.train={work / 'rows.jsonl'}",
        "data.validation_share=0.1", "data.max_length=64", "data.unsupervised=drop", "train.batch_size=4", "train.max_steps=2",
        "backend.device=cpu", "evaluation.samples=2", "generate.max_new_tokens=8", f"run.dir={work / run}",
        f"cache.dir={work / 'cache'}",
    ]  # fmt: skip


def measure(work: Path) -> list[dict[str, Any]]:
    """A run from audit to answers, a row a phase: `phase`, `seconds`, `peak_mib`."""
    common = [
        o
        for o in overrides(work, "run")
        if o.startswith(("model.path", "data.train", "data.max", "data.unsup", "cache."))
    ]
    merged, device = work / "merged", "backend.device=cpu"
    rows = [timed("audit", "audit", *common, f"audit.out={work / 'audit'}")]
    whole, inside = timed_train(work)
    rows += [whole, *inside]
    rows.append(
        timed(
            "export merged", "export", f"run.dir={work / 'run'}", "export.form=merged", f"export.dir={merged}", device
        )
    )
    rows.append(timed("evaluate", "evaluate", f"model.path={merged}", f"data.test={work / 'rows.jsonl'}", "data.max_length=64",
                      "data.unsupervised=drop", device, f"cache.dir={work / 'cache'}"))  # fmt: skip
    rows.append(
        timed("generate", "generate", f"model.path={merged}", "--prompt", "Where?", "generate.max_new_tokens=8", device)
    )
    return [*rows, timed("report", "report", f"run.dir={work / 'run'}")]


def timed(name: str, *words: str) -> dict[str, Any]:
    """One verb as a process."""
    began = time.perf_counter()
    process = start(list(words), {})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{name}: {said(process)}")
    return {"phase": name, "seconds": round(time.perf_counter() - began, 2), "peak_mib": used.ru_maxrss / 1024}


def timed_train(work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`train`, and its phases by the signs of life it leaves; a phase's peak is the highest of the process so far."""
    seen: list[tuple[str, float, float]] = []
    ended = threading.Event()
    node = work / "node"
    node.mkdir()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            sign = pulse(node)
            if sign and (not seen or seen[-1][0] != sign["phase"]):
                seen.append((sign["phase"], time.perf_counter(), 0.0))
            if sign and seen:
                seen[-1] = (*seen[-1][:2], peak_of(sign["pid"]) or seen[-1][2])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        began = time.perf_counter()
        process = start(["train", *overrides(work, "run")], {"TRITUNE_NODE_DIR": str(node)})
        _, status, used = os.wait4(process.pid, 0)
        end = time.perf_counter()
    finally:
        ended.set()
        watcher.join()
    if status:
        raise RuntimeError(said(process))
    starts = [*[at for _, at, _ in seen[1:]], end]
    inside = [{"phase": f"  {name}", "seconds": round(until - at, 2), "peak_mib": peak}
              for (name, at, peak), until in zip(seen, starts, strict=True) if name in PHASES]  # fmt: skip
    return {"phase": "train", "seconds": round(end - began, 2), "peak_mib": used.ru_maxrss / 1024}, inside


def stop_in(phase: str, work: Path) -> dict[str, Any]:
    """Start `train`, send a SIGTERM a moment after `phase` began, and wait: `seconds` to the end, `exit`, and where it was."""
    node, run = work / f"node-{phase}", f"stopped-{phase.replace(' ', '-')}"
    node.mkdir()
    process = start(["train", *overrides(work, run)], {"TRITUNE_NODE_DIR": str(node)})
    while process.poll() is None and (pulse(node) or {}).get("phase") != phase:
        time.sleep(POLL_SECONDS)
    time.sleep(0.05)
    was = (pulse(node) or {}).get("phase")
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    shutil.rmtree(work / run, ignore_errors=True)
    return {"seconds": round(time.perf_counter() - began, 2), "exit": code, "was_in": was}


def start(words: list[str], env: dict[str, str]) -> subprocess.Popen:
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  read where the process failed
    process = subprocess.Popen([sys.executable, "-m", "tritune.launch.cli", *words], env={**os.environ, **env},
                               stdout=subprocess.DEVNULL, stderr=errors, text=True)  # fmt: skip
    process.stderr = errors
    return process


def said(process: subprocess.Popen) -> str:
    """What a process that has ended wrote to its standard error."""
    assert process.stderr is not None
    process.stderr.seek(0)
    return process.stderr.read()


def pulse(node: Path) -> dict[str, Any] | None:
    path = node / "rank-0.pulse"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def peak_of(pid: int) -> float:
    """VmHWM of a process, MiB; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The power with which each phase's time grows with the vocabulary, and with the layers, from the smallest to the largest.

    1 is linear, 2 quadratic; a fixed cost (imports) makes it smaller.
    """
    found = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        mine = {(r["vocabulary"], r["layers"]): r["seconds"] for r in rows if r["phase"] == phase}
        vocabularies = sorted(v for v, layers in mine if layers == min(x for _, x in mine))
        layers = sorted(x for v, x in mine if v == min(v for v, _ in mine))
        small = mine[vocabularies[0], layers[0]]
        if len(vocabularies) > 1 and len(layers) > 1 and small > 0:
            found.append({
                "phase": phase,
                "vocabulary": power(mine[vocabularies[-1], layers[0]] / small, vocabularies[-1] / vocabularies[0]),
                "layers": power(mine[vocabularies[0], layers[-1]] / small, layers[-1] / layers[0]),
            })  # fmt: skip
    return found


def power(ratio: float, over: float) -> float:
    return round(math.log(max(ratio, 1e-9)) / math.log(over), 2)


def table(rows: list[dict[str, Any]], grown: list[dict[str, Any]], stops: list[dict[str, Any]]) -> str:
    cells = list(dict.fromkeys((r["vocabulary"], r["layers"]) for r in rows))
    head = ["phase", *(f"{v:,} x {x}" for v, x in cells), *(["power of vocabulary", "of layers"] if grown else [])]
    lines = [
        "Seconds, and peak MiB, by vocabulary x layers.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    powers = {g["phase"]: g for g in grown}
    for phase in dict.fromkeys(r["phase"] for r in rows):
        mine = {(r["vocabulary"], r["layers"]): r for r in rows if r["phase"] == phase}
        shown = [f"{mine[c]['seconds']:.1f}, {mine[c]['peak_mib']:,.0f}" if c in mine else "-" for c in cells]
        tail = [str(powers[phase][k]) if phase in powers else "-" for k in ("vocabulary", "layers")] if grown else []
        lines.append("| " + " | ".join([phase.replace("  ", "train: "), *shown, *tail]) + " |")
    if stops:
        lines += ["", "| SIGTERM in | gone after, s | exit |", "| --- | --- | --- |"]
        lines += [f"| {s['phase']} | {s['seconds']} | {s['exit']} |" for s in stops]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
