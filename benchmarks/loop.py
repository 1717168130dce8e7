"""The loop's own cost: Tritune's step beside a bare PyTorch loop and transformers.Trainer, on the same model and batches.

    python benchmarks/loop.py [--sizes 656k 20m] [--rounds 12] [--trl-python PYTHON] [--out FILE]

Step times are measured in one process, in turn: ten steps of the one, ten of the other, `--rounds` times (three steps and half
as many rounds for 20m). A round compares the fastest step of each, the one that other work disturbed least; what is reported is
the median over rounds. Every step
counts whole: batch, forward, backward, clipping, update, schedule, logging of each step. The bare loop is what one writes in an
afternoon: transformers' model and its own loss, AdamW, clipping, cosine schedule, batches collated beforehand.

The time from the command to the first step is that of whole processes on data read before, so that files are in the system's
cache; TRL's SFTTrainer runs under `--trl-python` (an interpreter that has trl), and is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BATCH, LENGTH, LR, MAX_NORM = 16, 128, 1e-4, 1.0
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads
    "656k": (2048, 128, 384, 2, 8),
    "20m": (16384, 384, 1024, 8, 8),
}
FIRST_STEP_TRL = """
import sys, time
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
class First(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("first step", time.time(), flush=True)
model, data, out = sys.argv[1:4]
args = SFTConfig(output_dir=out, max_steps=1, per_device_train_batch_size=16, max_length=256, report_to=[], use_cpu=True,
                 save_strategy="no", bf16=False)
tokenizer = AutoTokenizer.from_pretrained(model)
SFTTrainer(model=AutoModelForCausalLM.from_pretrained(model), args=args, processing_class=tokenizer, callbacks=[First()],
           train_dataset=load_dataset("json", data_files=data, split="train")).train()
"""


def model_overrides(size: str) -> list[str]:
    vocab, hidden, intermediate, layers, heads = SHAPES[size]
    settings = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
    }  # fmt: skip
    return ["model=tiny", *(f"model.config.{k}={v}" for k, v in settings.items())]


def write_text(path: Path, tokens: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    path.write_text(" ".join(rng.choices(words, k=tokens // 4)) + "\n")


def build_run(size: str, folder: Path, steps: int) -> Any:
    """Tritune's `Run`, ready for `fit`."""
    from tritune.trainer.build import build
    from tritune.trainer.config.compose import load_config
    from tritune.trainer.metrics.progress import Progress
    from tritune.trainer.parallel import distributed
    from tritune.trainer.run.directory import RunDir
    from tritune.trainer.run.pulse import Pulse
    from tritune.trainer.run.stop import Stop

    text = folder / "text.txt"
    write_text(text, steps * BATCH * LENGTH + 10_000)
    config = load_config([
        *model_overrides(size), "objective=pretrain", f"data.train={text}", f"data.max_length={LENGTH}",
        f"train.batch_size={BATCH}", f"train.max_steps={steps}", f"optim.lr={LR}", f"optim.max_grad_norm={MAX_NORM}",
        "checkpoint.every=1000000", "backend.device=cpu", f"run.dir={folder / 'run'}",
    ])  # fmt: skip
    directory = RunDir(folder / "run")
    directory.acquire()
    quiet = Progress(True, stream=open(os.devnull, "w"))  # noqa: SIM115
    limits = config.launch
    pulse = Pulse(0, limits.quiet_seconds, limits.hang_factor, limits.hang_seconds)
    return build(config, distributed.start(config.backend, False), directory, quiet, Stop(), pulse)


def fresh_model(run: Any) -> torch.nn.Module:
    """The same architecture and weights, apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(run.core.config, attn_implementation="sdpa")
    model.load_state_dict(run.core.state_dict())
    return model.train()


def all_batches(run: Any) -> list[torch.Tensor]:
    """The run's batches in its order, as plain tensors [B, T]."""
    from tritune.trainer.data.loader import collate
    from tritune.trainer.data.order import epoch_order

    train = run.splits["train"]
    order = epoch_order(len(train), run.config.seed, 0)
    rows = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    return [collate(train, r, run.loader.dealer.pad_id).input_ids for r in rows]


class Bare:
    """A bare PyTorch loop that can be run a few steps at a time."""

    def __init__(self, model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
        self.model, self.batches, self.at = model, batches, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, len(batches))

    def steps(self, count: int) -> list[float]:
        """Seconds of each of the next `count` steps."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            ids = self.batches[self.at % len(self.batches)]
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            loss.item()
            self.at += 1
            times.append(time.perf_counter() - began)
        return times


class InTurn:
    """Times the steps of a loop that asks for batches, and lets the bare loop run between blocks of them."""

    def __init__(self, bare: Bare, block: int, rounds: int) -> None:
        self.bare, self.block, self.rounds = bare, block, rounds
        self.mine: list[float] = []
        self.pairs: list[tuple[float, float]] = []  # fastest of a round: the loop's, the bare loop's

    def step(self, seconds: float) -> None:
        self.mine.append(seconds)
        if len(self.mine) == self.block:
            self.pairs.append((min(self.mine), min(self.bare.steps(self.block))))
            self.mine = []

    def result(self) -> dict[str, float]:
        pairs = self.pairs[1:]  # the first round warms both up
        return {
            "ms": 1000 * statistics.median(a for a, _ in pairs),
            "bare_ms": 1000 * statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }


class Timed:
    """A run's loader that times what happens between its batches: Tritune's whole step."""

    def __init__(self, loader: Any, turns: InTurn) -> None:
        self._loader, self._turns = loader, turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self._turns.step(time.perf_counter() - began)


def tritune_steps(run: Any, turns: InTurn) -> dict[str, float]:
    from tritune.trainer.loop import fit

    run.loader = Timed(run.loader, turns)
    fit(run)
    return turns.result()


def trainer_steps(
    run: Any, model: torch.nn.Module, batches: list[torch.Tensor], turns: InTurn, folder: Path, steps: int
):
    """transformers.Trainer on the same rows, with its defaults but for what would differ in the work."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = torch.cat(batches)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"input_ids": rows[i], "labels": rows[i]}

    class Clock(TrainerCallback):
        since = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step(time.perf_counter() - self.since)
            self.since = time.perf_counter()

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR,
        max_grad_norm=MAX_NORM, lr_scheduler_type="cosine", report_to=[], save_strategy="no", use_cpu=True,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    kept = sys.stdout
    with open(os.devnull, "w") as quiet:
        sys.stdout = quiet
        try:
            Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
        finally:
            sys.stdout = kept
    return turns.result()


def step_times(size: str, rounds: int, block: int) -> dict[str, Any]:
    steps = (rounds + 1) * block
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = build_run(size, folder, steps)
        batches = all_batches(run)
        row: dict[str, Any] = {"size": size, "parameters": sum(p.numel() for p in run.core.parameters())}
        other = fresh_model(run)
        row["tritune"] = tritune_steps(run, InTurn(Bare(fresh_model(run), batches), block, rounds))
        row["trainer"] = trainer_steps(run, other, batches, InTurn(Bare(fresh_model(run), batches), block, rounds),
                                       folder, steps)  # fmt: skip
        run.directory.close()
    return row


def first_step(trl_python: str | None, repeats: int = 3) -> dict[str, Any]:
    """Seconds from starting a process to the end of its first step, median of `repeats` after one that is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        rng = random.Random(0)
        words = ["red", "cat", "house", "green", "walks", "over", "the", "hill"]
        rows = [{"prompt": " ".join(rng.choices(words, k=12)), "completion": " ".join(rng.choices(words, k=12))}
                for _ in range(512)]  # fmt: skip
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        make = [sys.executable, "-m", "tritune.trainer", *model_overrides("656k"), f"data.train={data}",
                "model.config.max_position_embeddings=256", "data.max_length=256",
                "train.max_steps=1", "backend.device=cpu", f"run.dir={folder / 'made'}", f"export.dir={model}",
                "report.enabled=false"]  # fmt: skip
        subprocess.run(make, check=True, capture_output=True)
        ours = [sys.executable, "-m", "tritune.trainer", f"model.path={model}", f"data.train={data}",
                "data.max_length=256", "train.batch_size=16", "train.max_steps=1", "backend.device=cpu",
                "export.enabled=false", "report.enabled=false"]  # fmt: skip
        result: dict[str, Any] = {}
        times = []
        for i in range(repeats + 1):
            began = time.time()
            out = subprocess.run([*ours, f"run.dir={folder / f'run{i}'}"], check=True, capture_output=True, text=True)
            logged = (folder / f"run{i}" / "metrics.jsonl").stat().st_mtime
            assert "step 1/1" in out.stderr
            times.append(logged - began)
        result["tritune_seconds"] = statistics.median(times[1:])
        if trl_python:
            times = []
            for i in range(repeats + 1):
                began = time.time()
                command = [trl_python, "-c", FIRST_STEP_TRL, str(model), str(data), str(folder / f"trl{i}")]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                line = next(x for x in out.stdout.splitlines() if x.startswith("first step"))
                times.append(float(line.split()[-1]) - began)
            result["trl_seconds"] = statistics.median(times[1:])
            asked = (
                "import trl, transformers, torch; print(trl.__version__, transformers.__version__, torch.__version__)"
            )
            found = subprocess.run([trl_python, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
            result["trl_versions"] = dict(zip(("trl", "transformers", "torch"), found[-3:], strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--trl-python", help="an interpreter that has trl")
    parser.add_argument("--no-first-step", action="store_true")
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    args = parser.parse_args()
    import transformers

    rows = []
    for size in args.sizes:
        small = size == "656k"
        rows.append(step_times(size, args.rounds if small else -(-args.rounds // 2), 10 if small else 3))
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "benchmark": "loop",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/loop.py " + " ".join("PATH" if "/" in a else a for a in sys.argv[1:]),
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "batch": {"sequences": BATCH, "tokens": LENGTH},
        "steps": rows,
        "first_step": None if args.no_first_step else first_step(args.trl_python),
    }  # fmt: skip
    print(json.dumps(record["first_step"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
