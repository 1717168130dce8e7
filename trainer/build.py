"""Config -> Run: the only wiring. Cheap refusals come first, weights are read once everything else is known to fit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.audit.findings import Severity, blocking
from tritune.trainer.backends import Backend, make_backend, shards_parameters
from tritune.trainer.checkpoint.store import CheckpointStore, read_state
from tritune.trainer.config import Config, MethodConfig, ObjectiveConfig, TrainConfig
from tritune.trainer.config.choices import Form, Packing
from tritune.trainer.config.compose import to_dict
from tritune.trainer.config.data import Check, DataConfig, training_sources
from tritune.trainer.config.identity import identity_in, identity_of
from tritune.trainer.config.schema import EvaluationConfig
from tritune.trainer.data.feed import make_loader
from tritune.trainer.data.loader import Dealer, Loader
from tritune.trainer.data.plain_chat import settle_template
from tritune.trainer.data.records import require_sources
from tritune.trainer.data.splits import Splits, Watch, read_splits, require_length
from tritune.trainer.errors import CheckpointError, InputError, StopRequested
from tritune.trainer.evaluation.choices import Choices, lay_out
from tritune.trainer.export import require_replaceable
from tritune.trainer.export.rehearse import rehearse
from tritune.trainer.export.source import Source
from tritune.trainer.loop import Run
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.start import begins_whole, begun, go_on, lineage_of, merge_start
from tritune.trainer.metrics.meter import Meter
from tritune.trainer.metrics.progress import Progress
from tritune.trainer.model.acceleration import choose_kernels, install_kernels
from tritune.trainer.model.activations import checkpoint_activations
from tritune.trainer.model.attention import choose_attention
from tritune.trainer.model.generation_config import model_stop_ids, set_generation
from tritune.trainer.model.layers import compile_layers
from tritune.trainer.model.load import (
    context_length,
    count_parameters,
    heads_of,
    is_tied,
    load_architecture,
    narrow_frozen,
    storage_dtype,
    widen_masters,
)
from tritune.trainer.model.loading import load
from tritune.trainer.model.optim import make_optimizer
from tritune.trainer.model.reached import describe_unused, find_unused
from tritune.trainer.model.scorer import TESTED_FAMILIES, TokenScorer, require_same_logits
from tritune.trainer.model.tokenizer import choose_pad_token, load_tokenizer, stop_token_ids
from tritune.trainer.model.weights import Weights, embeddings_of
from tritune.trainer.objectives.loss import Objective, Sources
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.mesh import make_mesh
from tritune.trainer.redact import redact_tree
from tritune.trainer.run.directory import RunDir, export_path
from tritune.trainer.run.dry_run import dry_run
from tritune.trainer.run.identity import (
    check_resume,
    moved,
    record,
    require_same_base,
    require_same_run,
    require_same_splits,
)
from tritune.trainer.run.pulse import Pulse
from tritune.trainer.run.rate import settle_rate
from tritune.trainer.run.state import Due, TrainState
from tritune.trainer.run.stop import Stop
from tritune.trainer.tracking import open_sinks, require_trackers


def build(config: Config, world: World, directory: RunDir, progress: Progress, stop: Stop, pulse: Pulse) -> Run:
    """Load data, model and state; return a run that is ready to train, or to go on.

    Raises:
        InputError: whatever in the config, the files or the run directory makes the run impossible.
        CheckpointError: there are checkpoints and none is whole.
        StopRequested: a stop was asked for meanwhile.
    """
    say = progress.say
    with world.raise_on_all("checking the run directory"):
        kernels = choose_kernels(config.kernels, config.model.dtype, world.device, config.train.compile)
        require_sources(config.data)
        require_trackers(config.tracking)
        identity = identity_of(config := begun(config))
        if config.export.enabled:
            require_replaceable(export_path(config.export.dir, directory.path), config.model, directory.path)
        if world.rank == 0:
            check_resume(config.run.resume, identity, directory)
    pulse.phase("data")

    def beat() -> None:
        pulse.beat()
        stop.interrupt()

    watch = Watch(progress.reading, beat, say)
    with world.raise_on_all("reading tokenizer and data", patiently=pulse.beat), suppress(StopRequested):
        tokenizer = load_tokenizer(config.model)
        config = replace(config, model=settle_template(config.model, config.data, config.objective, tokenizer, say))
        architecture = load_architecture(config.model, len(tokenizer))
        context = context_length(architecture, taken := config.method.positions_taken)
        require_length(config.data, context, taken)
        stops = model_stop_ids(config.model, architecture)
        stop_ids = stop_token_ids(tokenizer, stops)
        pad = choose_pad_token(tokenizer, config.model.pad_token, stop_ids)
        began = time.perf_counter()
        splits = read_splits(config, tokenizer, context, stops, watch=watch)
        findings = cheap_findings(config.data, config.objective, splits, tokenizer)
        refused = blocking(findings, config.audit.fail_on)
        if refused is not None:
            raise refused
        choices = lay_out_choices(config.evaluation, splits, tokenizer)
        if world.rank == 0:
            directory.write_rejects(splits.rejects())
    stop.heed(world)
    for name, examples in splits.examples.items():
        say(f"data      {name}: {examples.report.line()}")
    for key in splits.at_ends:
        say(f"data      {key}: the end of each file is held out (data.held_out={config.data.held_out})")
    for finding in findings:
        if finding.severity is Severity.warning or finding.name is Check.unread:
            say(f"data      {finding.name}: {finding.text}")
    say(f"data      read in {time.perf_counter() - began:.1f} s; padding token {pad}")

    pulse.phase("model")
    with world.raise_on_all("loading the model"):
        base = None
        if world.rank == 0:
            base = require_same_base(config.model, config.method, identity, directory, say)
        heads = heads_of(config.objective)
        labels, dtype = splits.labels if heads else None, storage_dtype(config.model.dtype, config.method)
        added = len(tokenizer) - architecture.get_text_config().vocab_size
        sharded = shards_parameters(config.backend) and not begins_whole(config.method, config.model)
        model, weights = load(config.model, architecture, tokenizer, labels, config.seed, dtype, sharded, say)
        model = merge_start(model, config.model, len(tokenizer), say)
        unused = _unused(config, model, weights)
        if not heads:
            for setting in set_generation(model, tokenizer):
                say(f"model     its generation config's {setting} is left out: transformers would not save it again")
        for line in describe_unused(model, unused, config.method):
            say(f"model     {line}")
        keys = apply_method(config.method, model, heads, config.seed, unused)
        for line in config.method.describe(model, unused):
            say(f"method    {line}")
        config.method.begin(model, tokenizer, config.seed, partial(embeddings_of, model, weights))
        go_on(config.method, model, heads, config.model, say)
        if config.export.enabled and config.export.form is Form.merged:
            config.method.require_mergeable(model)  # now, and not when training is over
        if not config.model.config and added > 0:
            require_trained_embeddings(model, added, config.method)
        widen_masters(model)
        narrow_frozen(model, config.model.dtype)
        if weights is not None:
            weights.take(model)
    if config.export.enabled:
        pulse.phase("export rehearsal")
        with world.raise_on_all("trying the export"):
            if world.rank == 0:
                source = Source(config, model, lambda ids: ids, tokenizer, heads, splits.labels)
                rehearse(source, export_path(config.export.dir, directory.path), say)
    trainable, total = count_parameters(model)
    tied = ", tied head" if is_tied(model) else ""
    say(
        f"model     {architecture.model_type}, {total:,} parameters{tied}; method {config.method.name} trains {trainable:,}"
    )

    width = architecture.get_text_config().hidden_size
    config = replace(config, optim=settle_rate(config.optim, config.method, world, directory, width, say))

    if config.data.packing is not Packing.none:
        say(f"attention {choose_attention(model, world.device)}: packed rows do not see one another")
    checked_in = config.model.dtype if config.kernels.self_check else None
    installed = install_kernels(model, kernels, checked_in, world, say)
    pulse.phase("backend")
    mesh = make_mesh(config.backend, world)
    backend = make_backend(config.backend, mesh, config.model.dtype, config.verify.order)
    scorer = TokenScorer(model, keys, config.seed, config.kernels.loss_chunk_tokens, installed.head)
    checkpoint_activations(scorer, config.train, keys)
    if config.train.compile:
        compile_layers(scorer)
    wrapped = backend.prepare(
        scorer, partial(make_optimizer, config.optim, rate_factor=config.method.rate_factor), weights
    )
    say(f"backend   {backend.name}: {world.size} x {world.device.type}")
    state = TrainState()
    with world.raise_on_all("laying out the training rows"):
        dealer = _dealer(config.train, config.data.packing, config.verify.order, tokenizer.pad_token_id, backend)
        loader = make_loader(config, splits, tokenizer, stop_ids, state, dealer, say)
        told = loader.describe()
    with world.raise_on_all("comparing the training rows"):
        require_same_rows(world.gather(loader.digest), config.data.train)
    for line in told:
        say(line)
    objective = make_objective(config.objective, config.data, splits.labels, tokenizer)
    due = _make_due(config.train.log_every, config.evaluation.every, config.checkpoint.every, loader)
    run = Run(
        config=config, world=world, backend=backend, objective=objective,
        model=wrapped, scorer=scorer, core=model, heads=heads, tokenizer=tokenizer, splits=splits.examples,
        choices=choices, labels=splits.labels, stops=stop_ids,
        parameters=(trainable, total), lineage=lineage_of(config.model), loader=loader,
        store=CheckpointStore(directory.path / "checkpoints", config.checkpoint.keep_last, world, say,
                              config.checkpoint.asynchronous),
        state=state, due=due, meter=Meter(mesh), progress=progress, directory=directory, stop=stop,
        pulse=pulse, sinks=[],
    )  # fmt: skip
    wrapped.register_forward_hook(lambda *_: pulse.beat())
    pulse.phase("dry run")
    dry_run(run)
    pulse.phase("resume")
    written = redact_tree(to_dict(config))
    _resume_or_start(run, written, base)
    stop.heed(world)  # before trackers are opened, which nobody would close
    if world.rank == 0:
        run.sinks += open_sinks(config.tracking, directory.path, written, state.step, say)
    return run


def _unused(config: Config, model: PreTrainedModel, weights: Weights | None) -> frozenset[str]:
    """The parameters that take no part in the loss, of which a meta model's family has none; a family that nobody has compared
    with transformers' own logits is compared now."""
    if weights is not None:
        return frozenset()
    heads = heads_of(config.objective)
    unused = find_unused(model, heads)
    if not heads and model.config.model_type not in TESTED_FAMILIES:
        require_same_logits(TokenScorer(model, None, config.seed, config.kernels.loss_chunk_tokens))
    return unused


