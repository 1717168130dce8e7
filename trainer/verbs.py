"""`tritune evaluate | generate | export | report`: what one reads out of a trained model, in one process.

Each takes the same overrides as `train`. With `run.dir=DIR` the run's own configuration is read and the overrides change it,
`model.path` where its base lies now; without, `model.path` is an export, an adapter or a hub model.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.compose import load_config, split_argv
from tritune.trainer.config.identity import identity_of
from tritune.trainer.config.registry import AXES
from tritune.trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    INPUT_ERRORS,
    CheckpointError,
    ExportError,
    InputError,
    LostConnectionError,
    PeerError,
    of_panic,
    of_surroundings,
)
from tritune.trainer.run.files import read_config, read_json
from tritune.trainer.run.read_back import require_no_blanks, run_named
from tritune.trainer.shown import shown

if TYPE_CHECKING:
    from tritune.trainer.config import Config, GenerateConfig, MethodConfig, ModelConfig
    from tritune.trainer.config.data import DataConfig
    from tritune.trainer.config.identity import Identity
    from tritune.trainer.open import Opened, Placed
    from tritune.trainer.parallel.distributed import World

    Answered = tuple[dict[str, Any], list[dict[str, Any]] | InputError]  # a prompt's fields, and what was said to it

# The groups of a run's configuration that name what a verb reads.
READS = {
    "evaluate": ("model", "data", "objective"),
    "generate": ("model", "objective", "generate"),
    "export": ("model",),
    "report": (),
}


def run_verb(verb: Callable[..., None], argv: list[str], **arguments: Any) -> int:
    """Run one of the verbs below and return the exit status."""
    config_dir, overrides = split_argv(argv)

    def call() -> None:
        run = run_named(overrides)
        kept = read_config(run) if run else None
        read = {group: value for group, value in (kept or {}).items() if group in READS[verb.__name__]}
        given = {o.partition("=")[0] for o in overrides}
        require_no_blanks(read, given)
        if verb is report and kept is not None:  # it asks nothing of these, and a user's file would have to be named
            kept = {group: value for group, value in kept.items() if group not in ("plugins", *AXES)}
        config = load_config(overrides, config_dir, kept=kept, training=False)
        if verb in (evaluate, generate) and config.evaluation.abstain is not None and "evaluation.abstain" in given:
            rule = "a threshold is chosen in training, and a model that is read takes its own or the one given"
            remedy = "Give evaluation.abstain_below=<probability>"
            raise InputError(f"evaluation.abstain={config.evaluation.abstain}", rule, remedy)
        if verb is export:
            arguments["own_prompt"] = "objective.prompt" not in given
        verb(config, run, **arguments)

    return exit_status(call)


def exit_status(call: Callable[[], None]) -> int:
    """Call, say what went wrong, and return the status that it means: 0, 1 or 2."""
    try:
        call()
    except INPUT_ERRORS as error:
        print(f"tritune: {shown(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    except (CheckpointError, ExportError, LostConnectionError, PeerError) as error:
        print(f"tritune: {shown(str(error))}", file=sys.stderr)
        users = isinstance(error, PeerError) and f"{InputError.__name__}: " in str(
            error
        )  # rank 0 speaks for the one that failed
        return EXIT_INPUT if users else EXIT_FAILED
    except Exception as error:  # noqa: BLE001  shown like any other, without secrets
        said = of_surroundings(error)
        print(shown(f"tritune: {said}\n" if said else traceback.format_exc()), end="", file=sys.stderr)
        return EXIT_FAILED
    except BaseException as error:  # noqa: BLE001  what is none is raised again
        print(f"tritune: {shown(str(of_panic(error)))}", file=sys.stderr)
        return EXIT_INPUT
    return EXIT_DONE


def evaluate(config: Config, run: Path | None) -> None:
    """Score the splits of `evaluation.splits` that the data has; print a table, and write `evaluation.json` with a run.

    Every row's input, reference and what the model makes of it go to `evaluation.out`.
    """
    from tritune.trainer.build import lay_out_choices, make_objective
    from tritune.trainer.data.records import require_sources
    from tritune.trainer.data.splits import read_splits, require_length
    from tritune.trainer.evaluation.abstention import outcomes
    from tritune.trainer.evaluation.evaluate import evaluate as score
    from tritune.trainer.evaluation.predictions import Recorder, described, gathered, write_predictions
    from tritune.trainer.evaluation.table import figures_table
    from tritune.trainer.metrics.risk_coverage import answered_figures
    from tritune.trainer.model.finite import require_a_loss
    from tritune.trainer.model.load import room_in
    from tritune.trainer.objectives.loss import text_loss
    from tritune.trainer.run.directory import write_whole_json

    require_sources(config.data)
    world, opened, placed = _open(config, run)
    config, tokenizer, context = opened.config, opened.tokenizer, room_in(opened.model)
    data = config.data
    given = [n for n in config.evaluation.splits if getattr(data, n) or getattr(data, f"{n}_share", 0)]
    if not given:
        rule = f"none of the splits {', '.join(config.evaluation.splits)} is given"
        raise InputError("evaluation.splits", rule, "Give data.test=<file>, or another of them")
    require_length(config.data, context)
    with world.raise_on_all("reading the rows", patiently=lambda: None):
        splits = read_splits(config, tokenizer, context, opened.stops, config.evaluation.splits)
    choices = lay_out_choices(config.evaluation, splits, tokenizer)
    scorer, backend = placed.scorer, placed.backend
    objective = make_objective(config.objective, data, splits.labels, tokenizer)
    results: dict[str, dict[str, Any]] = {}
    recorders: dict[str, Recorder] = {}
    out, below = config.evaluation.out or (run and run / "predictions.jsonl"), _below(opened, splits.labels, run)
    for name, examples in splits.examples.items():
        _say(f"evaluate  {opened.what} on {name}: {examples.report.line()}")
        how = text_loss(tokenizer) if name == "retention" else objective
        if out is not None or below is not None:
            how = recorders[name] = Recorder(how)
        results[name] = score(how, scorer, examples, backend, config.evaluation.batch_size,
                              tokenizer.pad_token_id, choices.get(name))  # fmt: skip
        require_a_loss(results[name]["loss"], opened.model, opened.what, f"on {name}")
        if below is not None and name != "retention":
            results[name] |= answered_figures(*outcomes(recorders[name], examples, backend), below)
    gathered(recorders, world)
    if world.rank != 0:
        return
    print(shown(figures_table(results, {n: len(e) for n, e in splits.examples.items()})))
    if run is not None:
        write_whole_json(run / "evaluation.json", {"step": opened.step, "eval": results})
    if out is not None:
        rows = (
            {"split": name, **line}
            for name, kept in recorders.items()
            for line in described(kept, splits.examples[name], splits.labels, tokenizer, below)
        )
        _say(f"evaluate  {write_predictions(Path(out), rows):,} rows in {out}")


def generate(config: Config, run: Path | None, prompts: list[str]) -> None:
    """Answer prompts from the command line and from `generate.file`; JSONL to `generate.out` or standard output.

    A classifier answers with a label, or abstains: null, beside its best guess. A prompt that cannot be answered has an `error`
    in the place of answers; only where no prompt can be, that is an error.
    """
    if not prompts and config.generate.file is None:
        raise InputError("generate", "there is no prompt", 'Give --prompt "..." or generate.file=<file>')
    world, opened, placed = _open(config, run, as_trained=True)
    if opened.config.objective.name != config.objective.name:
        _say(f"generate  {opened.what} is a classifier ({opened.config.objective.name}): it answers with a label")
    if opened.config.objective.label_prompt is not None and not opened.labels:
        rule = f"{opened.what} is asked for a label, and its classes are not known"
        raise InputError("data.labels", rule, "Give data.labels=[...] in the order of training")
    below = _below(opened, opened.labels, run)
    asked = config.generate
    if opened.labels:
        answered = _labels(opened, placed, prompts, asked.file, config.data, below)
    else:
        answered = _words(opened, placed, asked, prompts, config.seed, config.model.dtype.value == "float64")
    if world.rank != 0:
        return
    faults = [answers for _, answers in answered if isinstance(answers, InputError)]
    if len(faults) == len(answered) and faults:
        raise faults[0]
    lines = []
    for fields, answers in answered:
        what = {"answers": [], "error": str(answers)} if isinstance(answers, InputError) else {"answers": answers}
        lines.append(json.dumps({**fields, **what}, ensure_ascii=False) + "\n")
    if faults:
        _say(f"generate  {len(faults):,} of {len(answered):,} prompts have no answer. The first: {faults[0]}")
    out = asked.out
    if out is None:
        sys.stdout.writelines(lines)
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(lines), encoding="utf-8")
    _say(f"generate  {opened.what}: {len(answered):,} prompts, answers in {out}")


def _words(
    opened: Opened, placed: Placed, settings: GenerateConfig, prompts: list[str], seed: int, exactly: bool
) -> list[Answered]:
    """What a model with words answers.

    Args:
        exactly: compute as in float64.
    """
    from tritune.trainer.data.prompts import read_prompts
    from tritune.trainer.evaluation.generate import Share, lack_of_room
    from tritune.trainer.evaluation.generate import generate as answer
    from tritune.trainer.model.load import room_in

    if not hasattr(opened.model, "generate"):
        raise InputError(opened.what, "it has no words", "Use tritune evaluate")
    rows = read_prompts(prompts, opened.config.generate, opened.config.data, opened.config.objective, opened.tokenizer)
    context = room_in(opened.model)
    faults = [row.fault or lack_of_room(row.ids, row.place, settings.max_new_tokens, context) for row in rows]
    ids = [row.ids for row, fault in zip(rows, faults, strict=True) if fault is None]
    backend = placed.backend
    share = Share(backend.mesh.world, together=not backend.whole)
    said = iter(answer(opened.model, placed.scorer.generate, opened.tokenizer, ids, settings, opened.stops, backend.device,
                       seed, exactly, share))  # fmt: skip
    return [(r.fields, fault or [vars(a) for a in next(said)]) for r, fault in zip(rows, faults, strict=True)]


def _labels(
    opened: Opened, placed: Placed, prompts: list[str], file: str | None, data: DataConfig, below: float | None
) -> list[Answered]:
    from tritune.trainer.build import make_objective
    from tritune.trainer.evaluation.labels import label_texts, read_texts
    from tritune.trainer.model.load import room_in

    objective = make_objective(opened.config.objective, opened.config.data, opened.labels, opened.tokenizer)
    context, device = room_in(opened.model), placed.backend.device
    found = label_texts(opened, placed.scorer, objective, read_texts(prompts, file, data), context, device, below)
    return [(row.fields, said if isinstance(said, InputError) else [said]) for row, said in found]


def export(config: Config, run: Path | None, own_prompt: bool = True) -> None:
    """Write what a run trained in `export.form` to `export.dir`, and prove it by reading it back.

    Args:
        own_prompt: `objective.prompt` is the run's own, and not given anew.
    """
    from tritune.trainer.export import export as write
    from tritune.trainer.parallel import distributed
    from tritune.trainer.run.directory import export_path
    from tritune.trainer.trained import source_of

    if run is None:
        raise InputError("run.dir=None", "an export is made from a run", "Give run.dir=<the run's directory>")
    world = distributed.start(config.backend, config.train.deterministic)
    _require_its_base(config.model, config.method, identity_of(config), run)
    facts = read_json(run / "summary.json", dict, "Move it away: the model's card is written without its figures") or {}
    write(source_of(config, run, world, facts, own_prompt), export_path(config.export.dir, run), _say)


def report(config: Config, run: Path | None) -> None:
    """Write `report.html` anew from the files of a run, finished or not."""
    from tritune.trainer.report import write_report

    if run is None:
        raise InputError("run.dir=None", "a report is made of a run", "Give run.dir=<the run's directory>")
    _say(f"report    {write_report(run)}")


def _below(opened: Opened, labels: list[str], run: Path | None) -> float | None:
    """The probability below which a classifier abstains: `evaluation.abstain_below`, else what the run or the export says."""
    from tritune.trainer.evaluation.abstention import threshold_of_run, threshold_said

    given = opened.config.evaluation.abstain_below
    if given is not None and not labels:
        remedy = "Give a classifier, or leave it out"
        raise InputError(f"evaluation.abstain_below={given}", f"{opened.what} answers with words, not labels", remedy)
    if given is not None or not labels:
        return given
    below, line = threshold_of_run(run, opened.step) if run is not None else (opened.below, None)
    if line is None and below is not None:
        line = f"abstain   {threshold_said(below)}, as {opened.what} says; evaluation.abstain_below changes it"
    if line is not None:
        _say(line)
    return below


def _open(config: Config, run: Path | None, as_trained: bool = False) -> tuple[World, Opened, Placed]:
    from tritune.trainer.backends import shards_parameters
    from tritune.trainer.open import open_model, place
    from tritune.trainer.parallel import distributed

    world = distributed.start(config.backend, config.train.deterministic)
    with world.raise_on_all("opening the model"):
        if run is not None:
            _require_its_base(config.model, config.method, identity_of(config), run)
        sharded = world.size > 1 and shards_parameters(config.backend)
        opened = open_model(config, run, world, settle=False, as_trained=as_trained, sharded=sharded)
    placed = place(opened, world, _say)
    given, trained = config.data, opened.config.data
    if (trained.max_length, trained.overlong) != (given.max_length, given.overlong):
        how = f"data.max_length={trained.max_length} and data.overlong={trained.overlong}"
        _say(f"length    {how}, as {opened.what} was trained; other values than the defaults change them")
    return world, opened, placed


def _require_its_base(model: ModelConfig, method: MethodConfig, identity: Identity, run: Path) -> None:
    from tritune.trainer.methods.start import base_to_read
    from tritune.trainer.run.directory import RunDir
    from tritune.trainer.run.identity import require_same_base

    require_same_base(base_to_read(model), method, identity, RunDir(run), _say, reading=True)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(shown(text), file=sys.stderr, flush=True)
