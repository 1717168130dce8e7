"""BANKING77 by each method: accuracy, what trains, seconds, size of what is exported.

    python benchmarks/methods.py --data DIR [--epochs 1] [--only NAME ...]

DIR holds `intent/banking77_{train,test}.csv` and `models/tinystories-656k`. Each method trains with the defaults of its keys
and of its learning rate, but for those in `METHODS`, one run after another; a classifier's head (9,856 parameters) trains in
each. The base's figures are those of the model before training, whose head is random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_record

METHODS = {
    "full": ["method=full"],
    "last layer": ["method=full", "method.last_layers=1"],
    "head alone": ["method=full", "method.train=[score]", "optim.lr=5e-3"],
    "LoRA": ["method=lora"],
    "QLoRA (nf4)": ["method=lora", "model.storage=nf4"],
    "rsLoRA": ["method=lora", "method.rslora=true"],
    "LoRA+ (16)": ["method=lora", "method.lora_plus_ratio=16", "optim.lr=5e-4"],
    "DoRA": ["method=lora", "method.dora=true"],
    "adapter": ["method=adapter"],
    "prefix (20)": ["method=prefix", "method.num_virtual_tokens=20"],
    "prompt (20)": ["method=prompt", "method.num_virtual_tokens=20"],
}


def run(data: Path, epochs: int, keys: list[str], directory: Path) -> dict[str, Any]:
    """Train, and return the summary."""
    intent = data / "intent"
    overrides = [
        "experiment=banking77", "optim.lr=null", f"run.dir={directory}", f"model.path={data / 'models' / 'tinystories-656k'}",
        f"data.train={intent / 'banking77_train.csv'}", f"data.test={intent / 'banking77_test.csv'}",
        f"train.epochs={epochs}", "report.enabled=false", "export.insist=true", *keys,
    ]  # fmt: skip  # its files name the tied matrix as the head, which PEFT's classifier does not look for
    subprocess.run([sys.executable, "-m", "tritune.trainer", *overrides], check=True, capture_output=True)
    return json.loads((directory / "summary.json").read_text())


def last_rate(directory: Path) -> float:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return max(row["lr"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    cases = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            found = run(args.data, args.epochs, METHODS[name], directory)
            scores = found["eval"]["test"]
            cases.append({
                "method": name, "keys": METHODS[name], "accuracy": scores["tuned"]["accuracy"],
                "base_accuracy": scores["base"]["accuracy"], "test_loss": scores["tuned"]["loss"],
                "trained_parameters": found["parameters"]["trainable"], "train_seconds": found["train_seconds"],
                "export_bytes": found["export_bytes"], "peak_lr": last_rate(directory),
            })  # fmt: skip
        case = cases[-1]
        print(f"| {name} | {case['accuracy']:.1%} | {case['trained_parameters']:,} | {case['train_seconds']:.0f} | "
              f"{case['export_bytes']:,} | {case['peak_lr']:.1e} |", flush=True)  # fmt: skip
    write_record("methods", {"epochs": args.epochs, "cases": cases})


if __name__ == "__main__":
    main()
