"""Host memory while a sharded run is exported: no rank may hold much more than one tensor beside its part.

    python benchmarks/exporting.py [--ranks 4] [--only LABEL ...] [--runs-only] [--beside FILE] [--into FOLDER]

A random Llama is written as bf16 safetensors, trained for one step on FSDP and exported at the end of the run, with all
that belongs to it: the weights in files of at most 1 GB, read back with transformers, their logits compared. From just before
the export until its end a thread in every rank samples /proc/self/status every 2 ms. Measured is the rise of the peak of RssAnon
(memory that only this process has and must keep) over where it stood before, when the rank holds its part of the model and, of
what trains, of masters and moments. The peak of RssFile (pages of mapped files, in the system's cache anyway) stands apart. A
`verb` case is `tritune export` of the same run in one process, which begins with nothing.

The bound: rise <= 1.3 x the largest tensor + a rank's part of the model, both in bytes of the dtype that the masters are held
in. The models with LoRA have 1.0 billion parameters; where every parameter trains, masters, moments and gradients would be 16
bytes for each, and the model has 0.3 billion. `--beside` puts into the record what this script found of an earlier commit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import HIDDEN, VOCAB, save_model
from record import MIB, RESULTS, Peak, commit, run_ranks, write_record
from tritune.launch.processes import preload

MOST = 1.3  # of the largest tensor
WIDTHS = {"bfloat16": 2, "float32": 4}
CASES = [  # label, layers, method, model.dtype, dtype of the masters that are written
    ("lora-merged-bf16", 17, ["method=lora", "export.form=merged"], "bfloat16", "bfloat16"),
    ("full-bf16", 3, ["method=full"], "bfloat16", "float32"),
]


def train(overrides: list[str]) -> dict[str, Any]:
    """In a rank: train and export, and return how memory rose in the export."""
    from tritune.trainer import finish
    from tritune.trainer.__main__ import main

    peak, figures = Peak(2.0), {}
    last_before, whole_finish = finish._abstention, finish.finish

    def before_export(run: Any, *args: Any) -> Any:
        found = last_before(run, *args)
        run.world.gather(None)  # all begin together
        peak.trim()  # what steps have freed
        figures["began"] = time.perf_counter()
        peak.start()
        return found

    def timed_finish(run: Any, *args: Any) -> None:
        whole_finish(run, *args)
        figures["seconds"] = time.perf_counter() - figures.pop("began")
        figures["rise"] = peak.stop()
        figures["total"] = sum(p.numel() for p in run.core.parameters())

    finish._abstention, finish.finish = before_export, timed_finish
    if code := main(overrides):
        raise SystemExit(code)
    return figures


def export(words: list[str]) -> dict[str, Any]:
    """In one process: the verb."""
    from tritune.trainer import verbs

    peak, began = Peak(2.0), time.perf_counter()
    peak.start()
    if code := verbs.run_verb(verbs.export, words):
        raise SystemExit(code)
    return {"seconds": time.perf_counter() - began, "rise": peak.stop()}


def measure(case: tuple[str, int, list[str], str, str], ranks: int, verb: bool, folder: Path) -> list[dict[str, Any]]:
    label, layers, method, dtype, masters = case
    model, run = folder / f"model-{layers}", folder / label
    if not model.is_dir():
        save_model(model, layers)
    overrides = [
        f"model.path={model}", f"data.train={folder / 'rows.txt'}", "objective=pretrain", "backend=fsdp", *method,
        f"model.dtype={dtype}", "backend.device=cpu", "data.max_length=64", "train.max_steps=1", "train.batch_size=4",
        "evaluation.base=false", "evaluation.samples=0", "evaluation.splits=[]", "report.enabled=false", "optim.lr=2e-2",
        "export.shard_gb=1", f"run.dir={run}",
    ]  # fmt: skip
    found = run_ranks(train, (overrides,), ranks, folder / f"{label}-logs", timeout=1200.0)
    summary = json.loads((run / "summary.json").read_text())
    largest, whole = VOCAB * HIDDEN * WIDTHS[masters], found[0]["total"] * WIDTHS[masters]
    measured = [(label, found, whole // ranks)]
    if verb:
        words = [f"run.dir={run}", f"export.dir={folder / 'again'}"]
        alone = run_ranks(export, (words,), 1, folder / f"{label}-verb", 1200.0)
        measured.append((f"{label}-verb", alone, whole))
    rows = []
    for name, ranked, part in measured:
        bound, rises = round(MOST * largest) + part, [f["rise"]["anon"] for f in ranked]
        rows.append({
            "case": name, "commit": commit(), "ranks": len(ranked),
            "parameters": found[0]["total"], "written_bytes": summary["export_bytes"],
            "largest_tensor_bytes": largest, "part_bytes": part, "bound_bytes": bound, "holds": max(rises) <= bound,
            "rise_anon_bytes": rises, "rise_file_bytes": [f["rise"]["file"] for f in ranked],
            "seconds": round(ranked[0]["seconds"], 1),
        })  # fmt: skip
    return rows


def shown(row: dict[str, Any]) -> str:
    rises = ", ".join(f"{r / MIB:,.0f}" for r in row["rise_anon_bytes"])
    text = f"{row['case']:22} x {row['ranks']}  anon +{rises} MiB, file +{max(row['rise_file_bytes']) / MIB:,.0f} MiB, "
    return (
        text + f"bound {row['bound_bytes'] / MIB:,.0f} MiB: {'holds' if row['holds'] else 'BROKEN'}; {row['seconds']} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=[c[0] for c in CASES], default=[c[0] for c in CASES])
    parser.add_argument("--runs-only", action="store_true", help="leave out the verb")
    parser.add_argument("--beside", type=Path, help="the record of an earlier commit, which stands in this one")
    parser.add_argument("--into", type=Path, default=RESULTS)
    args = parser.parse_args()
    preload(on_cpu=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.txt").write_text("one row of text that is long enough to fill a block or two\n" * 40)
        for case in CASES:
            if case[0] in args.only:
                for row in measure(case, args.ranks, not args.runs_only, folder):
                    rows.append(row)
                    print(shown(row), flush=True)
    fields: dict[str, Any] = {"most": MOST, "cases": rows}
    if args.beside is not None:
        earlier = json.loads(args.beside.read_text())
        fields["before"] = {key: earlier[key] for key in ("date", "commit", "cases")}
    write_record("exporting", fields, args.into)


if __name__ == "__main__":
    main()
