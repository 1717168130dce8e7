"""Every backend beside one process: `tritune verify parity` for {full, lora} x {1, 3} micro-batches, in float32 and bf16.

    python benchmarks/parity.py [--readme] [--steps 20] [--only ROW ...]

A tied two-layer Llama of 0.1M parameters, saved as safetensors; prompts and responses of ragged lengths; 24 rows a step on
two ranks, or four for `hsdp` (2 x 2), in one or three micro-batches a rank. LoRA has dropout, gradients are clipped.
`--only "bfloat16, lora, 1"` measures that row alone, and the record keeps the others. `--readme` puts the table between the
marks in benchmarks/README.md; the front page has one of its rows. All figures of every step are in `results/parity.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, write_record
from transformers import AutoConfig, AutoModelForCausalLM
from tritune.launch.verify import verify
from tritune.trainer.model.tokenizer import byte_tokenizer

METHODS = {"full": ["method=full", "optim.lr=2e-3"],
           "lora": ["method=lora", "method.rank=8", "method.dropout=0.1", "optim.lr=5e-3"]}  # fmt: skip
BACKENDS = ["ddp", "fsdp", "fsdp+offload", "zero1", "zero2", "zero3", "zero3+offload", "hsdp@4"]
ROWS = 24  # a step
MARKS = ("<!-- parity: python benchmarks/parity.py --readme -->", "<!-- /parity -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to measure anew, as the table names them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        common = [
            *prepare(Path(folder)),
            f"verify.steps={arguments.steps}",
            f"verify.parameters_every={arguments.steps}",
        ]
        record = RESULTS / "parity.json"
        cells = json.loads(record.read_text())["cells"] if arguments.only else {}
        for dtype in ("float32", "bfloat16"):
            for method, chosen in METHODS.items():
                for count in (1, 3):
                    name = f"{dtype}, {method}, {count}"
                    if not arguments.only or name in arguments.only:
                        cells[name] = prove(Path(folder), common, [*chosen, f"model.dtype={dtype}"], count)
                        write_record("parity", {"steps": arguments.steps, "cells": cells})
    lines = table(cells)
    print("\n".join(lines))
    if arguments.readme:
        put(Path(__file__).with_name("README.md"), lines)


def prove(folder: Path, common: list[str], chosen: list[str], count: int) -> dict[str, Any]:
    """All backends with `count` micro-batches a rank: those on two ranks beside their reference, `hsdp` beside its own."""
    cell: dict[str, Any] = {"holds": True, "backends": {}, "references": []}
    for ranks, backends in ((2, BACKENDS[:-1]), (4, BACKENDS[-1:])):
        own = [f"verify.backends=[{','.join(backends)}]", f"train.micro_batch_size={ROWS // (ranks * count)}"]
        verify(["parity", *common, *chosen, *own, f"run.dir={folder / 'run'}"])
        found = json.loads((folder / "run" / "parity.json").read_text())
        cell["holds"] &= found["holds"]
        cell["backends"] |= found["backends"]
        cell["references"].append({key: found.get(key) for key in ("criterion", "reference", "bounds")})
    return cell


def prepare(folder: Path) -> list[str]:
    """Model and rows; the overrides that name them."""
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.1,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng, words = random.Random(3), "the cat sat on a red mat while two dogs ran far away over green hills".split()  # noqa: SIM905
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(240):
            prompt = f"{i}: {' '.join(rng.choices(words, k=rng.randint(1, 9)))}"
            file.write(
                json.dumps({"prompt": prompt, "response": " ".join(rng.choices(words, k=rng.randint(1, 12)))}) + "\n"
            )
    return [f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", "data.max_length=160",
            f"train.batch_size={ROWS}", "train.max_steps=1", "backend.device=cpu", "launch.num_procs=2"]  # fmt: skip


def table(cells: dict[str, Any]) -> list[str]:
    """Markdown: for each backend the worst step of loss and gradient norm, relative, and the parameters at the end."""
    lines = ["| | " + " | ".join(BACKENDS) + " |", "| --- |" + " --- |" * len(BACKENDS)]
    for name, cell in cells.items():
        shown = []
        for backend in BACKENDS:
            found = cell["backends"][backend]
            if "worst" not in found:
                shown.append(found["verdict"])
                continue
            w = found["worst"]
            figures = f"{w['loss']:.0e} {w['grad_norm']:.0e} {w['parameters']:.0e}"
            shown.append(figures if found["verdict"] == "holds" else f"**{figures}**")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def put(readme: Path, lines: list[str]) -> None:
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]))


if __name__ == "__main__":
    main()
