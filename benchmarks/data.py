"""The data path: tokens per second and fill beside TRL and the bare tokenizer, memory of streams, the start from the cache.

    python benchmarks/data.py --shared ../shared/data --trl /path/to/python-with-trl --rows 1000000

Each measurement is a process of its own. `instruct` is instruct_2000_permissive.jsonl ten times over; `numbered` the same rows
over and over, each with its number before the prompt. Both: rendered with phi-3-mini's template, answers masked, packed into
2,048 tokens. "ours" is from the file to the plan of the first epoch, the cache written and opened; "bare" is `encode_batch` of
texts that are rendered already. Writes results/data.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results"
BARE_ROWS = 20_000  # rendered texts are held in memory for the bare rate: the first so many rows
STARTS = 5
STREAM_ROWS = (100_000, 2_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--trl", help="a Python that has trl; without it TRL is left out")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trl-rows", type=int, default=None, help="of `numbered` for TRL; default: as many")
    parser.add_argument("--only", nargs="*", default=["throughput", "fill", "stream", "start"])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(CHILDREN[given.child[0]](*given.child[1:])))
        return
    tokenizer = str(given.shared / "tokenizers" / "phi-3-mini")
    path = RESULTS / "data.json"
    found: dict[str, Any] = json.loads(path.read_text())["figures"] if path.is_file() else {}  # --only keeps the others
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        instruct = work / "instruct.jsonl"
        write_rows(given.shared, instruct, 20_000, numbered=False)
        if "throughput" in given.only:
            found["instruct"] = side_by_side(instruct, tokenizer, work, given.trl, instruct)
        numbered = work / "numbered.jsonl"
        if {"throughput", "start"} & set(given.only):
            write_rows(given.shared, numbered, given.rows, numbered=True)
        if "throughput" in given.only:
            theirs = numbered
            if given.trl_rows:
                theirs = work / "numbered_trl.jsonl"
                write_rows(given.shared, theirs, given.trl_rows, numbered=True)
            found["numbered"] = side_by_side(numbered, tokenizer, work, given.trl, theirs)
        if "start" in given.only:
            child("ours", numbered, tokenizer, work / "cache", 2048, "sft")  # into the cache, where it is not there
            found["start"] = [child("start", numbered, tokenizer, work / "cache") for _ in range(STARTS)]
            show("start", found["start"])
        if "fill" in given.only:
            banking = work / "banking77.jsonl"
            with (given.shared / "intent" / "banking77_train.csv").open(newline="") as file:
                rows = [{"text": r["text"], "label": r["category"]} for r in csv.DictReader(file)]
            banking.write_text("".join(json.dumps(r) + "\n" for r in rows))
            found["banking77"] = {"ours": child("ours", banking, tokenizer, work / "cache", 512, "classify")}
            if given.trl:
                found["banking77"]["trl"] = theirs_of(given.trl, banking, tokenizer, 512, "text", 0)
            show("banking77 at 512", found["banking77"])
        if "stream" in given.only:
            found["stream"] = {}
            for count in STREAM_ROWS:
                rows_path = work / "stream.jsonl"
                write_rows(given.shared, rows_path, count, numbered=True)
                found["stream"][str(count)] = child("stream", rows_path, tokenizer, count)
                show(f"stream of {count:,}", found["stream"][str(count)])
    from record import commit, write_record

    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    found["measured"] = found.get("measured", {}) | dict.fromkeys(given.only, stamp)
    write_record("data", {"figures": found})


def write_rows(shared: Path, path: Path, count: int, numbered: bool) -> None:
    """The instructions over and over."""
    with (shared / "instruct" / "instruct_2000_permissive.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    with path.open("w") as out:
        for i in range(count):
            row = rows[i % len(rows)]
            prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
            prompt = f"{i}: {prompt}" if numbered else prompt
            out.write(json.dumps({"prompt": prompt, "response": row["output"]}) + "\n")


def side_by_side(rows: Path, tokenizer: str, work: Path, trl: str | None, theirs: Path) -> dict[str, Any]:
    found = {
        "ours": child("ours", rows, tokenizer, work / "cache", 2048, "sft"),
        "bare": child("bare", rows, tokenizer),
    }
    if trl:
        for processes in (0, 2):
            found[f"trl_{processes or 1}"] = theirs_of(trl, theirs, tokenizer, 2048, "chat", processes)
    show(rows.stem, found)
    return found


def child(what: str, *arguments: Any) -> dict[str, Any]:
    """Run one measurement in a process of its own; -P, for transformers would take this folder's kernels.py for a package."""
    command = [sys.executable, "-P", __file__, "--shared", ".", "--child", what, *map(str, arguments)]
    return _json(subprocess.run(command, capture_output=True, text=True, check=False))


def theirs_of(python: str, rows: Path, tokenizer: str, length: int, kind: str, processes: int) -> dict[str, Any]:
    script = str(Path(__file__).with_name("data_theirs.py"))
    command = [python, "-P", script, str(rows), tokenizer, str(length), kind, str(processes)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as cache:  # nothing that `datasets` remembers of an earlier run
        found = _json(
            subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment | {"HF_DATASETS_CACHE": cache}
            )
        )
    return found | {"tokens_per_second": found["tokens"] / found["seconds"]}


