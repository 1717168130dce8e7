"""`make demo`: data from the grammar, a tokenizer, a base model from scratch, and what LoRA makes of it.

Arguments are overrides of the second run: `python -m tritune.launch.quickstart seed=1 method.rank=4`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tritune.launch.quickstart.corpus import paragraphs
from tritune.launch.quickstart.grammar import SPLITS, rows
from tritune.launch.quickstart.tokenizer import train_tokenizer

FOLDER = Path("runs/quickstart")
CORPUS = {"train": (10000, 0), "validation": (100, 1), "test": (200, 2)}  # paragraphs, seed


def write_data(folder: Path) -> None:
    """Write the general corpus (`corpus_*.jsonl`) and the task (`*.jsonl`), a JSON object a line."""
    folder.mkdir(parents=True)
    for split, (count, seed) in CORPUS.items():
        _write(folder / f"corpus_{split}.jsonl", ({"text": text} for text in paragraphs(count, seed)))
    for split in SPLITS:
        _write(folder / f"{split}.jsonl", rows(split, seed=0))


def texts(folder: Path) -> Iterable[str]:
    """Yield what the tokenizer learns from: every text of the training files, and of them only."""
    for name in ("corpus_train", "train"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            yield from json.loads(line).values()


def commands(folder: Path, overrides: list[str]) -> list[list[str]]:
    """The arguments of the two `tritune` commands: the base, and its tuning."""
    data = folder / "data"
    base = [
        "train", "experiment=quickstart_base", f"model.tokenizer={folder}/tokenizer",
        f"data.train={data}/corpus_train.jsonl", f"data.validation={data}/corpus_validation.jsonl",
        f"data.test={data}/corpus_test.jsonl", f"run.dir={folder}/base",
    ]  # fmt: skip
    tuned = [
        "train", "experiment=quickstart", f"model.path={folder}/base/export",
        f"data.train={data}/train.jsonl", f"data.validation={data}/validation.jsonl", f"data.test={data}/test.jsonl",
        f"data.retention={data}/corpus_test.jsonl", f"run.dir={folder}/tuned", *overrides,
    ]  # fmt: skip
    return [base, tuned]


def main(argv: list[str] | None = None) -> int:
    """Run it all; return the exit status of the first command that fails, or 0."""
    from tritune.launch.cli import main as tritune

    if FOLDER.exists():
        print(f"removing {FOLDER} of the last demo", flush=True)
        shutil.rmtree(FOLDER)
    write_data(FOLDER / "data")
    train_tokenizer(texts(FOLDER / "data"), FOLDER / "tokenizer")
    print(f"wrote {FOLDER}/data and, learned from it, {FOLDER}/tokenizer", flush=True)
    for arguments in commands(FOLDER, sys.argv[1:] if argv is None else argv):
        print(f"\n$ tritune {shlex.join(arguments)}\n", flush=True)
        status = tritune(arguments)
        if status:
            return status
    print(f"""
The base read everyday texts ({FOLDER}/data/corpus_train.jsonl): it knows their language and no task. LoRA taught it to sort
support messages and to answer them ({FOLDER}/data/train.jsonl). In the table, `test` are messages worded as it was never
shown ({FOLDER}/data/test.jsonl); `retention` are texts like the base's, on which it got worse: it forgets.

Open {FOLDER}/tuned/report.html in a browser. Ask it yourself:
tritune generate run.dir={FOLDER}/tuned --prompt "When will the kettle that I ordered arrive?" """)
    return 0


def _write(path: Path, lines: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
