"""The golden runs: which there are, how they are started, and what of a run's files is recorded.

Everything that a later change of names can touch stands here: the overrides in the tables, the files' names and keys in `read`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from safetensors.numpy import load_file

STEPS, SAVED = 8, 5  # the resumed run goes on after SAVED, within its second epoch and one step before an evaluation

COMMON = [
    "seed=3", "run.dir={root}/{name}", "model.path={inputs}/model", "model.tokenizer=bytes", "data.max_length=176",
    "cache.dir={root}/cache", "cache.num_procs=1", "train.batch_size=6", f"train.max_steps={STEPS}", "optim.lr=4e-3",
    "evaluation.every=3", "evaluation.batch_size=4", "evaluation.splits=[validation,test]", "evaluation.samples=0",
    f"checkpoint.every={SAVED}", f"checkpoint.keep_last={STEPS}", "backend.device=cpu", "kernels=reference",
    "report.enabled=false",
]  # fmt: skip
OBJECTIVES = {
    "pretrain": ["objective=pretrain", "data.train={inputs}/texts.txt", "data.test={inputs}/texts_test.txt",
                 "data.max_length=96", "data.validation_share=0.2"],
    "sft": ["objective=sft", "data.train={inputs}/prompts.jsonl", "data.validation={inputs}/prompts_test.jsonl"],
    "classify": ["objective=classify", "data.train={inputs}/labels.jsonl", "data.validation={inputs}/labels_test.jsonl",
                 "evaluation.metric=accuracy"],
    "classify_token": ["objective=classify_token", "data.train={inputs}/labels.jsonl", "data.validation_share=0.2",
                       "data.test={inputs}/labels_test.jsonl", "objective.prompt='{text} ='"],
}  # fmt: skip
METHODS = {
    "full": ["method=full"],
    "lora": ["method=lora", "method.rank=4", "method.alpha=8"],
}
SOURCES = [
    "data.train=null", "data.sources.prompts.path={inputs}/prompts.jsonl", "data.sources.prompts.weight=3",
    "data.sources.prompts.loss_weight=0.5", "data.sources.chats.path={inputs}/chats.jsonl", "data.sources.chats.weight=2",
]  # fmt: skip
PACKED = ["data.packing=best_fit", "data.max_length=160", "data.pack_window=16", "train.batch_size=4"]
SPLIT = ["train.micro_batch_size=2"]  # three micro-batches a step: of two ranks one has an empty one


@dataclass(frozen=True)
class Run:
    """One run; `resumed` says on which backend and how many ranks it goes on, after its second half was taken away."""

    objective: str
    method: str
    backend: str = "single"
    more: tuple[str, ...] = ()
    resumed: tuple[str, int] | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.backend == "single" else 2

    @property
    def dtype(self) -> str:
        """What it computes in: DeepSpeed has no float64."""
        return "float32" if self.backend == "zero3" else "float64"

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.objective}-{self.method}"

    def overrides(self) -> list[str]:
        """With `{inputs}`, `{root}` and `{name}` still to be filled in."""
        own = [f"backend={self.backend}", f"model.dtype={self.dtype}"]
        given = [*COMMON, *OBJECTIVES[self.objective], *METHODS[self.method], *own, *self.more]
        return list({override.partition("=")[0]: override for override in given}.values())  # the last of a key


DROPOUT = "method.dropout=0.1"
RUNS = [
    Run("pretrain", "full", more=("data.stride=16", "data.max_length=64", "optim.schedule=wsd", "optim.warmup_steps=2")),
    Run("pretrain", "lora", more=("method.targets=[q_proj,v_proj]", "method.modules_to_save=[norm]", *SPLIT)),
    Run("sft", "full", more=(*PACKED, *SPLIT)),
    Run("sft", "lora", more=(*SOURCES, *SPLIT, DROPOUT, "export.form=merged", "data.test={inputs}/chats_test.jsonl",
                             "evaluation.samples=2", "generate.max_new_tokens=6")),
    Run("classify", "full", more=("optim.max_grad_norm=0.5", "optim.weight_decay=0.3")),
    Run("classify", "lora", more=(*PACKED, DROPOUT)),
    Run("classify_token", "full", more=(*PACKED, "optim.schedule=linear", "optim.betas=[0.8,0.95]")),
    Run("classify_token", "lora", more=(*SPLIT, DROPOUT, "train.use_best=true")),
    Run("pretrain", "full", "fsdp", more=(*SPLIT,)),
    Run("sft", "lora", "fsdp", more=(*SPLIT, DROPOUT), resumed=("single", 1)),
    Run("classify", "full", "fsdp", more=(*PACKED,)),
    Run("classify_token", "lora", "fsdp", more=(DROPOUT, "backend.accumulate=unsharded", *SPLIT)),
    Run("pretrain", "lora", "zero3", more=(DROPOUT,)),
    Run("sft", "full", "zero3", more=(*SOURCES, *SPLIT)),
    Run("classify", "lora", "zero3", more=(*SPLIT,)),
    Run("classify_token", "full", "zero3", more=(*PACKED, *SPLIT)),
]  # fmt: skip


def train(runs: list[Run], inputs: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Train `runs`, those of a backend in the same processes one after the other; return what `read` finds of each."""
    places = {run.name: {"inputs": str(inputs), "root": str(root), "name": run.name} for run in runs}
    cells = {run.name: [_fill(o, places[run.name]) for o in run.overrides()] for run in runs}
    for backend in ("single", "fsdp"):
        if together := [run for run in runs if run.backend == backend]:
            _start([cells[run.name] for run in together], root, together[0].ranks)
    for run in runs:
        if run.backend == "zero3":  # DeepSpeed keeps the process group of its first engine
            _start([cells[run.name]], root, run.ranks)
        if run.resumed is not None:
            backend, count = run.resumed
            _forget(root / run.name)
            said = _start([[*cells[run.name], f"backend={backend}", "run.resume=require"]], root, count)
            assert f"step {SAVED} of {STEPS}" in said, f"{run.name} did not go on from step {SAVED}:\n{said}"
    return {run.name: read(root / run.name) for run in runs}


