"""Before and after training: score base and tuned, let both answer, write the result, the summary and the report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.overrides import override
from tritune.trainer.errors import CheckpointError, ExportError, InputError, reason
from tritune.trainer.evaluation.abstention import outcomes, settle, told
from tritune.trainer.evaluation.predictions import Recorder
from tritune.trainer.evaluation.samples import Sample, answer, answer_by_label, pick
from tritune.trainer.evaluation.table import base_against_tuned
from tritune.trainer.export import Exported, Source, export
from tritune.trainer.loop import Run, score
from tritune.trainer.model.load import room_in
from tritune.trainer.objectives.loss import Objective, text_loss
from tritune.trainer.parallel.distributed import World
from tritune.trainer.run.directory import export_path, now
from tritune.trainer.run.files import read_json
from tritune.trainer.tracking import under
from tritune.trainer.trained import source_of

Scores = dict[str, dict[str, float]]


def score_base(run: Run) -> Scores:
    """Score the untouched model on the held-out splits, once; a run that goes on reads what it wrote at its start."""
    kept = None
    with run.world.raise_on_all("reading base.json"):
        if run.world.rank == 0:
            kept = _kept_base(run.directory.path / "base.json")
    kept = run.world.gather(kept)[0]
    if kept is not None:
        absent = [n for n in run.config.evaluation.splits if n in run.splits and n not in kept]
        if absent and run.config.evaluation.base:
            run.progress.say(
                f"evaluate  base.json has no figures of {', '.join(absent)}: the result has none of the base model"
            )
        return kept
    if not run.config.evaluation.base or run.state.step > 0:
        return {}
    base, samples = _score(run, "base"), _sample(run, "base")
    with run.world.raise_on_all("writing base.json"):
        if run.world.rank == 0:
            run.directory.write_json("samples.json", samples)
            run.directory.write_json("base.json", base)
    return base


def _kept_base(path: Path) -> Scores | None:
    remedy = "Move it away: without it the result has no figures of the base model"
    kept = read_json(path, dict, remedy)
    for figures in (kept or {}).values():
        if not isinstance(figures, dict) or not all(type(v) in (int, float, type(None)) for v in figures.values()):
            raise InputError(str(path), "the file is spoilt (it holds no figures)", remedy)
    return kept


def finish(run: Run, base: Scores) -> None:
    """Score the tuned model, print base against tuned, export, write `summary.json`, `samples.json` and `report.html`."""
    config, state = run.config, run.state
    step = _use_best(run)
    recorders: dict[str, Recorder] = {}
    tuned, samples = _score(run, "tuned", recorders), _sample(run, "tuned")
    abstain = _abstention(run, recorders, tuned)
    results = {name: {"base": base.get(name), "tuned": figures} for name, figures in tuned.items()}
    if results:
        run.progress.say(base_against_tuned(results, {n: len(run.splits[n]) for n in results}))
    with run.world.raise_on_all("exporting the model"):
        if run.world.rank == 0:
            run.directory.write_json("samples.json", samples)
            trainable, total = run.parameters
            summary: dict[str, Any] = {
                "status": "done",
                "time": now(),
                "step": state.step,
                "tested_step": step,
                "tokens": state.tokens,
                "label_tokens": state.label_tokens,
                "train_seconds": round(state.train_seconds, 3),
                "skipped_steps": state.skipped,
                "stopped_early": state.step < run.loader.total_steps,
                "parameters": {"trainable": trainable, "total": total},
                "best": {"metric": config.evaluation.metric, "value": state.best, "step": state.best_step},
                "eval": results,
                "abstain": abstain,
                "lineage": run.lineage,
            }
            run.directory.write_json("summary.json", {**summary, "export": None})
            run.pulse.phase("export")
            exported, failed = _try_export(run, summary) if config.export.enabled else (None, None)
            summary |= {"export": exported, "export_bytes": exported and exported.get("num_bytes")}
            run.directory.write_json("summary.json", summary)
            for sink in run.sinks:
                sink.summary(under("", results))
            if config.report.enabled:
                run.pulse.phase("report")
                from tritune.trainer.report import write_report  # matplotlib takes most of a second to import

                run.progress.say(f"report    {write_report(run.directory.path)}")
            if failed is not None:
                raise failed


def _use_best(run: Run) -> int:
    """Load the best checkpoint where the run is to end with it; return the step whose weights are tested."""
    state = run.state
    if not run.config.train.use_best or state.best_step in (None, state.step):
        return state.step
    found = run.store.at(state.best_step)
    if found is None:
        remedy = "Restore it, or end with the last weights: train.use_best=false"
        raise CheckpointError(f"the best checkpoint, step {state.best_step}, is gone from {run.store.root}. {remedy}")
    run.store.load(found, run.backend.tensors())
    run.backend.refresh()
    run.progress.say(f"best      step {state.best_step}, {run.config.evaluation.metric} {state.best:.4f}")
    return state.best_step


def _try_export(run: Run, facts: dict[str, Any]) -> tuple[dict[str, Any], ExportError | None]:
    """Export; where that fails, say why and how to go on, and let everything else of the run be finished."""
    try:
        return _export(run, facts), None
    except Exception as error:  # noqa: BLE001  whatever it is, the trained weights stand in the checkpoint
        why = str(error) if isinstance(error, InputError | ExportError) else reason(error)
        again = f"tritune export {shlex.quote(override('run.dir', str(run.directory.path)))}"
        failed = ExportError(
            f"the export failed, and the run did not: {why.removesuffix('.')}. The trained weights are the checkpoint of "
            f"step {facts['tested_step']}; `{again}` tries again, with export.form=merged or adapter, export.dtype=float32, "
            "another export.dir, or export.insist=true where what is read back differs"
        )
        failed.asked_wrongly = isinstance(error, InputError)
        run.progress.say(f"tritune: {failed}")
        return {"error": str(failed)}, failed


def _export(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """On rank 0. Where no rank has the masters, they are read from the checkpoint, one tensor at a time."""
    run.model.eval()
    if run.backend.whole:
        source = Source(run.config, run.core, run.scorer.logits, run.tokenizer, run.heads, run.labels, facts)
    else:
        config = replace(run.config, checkpoint=replace(run.config.checkpoint, step=facts["tested_step"]))
        source = source_of(config, run.directory.path, World(0, 1, torch.device("cpu")), facts)
    done: Exported = export(source, export_path(run.config.export.dir, run.directory.path), run.progress.say)
    return done.to_json()


def _abstention(run: Run, recorders: dict[str, Recorder], tuned: Scores) -> dict[str, Any] | None:
    """Choose the threshold below which a classifier abstains, and add to each split's figures what it comes to there."""
    found = {name: outcomes(kept, run.splits[name], run.backend) for name, kept in recorders.items()}
    if not found:
        return None
    abstain = settle(found, run.config.evaluation.abstain)
    for name, figures in abstain["splits"].items():
        tuned[name] |= figures
    if (line := told(abstain)) is not None:
        run.progress.say(line)
    return abstain