def _json(done: subprocess.CompletedProcess) -> dict[str, Any]:
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(name: str, figures: Any) -> None:
    print(f"{name}: {json.dumps(figures)}", flush=True)


# -- what the children measure ---------------------------------------------------------------------------


def _config(rows: str, tokenizer: str, cache: str, length: int, objective: str) -> Any:
    from tritune.trainer.config import Config
    from tritune.trainer.config.choices import Packing, Unsupervised
    from tritune.trainer.config.registry import axis_options

    config = Config()
    config.model.tokenizer, config.data.train, config.cache.dir = tokenizer, rows, cache
    config.objective = axis_options("objective")[objective]()
    config.data.max_length, config.data.packing = length, Packing.best_fit
    config.data.unsupervised = Unsupervised.drop
    return config


def ours(rows: str, tokenizer_path: str, cache: str, length: str, objective: str) -> dict[str, Any]:
    from tritune.trainer.data.order import Order
    from tritune.trainer.data.splits import read_splits
    from tritune.trainer.model.tokenizer import load_tokenizer

    config = _config(rows, tokenizer_path, cache, int(length), objective)
    tokenizer = load_tokenizer(config.model)
    began = time.perf_counter()
    train = read_splits(config, tokenizer, None).examples["train"]
    read = time.perf_counter()
    order = Order(train, 0, capacity=int(length), window=config.data.pack_window)
    packs = order.num_sequences(0)
    seconds = time.perf_counter() - began
    tokens = int(train.lengths.sum())
    return {"rows": len(train), "tokens": tokens, "seconds": seconds, "packing_seconds": time.perf_counter() - read,
            "tokens_per_second": tokens / seconds, "packs": packs, "fill": tokens / (packs * int(length))}  # fmt: skip


def bare(rows: str, tokenizer_path: str) -> dict[str, Any]:
    from tritune.trainer.config import ModelConfig
    from tritune.trainer.data.encode import plain_backend
    from tritune.trainer.data.spans import ChatTemplate
    from tritune.trainer.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(tokenizer=tokenizer_path))
    template, texts = ChatTemplate(tokenizer), []
    with open(rows) as file:
        for line, _ in zip(file, range(BARE_ROWS), strict=False):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            texts.append(template.rows(turns, "row")[0].text)
    backend = plain_backend(tokenizer)
    backend.encode_batch(texts[:100], add_special_tokens=False)
    began = time.perf_counter()
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(e) for e in encoded)
    return {"rows": len(texts), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def start(rows: str, tokenizer_path: str, cache: str) -> dict[str, Any]:
    """A second run on rows that are in the cache: from the process's birth, and of that the data's own part."""
    import torch
    from tritune.trainer.data.feed import make_loader
    from tritune.trainer.data.loader import Dealer
    from tritune.trainer.data.splits import read_splits
    from tritune.trainer.model.tokenizer import load_tokenizer, stop_token_ids
    from tritune.trainer.run.pulse import process_birth
    from tritune.trainer.run.state import TrainState

    imported = time.monotonic()
    config = _config(rows, tokenizer_path, cache, 2048, "sft")
    config.train.max_steps = 10
    tokenizer = load_tokenizer(config.model)
    loaded = time.monotonic()
    splits = read_splits(config, tokenizer, None)
    read = time.monotonic()
    dealer = Dealer(32, 8, 0, 0, 1, torch.device("cpu"))
    loader = make_loader(config, splits, tokenizer, stop_token_ids(tokenizer), TrainState(), dealer, print)
    batch = next(iter(loader))
    done = time.monotonic()
    return {"rows": len(splits.examples["train"]), "micro_batches": len(batch), "imports_seconds": imported - process_birth(),
            "tokenizer_seconds": loaded - imported, "read_seconds": read - loaded, "order_seconds": done - read,
            "total_seconds": done - process_birth()}  # fmt: skip


def stream(rows: str, tokenizer_path: str, count: str) -> dict[str, Any]:
    """Train on nothing, but take every window of one pass; the most memory, in bytes."""
    import resource

    from tritune.trainer.data.feed import open_stream
    from tritune.trainer.model.tokenizer import load_tokenizer, stop_token_ids

    config = _config(rows, tokenizer_path, "unused", 2048, "sft")
    config.data.streaming = True
    tokenizer = load_tokenizer(config.model)
    opened, _ = open_stream(config.data, config.objective, config.seed, tokenizer, stop_token_ids(tokenizer))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    at, tokens, number, began = [(0, 0)], 0, 0, time.perf_counter()
    while at[0][0] == 0 and number * opened.window < int(count):
        window = opened.get(number, at)
        tokens, at, number = tokens + int(window.examples.lengths.sum()), window.after, number + 1
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    opened.close()
    return {"rows": int(count), "windows": number, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "before_bytes": base, "peak_bytes": peak}  # fmt: skip


CHILDREN = {"ours": ours, "bare": bare, "start": start, "stream": stream}

if __name__ == "__main__":
    main()