def _fill(override: str, places: dict[str, str]) -> str:
    for key, value in places.items():
        override = override.replace(f"{{{key}}}", value)
    return override


def _forget(directory: Path) -> None:
    """Take away what a run saved after step SAVED, as if it had been killed there."""
    for path in (directory / "checkpoints").iterdir():
        if path.is_dir() and int(path.name.rpartition("-")[2]) > SAVED:
            shutil.rmtree(path)


def _start(cells: list[list[str]], root: Path, ranks: int) -> str:
    job = harness.start_many(cells, root / "logs", ranks, {"OMP_NUM_THREADS": "1"})
    codes = job.wait()
    assert codes == [0] * ranks, f"exit {codes}\n{job.output()}"
    return job.output()


def read(directory: Path) -> dict[str, Any]:
    """A run's figures: a column for each of its steps, its evaluations, base against tuned, what was said, the export."""
    steps = harness.rows(directory, "metrics.jsonl")
    summary = json.loads((directory / "summary.json").read_text())
    kept = {"step", "loss", "grad_norm", "lr", "batch", "label_tokens"}  # and loss/<source>
    keys = [k for k in dict.fromkeys(k for row in steps for k in row) if k in kept or k.startswith("loss/")]
    said = json.loads((directory / "samples.json").read_text())
    return {
        "steps": {key: [row.get(key) for row in steps] for key in keys},
        "evaluations": harness.rows(directory, "evaluations.jsonl"),
        "final": summary["eval"],
        "samples": [[row["base"], row["tuned"]] for row in said],
        "export": {path.name: _sums(path) for path in sorted((directory / "export").rglob("*.safetensors"))},
    }


def _sums(path: Path) -> dict[str, list[Any]]:
    """Of each tensor its shape, and the sums of what is above and below zero, each element times its place from 0 to 1.

    Nothing cancels in such a sum, so that it can be compared relatively; a change of sign, place or value changes it.
    """
    found: dict[str, list[Any]] = {}
    for name, tensor in sorted(load_file(path).items()):
        flat = tensor.astype(np.float64).ravel() * (np.arange(1, tensor.size + 1) / tensor.size)
        above, below = flat[flat > 0], -flat[flat < 0]
        found[name] = ["x".join(map(str, tensor.shape)), float(above.sum()), float(below.sum())]
    return found