def _score(run: Run, who: str, recorders: dict[str, Recorder] | None = None) -> Scores:
    """Score the splits; into `recorders` goes what a classifier makes of each of their rows."""
    scores = {}
    for name in run.config.evaluation.splits:
        if name in run.splits:
            run.progress.say(f"evaluate  {who} on {name} ({len(run.splits[name]):,} rows)")
            objective: Objective = text_loss(run.tokenizer) if name == "retention" else run.objective
            if recorders is not None and run.labels and name != "retention":
                objective = recorders[name] = Recorder(objective)
            scores[name] = score(run, objective, name)
    return scores


def _sample(run: Run, who: str) -> list[dict[str, Any]]:
    """Let the model answer some held-out rows; join what was said before to it."""
    split = next((n for n in ("test", "validation") if n in run.splits), None)
    if split is None or not run.config.evaluation.samples:
        return []
    with run.world.raise_on_all("choosing rows to answer"):
        samples = pick(run.splits[split], run.config.evaluation.samples, run.tokenizer, run.labels)
    was_training = run.model.training
    run.model.eval()
    said = _answers(run, split, samples)
    run.model.train(was_training)
    before = _kept_answers(run)
    rows = []
    for sample, text in zip(samples, said, strict=True):
        old = before.get((split, sample.place), {})
        row = {"split": split, "place": sample.place, "prompt": sample.prompt, "reference": sample.reference}
        rows.append({**row, "base": old.get("base"), "tuned": None, who: text})
    return rows


def _kept_answers(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """What was answered before, by split and place. Training is over: a spoilt file costs no more than what it held."""
    if run.world.rank != 0:
        return {}
    try:
        kept = read_json(run.directory.path / "samples.json", list, "") or []
        return {(row["split"], row["place"]): row for row in kept}
    except (InputError, LookupError, TypeError):
        run.progress.say("samples   samples.json is spoilt: what the base model answered is left out")
        return {}


def _answers(run: Run, split: str, samples: list[Sample]) -> list[str]:
    config, device = run.config, run.backend.device
    if run.config.objective.learns is Learns.labels:
        args = (run.splits[split], run.model, run.objective, run.labels, run.loader.dealer.pad_id, device)
        return answer_by_label(samples, *args)
    return answer(samples, run.core, run.scorer.generate, run.tokenizer, config.generate, run.stops, device,
                  room_in(run.core), config.model.dtype.value == "float64")  # fmt: skip
