"""How long the loop stands still for a checkpoint: written in the background against written on the spot.

    python benchmarks/saving.py [--ranks 2] [--size 50m] [--saves 6] [--every 3] [--backends fsdp zero2]

Two runs of `tritune.trainer` per backend, alike but for `checkpoint.asynchronous`, train every parameter of the same random
Llama (state: float32 masters and two moments, 12 bytes a parameter) and save every `--every` steps. The stall is the time that
`loop.save` takes in the loop, on the slowest rank: logs to disk, the copy or the writing, what ranks agree on. Of it
`store` is `CheckpointStore.save` alone, and `waited` what that waited for the save before it (the last save's is the wait at
the end of the run). Reported is the median without the first save, in which the background's buffers are allocated; the first
stands apart. The bound: asynchronous / on the spot <= 0.10. Steps during which a save was being written are timed apart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from record import run_ranks, write_record
from train import SIZES, save_llama, write_text
from tritune.launch.processes import preload

BOUND = 0.10
BATCH, LENGTH = 2, 32


def train(overrides: list[str]) -> dict[str, Any]:
    """In a rank: train, and return the seconds of its saves and steps."""
    from tritune.trainer import loop
    from tritune.trainer.__main__ import main
    from tritune.trainer.checkpoint.background import Background
    from tritune.trainer.checkpoint.store import CheckpointStore

    saves: list[dict[str, float]] = []
    steps: list[dict[str, Any]] = []
    writes: list[float] = []
    since = [time.perf_counter(), False]  # the last step's end, and whether a save was being written then

    def writing(run: Any) -> bool:
        background = run.store._background
        return background is not None and background._thread is not None and background._thread.is_alive()

    def log_step(run: Any, *args: Any) -> None:
        log_whole(run, *args)
        steps.append({"seconds": time.perf_counter() - since[0], "during_save": since[1] or writing(run)})
        since[:] = time.perf_counter(), writing(run)

    def save(run: Any) -> None:
        run.world.gather(None)  # ranks come at different times; who waits for whom is no part of a save
        saves.append({"waited": 0.0})
        began = time.perf_counter()
        save_whole(run)
        saves[-1]["stall"] = time.perf_counter() - began
        since[:] = time.perf_counter(), writing(run)

    def store_save(self: Any, *args: Any) -> None:
        began = time.perf_counter()
        store_whole(self, *args)
        saves[-1]["store"] = time.perf_counter() - began

    def write(self: Any, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        write_whole(self, *args, **kwargs)
        writes.append(time.perf_counter() - began)

    def wait(self: Any) -> None:
        began = time.perf_counter()
        wait_whole(self)
        saves[-1]["waited"] += time.perf_counter() - began

    log_whole, save_whole = loop.log_step, loop.save
    store_whole, write_whole, wait_whole = CheckpointStore.save, CheckpointStore._save, Background.wait
    loop.log_step, loop.save = log_step, save
    CheckpointStore.save, CheckpointStore._save, Background.wait = store_save, write, wait
    code = main(overrides)
    if code:
        raise SystemExit(code)
    return {"saves": saves, "steps": steps[1:], "writes": writes}


def measure(backend: str, asynchronous: bool, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    directory = folder / "run"
    overrides = [
        f"model.path={folder / 'model'}", f"data.train={folder / 'text.txt'}", "objective=pretrain", "method=full",
        f"data.max_length={LENGTH}", f"train.batch_size={BATCH}", f"train.max_steps={args.saves * args.every}",
        f"checkpoint.every={args.every}", f"checkpoint.asynchronous={str(asynchronous).lower()}", f"backend={backend}",
        "backend.device=cpu", "evaluation.base=false", "evaluation.samples=0", "evaluation.splits=[]",
        "export.enabled=false", "report.enabled=false", f"run.dir={directory}",
    ]  # fmt: skip
    ranks = run_ranks(train, (overrides,), args.ranks, folder / "logs", timeout=600.0)
    newest = max((directory / "checkpoints").glob("step-*"))
    size = sum(f.stat().st_size for f in newest.iterdir())
    shutil.rmtree(directory)
    slowest = [
        {k: max(r["saves"][i][k] for r in ranks) for k in ("stall", "store", "waited")} for i in range(args.saves)
    ]
    steps = ranks[0]["steps"]
    return {
        "checkpoint_bytes": size,
        "first_stall_seconds": slowest[0]["stall"],
        "stall_seconds": statistics.median(s["stall"] for s in slowest[1:]),
        "store_seconds": statistics.median(s["store"] for s in slowest[1:]),
        "waited_seconds": statistics.median(s["waited"] for s in slowest[1:]),
        "write_seconds": statistics.median(ranks[0]["writes"]),
        "step_seconds": _median([s["seconds"] for s in steps if not s["during_save"]]),
        "step_seconds_during_save": _median([s["seconds"] for s in steps if s["during_save"]]),
        "saves": slowest,
        "steps": steps,
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=list(SIZES), default="50m")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--every", type=int, default=3, help="steps between saves: long enough for one to be written")
    parser.add_argument("--backends", nargs="+", default=["fsdp", "zero2"])
    args = parser.parse_args()
    preload(on_cpu=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_llama(folder / "model", args.size, LENGTH)
        write_text(folder / "text.txt", (args.saves * args.every + 2) * BATCH * LENGTH * 2)
        for backend in args.backends:
            row: dict[str, Any] = {"backend": backend}
            row["on_the_spot"], row["asynchronous"] = (measure(backend, a, args, folder) for a in (False, True))
            row["ratio"] = row["asynchronous"]["stall_seconds"] / row["on_the_spot"]["stall_seconds"]
            row["holds"] = row["ratio"] <= BOUND
            rows.append(row)
            for kind in ("on_the_spot", "asynchronous"):
                short = {k: v for k, v in row[kind].items() if k not in ("saves", "steps")}
                print(backend, kind, {k: v if v is None else round(v, 3) for k, v in short.items()}, flush=True)
            print(f"{backend}  ratio {row['ratio']:.3f}", flush=True)
    write_record(
        "saving", {"parameters": parameters, "ranks": args.ranks, "every": args.every, "bound": BOUND, "backends": rows}
    )


if __name__ == "__main__":
    main()
