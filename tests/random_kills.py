"""Kill runs at random moments and compare what they logged, bit for bit, with runs that nobody killed.

    python tests/random_kills.py [--kills 20] [--seed 0]

Kills are dealt over full and LoRA on 1 and 2 processes; each hits a random step of a run that goes on from the kill before,
plus up to 50 ms, so that saves and evaluations are hit as well. Prints a line per kill and ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import harness

STEPS = 60


def overrides(data: Path, directory: Path, method: str) -> list[str]:
    return [
        "model=tiny", f"data.train={data}", "data.validation_share=0.1", "data.max_length=160", "train.batch_size=8",
        "train.micro_batch_size=3", f"train.max_steps={STEPS}", "evaluation.every=12", "checkpoint.every=4",
        "backend.device=cpu", "export.enabled=false",
        "report.enabled=false", "optim.lr=2e-3", f"run.dir={directory}", f"method={method}",
        *(["method.dropout=0.1"] if method == "lora" else []),
    ]  # fmt: skip


def logged(directory: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in harness.rows(directory)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cells = list(itertools.product(("full", "lora"), (1, 2)))
    kills = {cell: args.kills // len(cells) + (i < args.kills % len(cells)) for i, cell in enumerate(cells)}
    differences = done = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        harness.write_prompts(root / "rows.jsonl", 200, args.seed)
        for (method, world_size), count in kills.items():
            name = f"{method}-{world_size}"
            harness.run(overrides(root / "rows.jsonl", root / name, method), root / "logs", world_size)
            expected = logged(root / name)
            directory = root / f"{name}-killed"
            steps = sorted(rng.randint(1, STEPS - 1) for _ in range(count))
            for step in steps:
                job = harness.start(overrides(root / "rows.jsonl", directory, method), root / "logs", world_size)
                harness.wait_for_step(job, directory, step)
                time.sleep(rng.random() * 0.05)
                job.signal(signal.SIGKILL)
                codes = job.wait()
                rows = harness.rows(directory)
                killed = all(code == -signal.SIGKILL for code in codes)
                done += killed
                saved = sorted(p.name for p in (directory / "checkpoints").glob("step-*"))
                print(
                    f"{name}: {'killed' if killed else f'ended {codes}'} after step {rows[-1]['step']}, "
                    f"newest checkpoint {saved[-1] if saved else 'none'}",
                    flush=True,
                )
            harness.run(overrides(root / "rows.jsonl", directory, method), root / "logs", world_size)
            different = sum(a != b for a, b in itertools.zip_longest(expected, logged(directory)))
            differences += different
            print(f"{name}: {different} of {len(expected)} rows differ", flush=True)
    print(f"{done} kills, {differences} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
