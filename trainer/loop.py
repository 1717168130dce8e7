"""`fit`: the training loop, to be read as a page. What its parts do is one hop away."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.backends import Backend
from tritune.trainer.checkpoint.store import CheckpointStore
from tritune.trainer.config import Config
from tritune.trainer.config.check import metrics_of
from tritune.trainer.config.identity import identity_of
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.loader import Loader
from tritune.trainer.errors import NonFiniteError, StopRequested
from tritune.trainer.evaluation.choices import Choices
from tritune.trainer.evaluation.evaluate import evaluate
from tritune.trainer.metrics.meter import Meter
from tritune.trainer.metrics.progress import Progress
from tritune.trainer.metrics.standstill import Standstill
from tritune.trainer.model.optim import learning_rate, peak_rate, warmup_steps
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.objectives.loss import Objective, StepContext, means_by_source, scaled, window_weights
from tritune.trainer.parallel.distributed import World, generator_digest, seed_forward
from tritune.trainer.run.directory import RunDir
from tritune.trainer.run.identity import placeless
from tritune.trainer.run.pulse import Pulse
from tritune.trainer.run.state import Due, TrainState
from tritune.trainer.run.stop import Stop
from tritune.trainer.tracking import Sink, under


@dataclass
class Run:
    """Everything that `fit` needs, built by `build.py`.

    Attributes:
        model: what is called: the scorer, as the backend wrapped it.
        scorer: the scorer itself; core: the Hugging Face model inside it, for export.
        heads: modules of it that are new.
        splits: tokenized rows by name: train, validation, test, retention.
        choices: of the splits among whose rows' answers one is chosen (`evaluation.choices`).
        labels: of a classifier; stops: ids that end an answer.
        parameters: how many train, and all.
        lineage: the adapter that it went on from, as it was when the run began; None where it began with a whole model.
        pulse: signs of life, for the launcher's watchdog.
        sinks: where figures go beside the run directory; only on rank 0.
    """

    config: Config
    world: World
    backend: Backend
    objective: Objective
    model: nn.Module
    scorer: TokenScorer
    core: PreTrainedModel
    heads: list[str]
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Examples]
    choices: dict[str, Choices]
    labels: list[str]
    stops: list[int]
    parameters: tuple[int, int]
    lineage: dict[str, Any] | None
    loader: Loader
    store: CheckpointStore
    state: TrainState
    due: Due
    meter: Meter
    progress: Progress
    directory: RunDir
    stop: Stop
    pulse: Pulse
    sinks: list[Sink]
    warned: bool = False  # of saves that take too long


def fit(run: Run) -> str | None:
    """Train from where `run.state` stands; return the signal that stopped the run, or None when it came to its end.

    Raises:
        NonFiniteError: too many steps in a row had no finite gradient.
        CheckpointError: a checkpoint could not be written.
        DamagedRows: the rows of the next step changed on the disk.
    """
    config, state, backend, objective = run.config, run.state, run.backend, run.objective
    if "validation" in run.splits and run.due.evaluate(state.step) and state.evaluated < state.step:
        validate(run)  # the run was stopped before it came to this
        if (stopping := run.stop.agreed(run.world)) is not None:
            return stopping
    if out_of_patience(config.train.patience, state):  # this run had stopped early before it was started again
        return None
    run.model.train()
    run.meter.start()
    standstill = Standstill(state.step, run.loader.total_steps, warmup_steps(config.optim, run.loader.total_steps))
    stopping = None
    began = time.perf_counter() - state.train_seconds
    for window in run.loader:  # one optimizer step
        lr = learning_rate(config.optim, state.step, run.loader.total_steps)
        context, updates = StepContext(state.step + 1, config.seed, run.model), []
        for micro_batches in objective.prepare(context, window):  # one update; most objectives make one of a window
            # -- count first, then scale: the loss is a sum over the whole update divided by the whole update's weight
            weights = backend.sum(window_weights(objective, micro_batches))
            for i, batch in enumerate(micro_batches):
                seed_forward(config.seed, batch.step, batch.index)
                with backend.sync(last=i == len(micro_batches) - 1):
                    loss = objective(run.model, batch)
                    backend.backward(scaled(objective, loss, weights, backend.dp_size))
                run.meter.add(loss, batch)
            found = run.meter.step(objective, weights, backend.grad_norm())  # the one wait for the device
            norm = backend.step(config.optim.max_grad_norm, lr, found.norm, refuse=not math.isfinite(found.loss))
            updates.append((found.loss, norm))
            state.tokens, state.label_tokens = state.tokens + found.tokens, state.label_tokens + found.label_tokens
        run.loader.advance()
        mean_loss, grad_norm = (sum(values) / len(values) for values in zip(*updates, strict=True))
        count_nonfinite(run, mean_loss, grad_norm, window)
        warn_of_standstill(run, standstill.add(mean_loss))
        stopping = run.stop.agreed(run.world, run.loader.fault())

        # -- log, evaluate, save when due
        if run.due.log(state.step):
            log_step(run, mean_loss, grad_norm, lr)
        improved = False
        if "validation" in run.splits and run.due.evaluate(state.step) and not stopping:
            before = time.perf_counter()
            improved = validate(run)
            stopping = run.stop.agreed(run.world)
            paused = time.perf_counter() - before
            run.meter.pause(paused)
            run.progress.pause(paused)
            began += paused
        state.train_seconds = time.perf_counter() - began
        ending = bool(stopping) or out_of_patience(config.train.patience, state)
        if run.due.save(state.step) or improved or ending:
            save(run)
        run.pulse.step(state.step)
        if ending:
            break
    run.pulse.phase("save")
    run.store.wait()
    return stopping


def count_nonfinite(run: Run, loss: float, grad_norm: float, micro_batches: list) -> None:
    """Count steps whose update the backend refused; stop the run when there are too many in a row."""
    state, limit = run.state, run.config.train.max_nonfinite
    if math.isfinite(loss) and math.isfinite(grad_norm):
        state.nonfinite = 0
        return
    state.nonfinite += 1
    state.skipped += 1
    samples = sorted(
        {s for ids in run.world.gather([b.sample_ids.tolist() for b in micro_batches]) for b in ids for s in b}
    )
    places = run.loader.places([s for s in samples if s >= 0][:8])
    message = f"step {state.step}: loss {loss}, gradient norm {grad_norm}; the step was not applied"
    run.progress.say(f"{message} ({state.nonfinite} of {limit} in a row). Rows: {', '.join(places)}")
    if state.nonfinite >= limit:
        run.store.wait()
        raise NonFiniteError(
            f"{message}, nor were the {limit - 1} before it. Lower optim.lr, or look at the rows: {', '.join(places)}"
        )


def warn_of_standstill(run: Run, losses: tuple[float, float] | None) -> None:
    """Say that the loss hardly moved from the one of `losses` to the other, and what to change."""
    if losses is not None:
        rate = peak_rate(run.config.optim)
        text = f"step {run.state.step}: the loss hardly moves, {losses[0]:.4f} at the start and {losses[1]:.4f} now"
        run.progress.say(
            f"{text}. Raise optim.lr, {rate:g} in this run: a new run with optim.lr={10 * rate:g} would show more"
        )


def log_step(run: Run, loss: float, grad_norm: float, lr: float) -> None:
    state = run.state
    row: dict[str, Any] = {"step": state.step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": state.tokens}
    row |= {"label_tokens": state.label_tokens, "epoch": state.epoch, **run.meter.rate()}
    row["data_seconds"] = round(run.loader.waited(), 6)  # of the seconds since the last row
    if state.left_out:
        row["left_out"] = state.left_out
    row |= {name: value for name, value in run.meter.figures.items() if name not in row}
    if run.meter.by_source is not None:
        row |= means_by_source(run.objective.sources.names, run.meter.by_source)
    if run.world.rank == 0:
        row |= {"batch": run.meter.batch, "rng": generator_digest(run.world.device)}
        run.directory.append("metrics.jsonl", row)
        for sink in run.sinks:
            sink.log(state.step, under("train", row))
        run.directory.touch_status(state.step)
    run.progress.step(row, run.loader.total_steps)


def validate(run: Run) -> bool:
    """Score the validation split; return whether it is the best so far.

    A stop that is asked for ends it early: nothing is written down, and the next start makes up for it.
    """
    config, state = run.config, run.state
    run.pulse.phase("evaluate")
    try:
        figures = score(run, run.objective, "validation")
    except StopRequested:
        return False
    metric = config.evaluation.metric
    state.evaluated = state.step
    improved = state.observe(figures[metric], metrics_of(config)[metric].higher_is_better)
    if run.world.rank == 0:
        run.directory.append("evaluations.jsonl", {"step": state.step, "split": "validation", **figures})
        for sink in run.sinks:
            sink.log(state.step, under("validation", figures))
    shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
    run.progress.say(f"step {state.step}  validation  {shown}{'  (best)' if improved else ''}")
    return improved


def score(run: Run, objective: Objective, split: str) -> dict[str, float]:
    """The figures of a split.

    Raises:
        StopRequested: a stop was asked for meanwhile.
        DamagedRows: the split's rows changed on the disk.
    """
    with run.world.raise_on_all(f"reading the rows of {split}"):
        run.splits[split].require_whole()
    return evaluate(objective, run.model, run.splits[split], run.backend, run.config.evaluation.batch_size,
                    run.loader.dealer.pad_id, run.choices.get(split), lambda: run.stop.heed(run.world))  # fmt: skip


def out_of_patience(patience: int | None, state: TrainState) -> bool:
    return patience is not None and state.stale >= patience


def save(run: Run) -> None:
    run.pulse.phase("save")
    with run.world.raise_on_all("writing the logs"):
        run.directory.sync_logs()
    saved = {"train": run.state.to_json(), "data": run.loader.digest, "run": placeless(identity_of(run.config))}
    run.store.save(run.state.step, run.backend.tensors(), saved, run.state.best_step)
    run.directory.save_seconds = run.store.seconds
    warn_of_slow_save(run)


def warn_of_slow_save(run: Run) -> None:
    """Say when a save takes longer than the scheduler waits for one; at the start, and when it first turns out."""
    seconds, grace = run.directory.save_seconds, run.config.launch.grace_seconds
    if seconds is not None and grace is not None and seconds > grace and not run.warned:
        run.warned = True
        run.progress.say(
            f"checkpoint a save took {seconds:.1f} s, and a stop leaves {grace:g} s before the kill: it would come too "
            "late. Raise launch.grace_seconds, or KillWait and GraceTime with your administrator"
        )
