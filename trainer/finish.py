"""Before and after training: score base and tuned, write the result and the summary."""

from __future__ import annotations

from tritune.trainer.errors import CheckpointError
from tritune.trainer.evaluation.evaluate import evaluate
from tritune.trainer.evaluation.table import base_against_tuned
from tritune.trainer.export import export
from tritune.trainer.loop import Run
from tritune.trainer.methods.lora import lora_layers
from tritune.trainer.model import count_parameters
from tritune.trainer.objectives import Objective
from tritune.trainer.objectives.language_model import LanguageModel

SCORED = ("validation", "test", "retention")


def score_base(run: Run) -> dict[str, dict[str, float]]:
    """Score the untouched model on the held-out splits, once; a run that goes on reads what it wrote at its start."""
    kept = run.directory.read_json("base.json") if run.world.rank == 0 else None
    kept = run.world.gather(kept)[0]
    if kept is not None:
        return kept
    if not run.config.evaluation.base or run.state.step > 0:
        return {}
    base = _score(run, "base")
    with run.world.together("writing base.json"):
        if run.world.rank == 0:
            run.directory.write_json("base.json", base)
    return base


def finish(run: Run, base: dict[str, dict[str, float]]) -> None:
    """Score the tuned model, print base against tuned, export, write `summary.json`."""
    config, state = run.config, run.state
    step = state.step
    if config.train.use_best and state.best_step not in (None, state.step):
        found = run.store.at(state.best_step)
        if found is None:
            raise CheckpointError(f"the best checkpoint, step {state.best_step}, is gone from {run.store.root}")
        run.store.load(found, run.backend.tensors())
        step = state.best_step
        run.progress.say(f"best      step {step}, {config.evaluation.metric} {state.best:.4f}")
    tuned = _score(run, "tuned")
    results = {name: {"base": base.get(name), "tuned": figures} for name, figures in tuned.items()}
    if results:
        run.progress.say(base_against_tuned(results, {n: len(run.splits[n]) for n in results}))
    size = None
    if run.world.rank == 0:
        if config.checkpoint.export:
            size = export(run.directory.path / "export", config, run.core, run.tokenizer, run.heads)
            kind = "adapter" if lora_layers(run.core) else "model"
            run.progress.say(f"export    {kind}, {size:,} bytes of weights: {run.directory.path / 'export'}")
        trainable, total = count_parameters(run.core)
        summary = {
            "status": "done",
            "step": state.step,
            "tested_step": step,
            "tokens": state.tokens,
            "label_tokens": state.label_tokens,
            "train_seconds": round(state.train_seconds, 3),
            "skipped_steps": state.skipped,
            "stopped_early": state.step < run.loader.total_steps,
            "parameters": {"trainable": trainable, "total": total},
            "export_bytes": size,
            "best": {"metric": config.evaluation.metric, "value": state.best, "step": state.best_step},
            "eval": results,
        }
        run.directory.write_json("summary.json", summary)


def _score(run: Run, who: str) -> dict[str, dict[str, float]]:
    scores = {}
    for name in SCORED:
        if name in run.splits:
            run.progress.say(f"evaluate  {who} on {name} ({len(run.splits[name]):,} rows)")
            objective: Objective = LanguageModel() if name == "retention" else run.objective
            scores[name] = evaluate(objective, run.model, run.splits[name], run.backend,
                                    run.config.evaluation.batch_size, run.loader.pad_id)  # fmt: skip
    return scores
