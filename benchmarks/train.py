"""Throughput and memory of each rank: backend x method x activation checkpointing at 1, 2 and 4 ranks.

    python benchmarks/train.py [--quick] [--size 20m] [--ranks 1 2 4] [--batch 4] [--length 64] [--steps 8]

Each cell is a run of `tritune.trainer` in fresh processes, on a random Llama that the script saves as safetensors and on
generated text; only the checkpoint at its end is left out (`saving.py` measures it). Every cell computes the same step of
`--batch` x `--length` tokens in micro-batches of one size, so a rank's activations are the same at any number of ranks.

Measured: tokens per second of whole optimizer steps, the median without the first three and the last two; and in every
rank, over what it held just before the model was loaded, the peak of its memory in the last two steps (`peak`), and what it
held after each of them (`held`). On CPU that is RssAnon sampled every 5 ms, in float32; in those two steps each sample first
makes glibc give back what is free, of which it keeps up to several times the state (`Peak.trim`). Where there are GPUs the
same command uses them, at most one rank each, in bfloat16, and counts by `max_memory_allocated`.

Each backend at each number of ranks also trains a model of next to no parameters first. What that rank's memory rises by is
the libraries' own (threads, kernels compiled, communication) and is taken off `peak` and `held`; the record has it.

`state` is the arithmetic: bytes that a rank holds as parameters, gradients, masters and moments, with P parameters, T of
them trained, F = P - T frozen, over N ranks (on hsdp N is the ranks of one shard group):

    float32                                      bfloat16
    single, ddp  4P + 4T + 8T                    2F + 4T + 4T + 8T
    fsdp, hsdp   (4P + 4T + 8T) / N              (2F + 4T + 4T + 8T) / N
    zero1        4P + 4T + (4T + 8T) / N         2P + 4T + (4T + 8T) / N
    zero2        4P + (4T + 4T + 8T) / N         2P + (4T + 4T + 8T) / N
    zero3        (4P + 4T + 8T) / N              (2P + 4T + 4T + 8T) / N

The terms are parameters, gradients, [masters,] moments. Under DeepSpeed 0.19, stages 1 and 2 clone each rank's partition
as masters in float32 too (`single_partition_of_fp32_groups`); stage 3 trains its float32 partitions themselves and has
masters only in bf16. FSDP2's float32 shards are masters and parameters in one. Not counted, and so in `peak` over `state`:
activations, logits, the layer that is gathered, buckets of `backend.bucket_elements` (here P / 20: the default holds
this whole model), the flat copy of its gradient partition that DeepSpeed makes for the update (4T / N), DDP's buckets while
they are built anew, allocator slack, and libraries' own. Frozen parameters that were only mapped from the file are in
RssFile and not in RssAnon; `file` has them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import MIB, RESULTS, Peak, run_ranks, write_record
from tritune.launch.processes import CONTEXT, PRELOAD, preload

SIZES = {  # vocabulary, hidden, intermediate, layers, heads; embeddings are tied
    "empty": (512, 16, 16, 2, 1),
    "2m": (2048, 192, 512, 4, 4),
    "5m": (2048, 320, 832, 4, 5),
    "10m": (4096, 384, 1024, 5, 6),
    "20m": (8192, 512, 1408, 5, 8),
    "50m": (8192, 640, 1728, 9, 10),
    "160m": (16384, 1024, 2816, 12, 16),
    "1b": (32000, 2048, 5632, 22, 16),
}
BACKENDS = ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
DEEPSPEED_LATE = ["torch._inductor.compile_fx", "functorch.compile", "torch.export.pt2_archive"]
SKIPPED_STEPS, MEMORY_STEPS = 3, 2  # at the beginning, at the end: not timed


def train(overrides: list[str]) -> dict[str, Any]:
    """In a rank: train, and return what its memory was."""
    from tritune.trainer import build, loop
    from tritune.trainer.__main__ import main

    peak, held = Peak(5.0), []
    load, log = build._load, loop.log_step

    def load_measured(*args: Any) -> Any:
        peak.start()
        return load(*args)

    def log_measured(run: Any, *args: Any) -> None:
        log(run, *args)
        ahead = run.loader.total_steps - run.state.step
        if ahead == MEMORY_STEPS:
            peak.trim()
        elif ahead < MEMORY_STEPS:
            held.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else peak.now()["anon"])

    build._load, loop.log_step = load_measured, log_measured
    loop.save = lambda run: peak.stop()
    code = main(overrides)
    if code:
        raise SystemExit(code)
    return {"peak": peak.stop(), "held": max(held)}


def state_bytes(backend: str, total: int, trained: int, ranks: int, bf16: bool) -> int:
    """The arithmetic in the docstring, for one rank."""
    p, t, n = total, trained, ranks
    moments, gradients = 8 * t, 4 * t
    if backend in ("single", "ddp", "fsdp", "hsdp"):
        shards = {"fsdp": n, "hsdp": max(n // 2, 1)}.get(backend, 1)
        return ((2 * (p - t) + 4 * t if bf16 else 4 * p) + gradients + moments) // shards
    parameters, masters = (2 * p if bf16 else 4 * p), 4 * t
    if backend == "zero1":
        return parameters + gradients + (masters + moments) // n
    if backend == "zero2":
        return parameters + (gradients + masters + moments) // n
    return (parameters + gradients + (masters if bf16 else 0) + moments) // n


def save_llama(where: Path, size: str, length: int) -> int:
    """Save a random Llama with the byte tokenizer; return its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from tritune.trainer.model.tokenizer import byte_tokenizer

    vocab, hidden, intermediate, layers, heads = SIZES[size]
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return sum(p.numel() for p in model.parameters())