def lay_out_choices(
    settings: EvaluationConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Choices]:
    """The rows to score for `evaluation.choices`, by split."""
    wanted = {*settings.splits, "validation"} - {"retention"} if settings.choices else set()
    return {n: lay_out(e, settings.choices, tokenizer) for n, e in splits.examples.items() if n in wanted}


def require_trained_embeddings(model: PreTrainedModel, added: int, method: MethodConfig) -> None:
    """Refuse new tokens whose embeddings would stay as random as they were drawn, and would not be in the adapter."""
    if not model.get_input_embeddings().weight.requires_grad:
        rule = (
            f"{added} token(s) are new to the model, and method={method.name} keeps their embeddings frozen and random"
        )
        raise InputError("model.add_tokens", rule, method.embeddings_remedy())


def _resume_or_start(run: Run, written: dict[str, Any], base: dict[str, dict[str, str]] | None) -> None:
    """Take the state of the newest checkpoint, if there is one, and write down what the run is: `written` is its
    configuration as plain values without secrets, `base` the fingerprint of its base model."""
    rows = {name: examples.digest for name, examples in run.splits.items()} | {"train": run.loader.digest}
    found = run.store.newest()
    if found is not None:
        with run.world.raise_on_all("checking what was saved"):
            saved, identity = read_state(found[0]), identity_in(written)
            if found[1]["format"] > 2:  # older ones do not say it; the directory's own record was compared
                require_same_run(saved.get("run"), identity, found[0])
            if saved.get("data") != run.loader.digest:
                rule = f"{found[0].name} was trained on other tokens: the data, the tokenizer or the template changed"
                rule += moved(identity, run.directory)
                raise InputError(f"data.train={run.config.data.train}", rule, "Restore them, or give another run.dir")
            if run.world.rank == 0:
                require_same_splits(rows, run.config.data, identity, run.directory)
            with _named(found[0]):
                _take_state(run, saved.get("train"), found[1]["step"])
        with _named(found[0]):
            run.store.load(found, run.backend.tensors())
        run.backend.refresh()
        run.progress.say(f"resume    from {found[0].name}, step {run.state.step} of {run.loader.total_steps}")
    with run.world.raise_on_all("reading the first rows"):
        fault = run.loader.fault()
        if fault is not None:
            raise fault
    with run.world.raise_on_all("writing the run directory"):
        if run.world.rank == 0:
            for line in run.directory.cut_logs(run.state.step, run.state.evaluated, run.config.train.log_every):
                run.progress.say(line)
            if found is None:
                for name in ("base.json", "samples.json"):
                    (run.directory.path / name).unlink(missing_ok=True)
            record(run.directory, base, rows)
            run.directory.write_config(written)
            run.directory.write_environment(_device_name(run.world.device), run.world.size)
            reports = {name: vars(examples.report) for name, examples in run.splits.items()}
            run.directory.write_json("data.json", reports | {"labels": run.labels})


