"""BANKING77: Tritune beside a plain PyTorch loop, on the same machine, in turn.

    python benchmarks/banking77.py --data DIR [--seeds 0 1 2] [--method full|lora] [--out FILE]

DIR holds `intent/banking77_{train,test}.csv` and `models/tinystories-656k`. The plain loop is transformers' own
classification model, dynamic padding, AdamW, one-cycle schedule: what somebody writes in an afternoon. Both train in a
process of their own with the same number of threads; times are of training alone, without loading and testing.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, EPOCHS, LR, LENGTH = 32, 5, 2e-3, 128
LORA = ["method=lora", "method.rank=16", "method.alpha=32", "optim.lr=5e-3"]


def plain(data: Path, seed: int) -> dict[str, float]:
    """Train with a plain loop; return test accuracy and training seconds."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def rows(name: str) -> list[dict[str, str]]:
        with (data / "intent" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    train, test = rows("banking77_train.csv"), rows("banking77_test.csv")
    classes = {c: i for i, c in enumerate(sorted({r["category"] for r in train}))}
    path = data / "models" / "tinystories-656k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(classes), dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    steps = EPOCHS * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)

    def batch(part: list[dict[str, str]]):
        inputs = tokenizer(
            [r["text"] for r in part], return_tensors="pt", padding=True, truncation=True, max_length=LENGTH
        )
        return inputs, torch.tensor([classes[r["category"]] for r in part])

    began = time.perf_counter()
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(train), BATCH):
            inputs, labels = batch([train[i] for i in order[start : start + BATCH]])
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - began
    model.eval()
    hits = 0
    with torch.no_grad():
        for start in range(0, len(test), 64):
            inputs, labels = batch(test[start : start + 64])
            hits += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return {"accuracy": hits / len(test), "train_seconds": seconds}


def tritune(data: Path, seed: int, method: str, directory: Path) -> dict:
    """Train with `tritune train experiment=banking77`; return its summary."""
    overrides = [
        "experiment=banking77",
        f"seed={seed}",
        f"run.dir={directory}",
        f"model.path={data / 'models' / 'tinystories-656k'}",
        f"data.train={data / 'intent' / 'banking77_train.csv'}",
        f"data.test={data / 'intent' / 'banking77_test.csv'}",
        *(LORA if method == "lora" else []),
    ]
    subprocess.run([sys.executable, "-m", "tritune.trainer", *overrides], check=True)
    return json.loads((directory / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--no-plain", action="store_true", help="do not run the plain loop beside")
    parser.add_argument("--plain-seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    args = parser.parse_args()
    if args.plain_seed is not None:
        print(json.dumps(plain(args.data, args.plain_seed)))
        return
    import torch
    import transformers

    runs = []
    for seed in args.seeds:
        row: dict = {"seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            summary = tritune(args.data, seed, args.method, Path(folder) / "run")
        scores = summary["eval"]["test"]
        row["tritune"] = {
            "accuracy": scores["tuned"]["accuracy"],
            "macro_f1": scores["tuned"]["macro_f1"],
            "base_accuracy": scores["base"]["accuracy"],
            "base_macro_f1": scores["base"]["macro_f1"],
            "train_seconds": summary["train_seconds"],
            "trainable_parameters": summary["parameters"]["trainable"],
            "export_bytes": summary["export_bytes"],
        }
        if not args.no_plain:
            command = [sys.executable, __file__, "--data", str(args.data), "--plain-seed", str(seed)]
            out = subprocess.run(command, check=True, capture_output=True, text=True)
            row["plain"] = json.loads(out.stdout.strip().splitlines()[-1])
        print(json.dumps(row), flush=True)
        runs.append(row)
    mean = {"accuracy": sum(r["tritune"]["accuracy"] for r in runs) / len(runs)}
    if not args.no_plain:
        mean["plain_accuracy"] = sum(r["plain"]["accuracy"] for r in runs) / len(runs)
        total = [sum(r[who]["train_seconds"] for r in runs) for who in ("tritune", "plain")]
        mean["time_ratio"] = total[0] / total[1]
    record = {
        "benchmark": "banking77",
        "method": args.method,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/banking77.py --method {args.method} --seeds {' '.join(map(str, args.seeds))}",
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "mean": mean,
        "runs": runs,
    }
    print(json.dumps(mean))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