def write_text(path: Path, num_bytes: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    path.write_text(" ".join(rng.choices(words, k=num_bytes // 4)) + "\n")


def micro_batch(args: argparse.Namespace) -> int:
    return max(args.batch // max(args.ranks), 1)


def measure(cell: dict[str, Any], args: argparse.Namespace, folder: Path, model: str, gpus: int) -> dict[str, Any]:
    """Run one cell; return it with its figures."""
    ranks, backend, directory = cell["ranks"], cell["backend"], folder / "run"
    vocab, hidden, intermediate, layers, _ = SIZES[model]
    bucket = (vocab * hidden + layers * hidden * (4 * hidden + 3 * intermediate)) // 40 * 2
    name = "single" if backend == "ddp" and ranks == 1 else backend
    overrides = [
        f"model.path={folder / model}", f"data.train={folder / 'text.txt'}", "objective=pretrain",
        f"data.max_length={args.length}", f"train.batch_size={args.batch}", f"train.micro_batch_size={micro_batch(args)}",
        f"train.max_steps={args.steps}", f"train.activation_checkpointing={cell['checkpointing']}",
        f"backend={name}", f"method={cell['method']}", "evaluation.base=false", "evaluation.samples=0",
        "evaluation.splits=[]", "checkpoint.every=1000000", "export.enabled=false", "report.enabled=false",
        f"run.dir={directory}",
    ]  # fmt: skip
    overrides += ["model.dtype=bfloat16"] if gpus else ["backend.device=cpu"]
    overrides += [f"backend.bucket_elements={bucket}"] if name.startswith("zero") else []
    figures = run_ranks(train, (overrides,), ranks, folder / "logs", timeout=1200.0)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    sizes = json.loads((directory / "summary.json").read_text())["parameters"]
    shutil.rmtree(directory)
    return cell | {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in rows[SKIPPED_STEPS:-MEMORY_STEPS]),
        "parameters": sizes,
        "peak_bytes": [f["peak"]["cuda" if gpus else "anon"] for f in figures],
        "held_bytes": [f["held"] for f in figures],
        "peak_host_bytes": [f["peak"]["anon"] for f in figures],
        "file_bytes": [f["peak"]["file"] for f in figures],
        "state_bytes": state_bytes(name, sizes["total"], sizes["trainable"], ranks, bool(gpus)),
    }


def table(record: dict[str, Any]) -> str:
    """The cells as Markdown: a table per method, a row per backend, three columns per number of ranks."""
    numbers = sorted({c["ranks"] for c in record["cells"]})
    where = ", ".join(record["machine"]["gpus"]) or f"{record['machine']['cores']} CPU cores"
    lines = [
        f"{record['parameters']:,} parameters, {record['dtype']}, {where}, steps of {record['batch']} x "
        f"{record['length']} tokens, micro-batches of {record['micro_batch']}; {record['date']}.",
        "",
        "Tokens/s of the run / MiB of a rank at its peak / MiB held after a step / MiB of parameters, gradients, masters and "
        "moments by the arithmetic in `benchmarks/train.py`. The largest of the ranks; what a rank without a model takes is off.",
    ]  # fmt: skip
    for method in dict.fromkeys(c["method"] for c in record["cells"]):
        lines += ["", f"**{method}**", "", "| backend | checkpointing | " + " | ".join(f"{n} rank(s)" for n in numbers) + " |",
                  "| --- | --- |" + " --- |" * len(numbers)]  # fmt: skip
        cells = [c for c in record["cells"] if c["method"] == method]
        for backend, kept in dict.fromkeys((c["backend"], c["checkpointing"]) for c in cells):
            found = {c["ranks"]: c for c in cells if (c["backend"], c["checkpointing"]) == (backend, kept)}
            lines.append(f"| {backend} | {kept} | " + " | ".join(_shown(found.get(n)) for n in numbers) + " |")
    return "\n".join(lines) + "\n"


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    sizes = [max(cell["peak_bytes"]), max(cell["held_bytes"]), cell["state_bytes"]]
    return f"{cell['tokens_per_second']:,.0f} / " + " / ".join(f"{s / MIB:,.0f}" for s in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cells of the small model; writes train-quick.*")
    parser.add_argument("--size", choices=list(SIZES), default="20m")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--batch", type=int, default=4, help="sequences per optimizer step")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if args.quick:
        args.size, args.ranks, args.backends, args.steps = "2m", [1, 2], ["fsdp", "zero2"], 6
    if args.steps <= SKIPPED_STEPS + MEMORY_STEPS:
        parser.error(f"--steps must be at least {SKIPPED_STEPS + MEMORY_STEPS + 1}")
    gpus = torch.cuda.device_count()
    args.ranks = [n for n in args.ranks if not gpus or n <= gpus]
    preload(on_cpu=not gpus)
    if not gpus:  # what DeepSpeed imports when it starts an engine is nothing that a rank holds for its model
        CONTEXT.set_forkserver_preload([*PRELOAD, *DEEPSPEED_LATE])
    kinds = [("full", "none")] if args.quick else [(m, c) for m in ("full", "lora") for c in ("none", "full")]
    places = [(b, n) for b in args.backends for n in args.ranks if b != "hsdp" or n == 4]
    out, cells, overheads, began = "train-quick" if args.quick else "train", [], {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = save_llama(folder / args.size, args.size, args.length)
        save_llama(folder / "empty", "empty", args.length)
        write_text(folder / "text.txt", (args.steps + 2) * args.batch * args.length * 2)
        for backend, ranks in places:
            cell = {"backend": backend, "method": "full", "checkpointing": "none", "ranks": ranks}
            figures = measure(cell, args, folder, "empty", gpus)
            overheads[backend, ranks] = [figures["peak_bytes"], figures["held_bytes"]]
        for method, checkpointing in kinds:
            for backend, ranks in places:
                cell = {"backend": backend, "method": method, "checkpointing": checkpointing, "ranks": ranks}
                cell = measure(cell, args, folder, args.size, gpus)
                for key, without in zip(("peak_bytes", "held_bytes"), overheads[backend, ranks], strict=True):
                    cell[key] = [a - b for a, b in zip(cell[key], without, strict=True)]
                    cell["overhead_" + key] = without
                cells.append(cell)
                shown = _shown(cell)
                seconds = time.perf_counter() - began
                print(f"{seconds:6.0f} s  {method:4} {checkpointing:4} {backend:5} x {ranks}  {shown}", flush=True)
                fields = {"parameters": total, "dtype": "bfloat16" if gpus else "float32", "batch": args.batch,
                          "length": args.length, "micro_batch": micro_batch(args), "steps": args.steps,
                          "skipped_steps": [SKIPPED_STEPS, MEMORY_STEPS],
                          "seconds": round(seconds), "cells": cells}  # fmt: skip
                path = write_record(out, fields)  # each time: a matrix that is interrupted leaves what it has
                (RESULTS / f"{out}.md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
