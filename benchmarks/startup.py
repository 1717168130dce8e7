"""From `tritune train` to the end of the first step, by phase; and how long each verb takes to print its help.

    python benchmarks/startup.py --model ../shared/data/models/stories260K --data ROWS.jsonl

Two processes under our launcher, on this machine, `--rounds` times after one that warms the file cache; the median of each phase.
Writes results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from record import write_record

VERBS = ("train", "submit", "doctor", "evaluate", "generate", "export", "report", "verify", "config")
# What each phase is for, so that a longer one can be argued with.
WHY = {
    "launcher": "Python, Hydra and the configuration's checks before anything is started; then torchrun imports torch",
    "interpreter": "Python itself, in each rank",
    "config": "Hydra composes and the rules are checked, in each rank",
    "imports": "torch and transformers",
    "process group": "ranks meet over gloo; the run directory is taken",
    "data": "tokenizer, rows, token ids; with the architecture's own imports",
    "model": "weights from safetensors",
    "export rehearsal": "all of an export but its weights, written and read back",
    "backend": "wrapping; the optimizer",
    "dry run": "the longest micro-batch, forward and backward",
    "resume": "checkpoints are looked for, trackers opened",
    "base": "the untouched model on held-out rows; there are none here",
    "train": "the first step",
    "save": "the first checkpoint, which ends the first step here",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    runs = [start(arguments.model, arguments.data) for _ in range(arguments.rounds + 1)][1:]
    phases = {
        name: {"seconds": round(statistics.median(run.get(name, 0.0) for run in runs), 3), "why": WHY.get(name, "")}
        for name in runs[0]
    }
    helps = {verb: round(statistics.median(print_help(verb) for _ in range(3)), 3) for verb in VERBS}
    path = write_record("startup", {"processes": 2, "rounds": arguments.rounds, "phases": phases, "help_seconds": helps,
                                    "model": Path(arguments.model).name})  # fmt: skip
    for name, phase in phases.items():
        print(f"{name:14} {phase['seconds']:6.2f} s  {phase['why']}")
    print(f"--help: {max(helps.values()):.2f} s at most\n{path}")


def start(model: str, data: str) -> dict[str, float]:
    """One run of one step; seconds by phase."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "tritune.launch.cli", "train", f"model.path={model}", f"data.train={data}",
                   "data.max_length=128", "data.unsupervised=drop", "train.batch_size=8", "train.max_steps=1",
                   "launch.num_procs=2", "backend.device=cpu", "export.enabled=false", "report.enabled=false",
                   "evaluation.base=false", "evaluation.samples=0", f"run.dir={run}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads((run / "startup.json").read_text())


def print_help(verb: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tritune.launch.cli", verb, "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