def _take_state(run: Run, saved: Any, step: int) -> None:
    run.state.load_json(saved)
    if run.state.step != step:
        raise CheckpointError(f"its state is of step {run.state.step:,}")
    streams = len(training_sources(run.config.data)) if run.config.data.streaming else 0
    if len(run.state.sources) != streams:
        raise CheckpointError(f"it has read {len(run.state.sources)} streams, and the run has {streams}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Faults of a checkpoint whose hashes are right: which it is, and what to do."""
    try:
        yield
    except CheckpointError as error:
        remedy = f"Move {path.name} aside, and the same command goes on from the one before it; or give another run.dir"
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ').rstrip('.')}. {remedy}") from None


def _dealer(train: TrainConfig, packing: Packing, order: int, padding: int, backend: Backend) -> Dealer:
    return Dealer(
        train.batch_size, train.micro_batch_size, padding, backend.dp_rank, backend.dp_size, backend.device,
        train.unpack, packing is not Packing.none, order,
    )  # fmt: skip


def require_same_rows(digests: list[str], train: str | None) -> None:
    """Refuse ranks that would train on other tokens than the first: files differ between machines, or a library does.

    Raises:
        InputError: it names the first such rank.
    """
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        rule = f"rank {other} made other tokens of it than rank 0: the files, or the versions of libraries, differ"
        raise InputError(f"data.train={train}", rule, "Give all machines the same, or one shared folder")


def _make_due(log_every: int, eval_every: int | None, save_every: int | None, loader: Loader) -> Due:
    eval_every = eval_every or loader.steps_per_epoch
    return Due(log_every, eval_every, save_every or eval_every, loader.total_steps)


def make_objective(
    objective: ObjectiveConfig, data: DataConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase
) -> Objective:
    """The loss of an objective over the sources of the data."""
    named = data.sources
    sources = Sources(tuple(named), tuple(s.loss_weight for s in named.values()))
    return objective.loss(labels, tokenizer, sources)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
