"""Open a model to read it: what a run trained, an export of ours, an adapter in PEFT's layout, or a hub model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tritune.trainer.backends import make_reader
from tritune.trainer.backends.fsdp import Fsdp
from tritune.trainer.backends.local import Local
from tritune.trainer.checkpoint.manifest import is_flat
from tritune.trainer.checkpoint.names import newest_step, saved_steps
from tritune.trainer.checkpoint.store import CheckpointStore, read_state
from tritune.trainer.checkpoint.tensors import load_tensors
from tritune.trainer.config import Config, ModelConfig, ObjectiveConfig
from tritune.trainer.config.axes import Head, Learns
from tritune.trainer.config.data import DataConfig
from tritune.trainer.config.registry import default_option, saying_labels, with_class_head
from tritune.trainer.data.plain_chat import settle_template
from tritune.trainer.data.prompts import name_rendering
from tritune.trainer.data.splits import Watch
from tritune.trainer.errors import InputError
from tritune.trainer.export.carried import NOTHING, Carried, of_adapter, of_config
from tritune.trainer.methods.adapter_open import add_saved_adapter, read_settings
from tritune.trainer.methods.apply import apply_method
from tritune.trainer.methods.start import begun, merge_start, merges, on_its_base, tokenizer_beside
from tritune.trainer.model.acceleration import choose_kernels, install_kernels
from tritune.trainer.model.files import ADAPTER_CONFIG, adapter_folder
from tritune.trainer.model.generation_config import model_stop_ids, set_generation
from tritune.trainer.model.load import (
    cast_parameters,
    heads_of,
    load_architecture,
    narrow_frozen,
    storage_dtype,
    widen_masters,
)
from tritune.trainer.model.loading import load
from tritune.trainer.model.reached import find_unused
from tritune.trainer.model.scorer import TokenScorer
from tritune.trainer.model.tokenizer import choose_pad_token, load_tokenizer, stop_token_ids
from tritune.trainer.model.weights import Weights
from tritune.trainer.parallel.distributed import World
from tritune.trainer.parallel.shard import shard_of
from tritune.trainer.run.files import read_json
from tritune.trainer.run.state import TrainState


@dataclass(frozen=True)
class Opened:
    """A model to be read.

    Attributes:
        config: the run's own, or what was given; its model is where the weights came from.
        model: in evaluation mode, on the device, parameters in `config.model.dtype`.
        heads: modules that are new (a classification head).
        labels: of a classifier, in the order of its outputs; else empty.
        stops: ids that end an answer.
        what: how to call it in a message.
        step: of the run it comes from; None elsewhere.
        below: the probability below which a classifier abstains, where an export says so.
        weights: where a model of meta tensors has its values; None where it is whole.
        restore: reads what the run trained into the model, once it is sharded; None where that is done.
        saved: of a run, the checkpoint's folder and manifest.
    """

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: list[str]
    labels: list[str]
    stops: list[int]
    what: str
    step: int | None = None
    below: float | None = None
    weights: Weights | None = None
    restore: Callable[[], None] | None = None
    saved: tuple[Path, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Placed:
    """An opened model where it computes.

    Attributes:
        scorer: what is called, on all ranks equally often where they hold shards of it; in evaluation mode.
        backend: the ranks that share the work.
    """

    scorer: TokenScorer
    backend: Local


def open_model(
    config: Config, run: Path | None, world: World, settle: bool = True, as_trained: bool = False, sharded: bool = False
) -> Opened:
    """Load tokenizer, architecture and weights.

    Args:
        run: the run directory to read; None for `config.model` as it stands.
        settle: make it ready to compute; without, parameters stay what training held them in (float32 masters).
        sharded: it will be `place`d in shards: each rank reads its own part of it where the files allow that.
        as_trained: an export that says that it is a classifier by token is one, also where the config has objective=sft.

    Raises:
        InputError: there is nothing to open there, or it does not fit the configuration.
        CheckpointError: a checkpoint is not whole.
    """
    if run is not None:
        opened = _open_run(config, run, world, sharded)
    elif (adapter := _find_adapter(config.model)) is not None:
        opened = _open_adapter(config, adapter, as_trained)
    else:
        opened = _open_plain(config, as_trained, sharded)
    opened.model.eval()
    if settle:  # every parameter in the dtype that computes, as in training; buffers keep theirs (rotary frequencies)
        opened.model.requires_grad_(False)
        cast_parameters(opened.model, getattr(torch, config.model.dtype.value))
        torch.nn.Module.to(opened.model, world.device)
    return opened


def place(opened: Opened, world: World, say: Callable[[str], None]) -> Placed:
    """Put a model that was opened unsettled where it computes, under the backend and the kernels of the configuration."""
    config, model = opened.config, opened.model
    dtype = config.model.dtype
    choices = choose_kernels(config.kernels, dtype, world.device, compiled=False)
    installed = install_kernels(model, choices, dtype if config.kernels.self_check else None, world, say)
    backend = make_reader(config.backend, world, dtype)
    scorer = TokenScorer(model, None, config.seed, config.kernels.loss_chunk_tokens, installed.head)
    if not isinstance(backend, Fsdp):  # whole: every parameter in the dtype that computes, as in training
        model.requires_grad_(False)
        cast_parameters(model, getattr(torch, dtype.value))
    backend.place(scorer, opened.weights)
    if opened.restore is not None:
        opened.restore()
    return Placed(scorer.eval(), backend)


def _open_plain(config: Config, as_trained: bool, sharded: bool = False) -> Opened:
    labels, carried = config.data.labels, NOTHING
    if config.model.path:
        settings = load_architecture(config.model, 0)
        carried = of_config(settings, f"model.path={config.model.path}", labels)
        config = replace(config, **_as_trained(config.objective, config.data, carried, as_trained))
        labels = config.data.labels
        kinds = settings.architectures or []
        classifier = any("SequenceClassification" in kind for kind in kinds)
        if classifier != (config.objective.head is Head.classes) and kinds:
            is_one = "a classifier" if classifier else "no classifier"
            rule = f"it is {is_one} ({', '.join(kinds)}); objective={config.objective.name} would give it a random head"
            fitting = with_class_head() if classifier else default_option("objective")
            raise InputError(f"model.path={config.model.path}", rule, f"Give objective={fitting.name}")
    if config.objective.head is Head.classes and config.model.path:
        named: dict[Any, str] = settings.id2label or {}
        labels = labels or [named[i] for i in range(len(named))]
    return _assemble(config, labels, str(config.model.path or config.model.config), carried, sharded=sharded)


def _as_trained(objective: ObjectiveConfig, data: DataConfig, carried: Carried, insist: bool) -> dict[str, Any]:
    """`objective` and `data` with what the export says of a classifier, where the config has the defaults: where texts are cut;
    of one by token its labels and its prompt as well.

    Raises:
        InputError: its prompt held a secret, and the config gives none.
    """
    if objective.head is Head.classes:
        return {"objective": objective, "data": _cut_as_trained(data, carried)}
    says = objective.label_prompt is not None
    asked = says or (insist and objective.learns is Learns.answers)
    if not carried.token_ids or not asked:
        return {"objective": objective, "data": data}
    usual = type(objective)() if says else saying_labels()
    given = says and objective.label_prompt != usual.label_prompt
    if not given and carried.prompt is None:
        rule = "the model reads its texts in a prompt that held a secret, which was not written down"
        remedy = f"Give it: objective={usual.name} 'objective.prompt=\"... {{text}} ...\"'"
        raise InputError("objective.prompt", rule, remedy)
    chosen = objective if given else usual.with_label_prompt(carried.prompt or usual.label_prompt or "")
    return {"objective": chosen, "data": replace(_cut_as_trained(data, carried), labels=carried.labels)}


def _cut_as_trained(data: DataConfig, carried: Carried) -> DataConfig:
    """With the export's `data.max_length` and `data.overlong`, where the config has the defaults."""
    usual = DataConfig()
    if carried.max_length is not None and data.max_length == usual.max_length:
        data = replace(data, max_length=carried.max_length)
    if carried.overlong is not None and data.overlong is usual.overlong:
        data = replace(data, overlong=carried.overlong)
    return data


def _open_run(config: Config, run: Path, world: World, sharded: bool) -> Opened:
    store = CheckpointStore(run / "checkpoints", 1, world, lambda text: None)
    step, saved = _choose_step(config.checkpoint.step, config.train.use_best, store), saved_steps(run / "checkpoints")
    if step is None and not saved:
        raise InputError(f"run.dir={run}", "it holds no checkpoint", "Check run.dir, or let the run save one")
    report = read_json(run / "data.json", dict, "Restore it, or start the run again, which writes it anew") or {}
    config = begun(config, reading=True)
    opened = _assemble(
        config,
        [str(label) for label in report.get("labels") or config.data.labels],
        str(run),
        trained=True,
        sharded=sharded,
    )
    step = step if step is not None else int(saved[-1].name.removeprefix("step-"))
    found = store.at(step)
    if found is None:
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in saved)
        raise InputError(f"checkpoint.step={step}", f"{run} holds no checkpoint of it", f"It has {steps or 'none'}")
    path, manifest = found
    expected = {n: entry for n, entry in manifest["tensors"].items() if n.startswith("model.")}

    def restore() -> None:
        tensors = {f"model.{n}": shard_of(p) for n, p in opened.model.named_parameters() if p.requires_grad}
        load_tensors(path, tensors, expected, world, is_flat(manifest))

    later = restore if opened.weights else None
    opened = replace(opened, step=step, what=f"{run}, step {step}", restore=later, saved=found)
    if opened.restore is None:
        restore()
    return opened


def _choose_step(step: int | None, use_best: bool, store: CheckpointStore) -> int | None:
    """`checkpoint.step`, or the best one where the run is to end with it; None for the newest."""
    if step is not None or not use_best:
        return step
    newest = store.at(newest_step(store.root))
    if newest is None:
        return None
    state = TrainState()
    state.load_json(read_state(newest[0]).get("train"))
    return state.best_step


def _find_adapter(model: ModelConfig) -> Path | None:
    """The folder of `model.adapter`, or of `model.path` where that is an adapter.

    Raises:
        InputError: `model.adapter` is none.
    """
    if model.adapter is None:
        return adapter_folder(model.path, model.revision) if model.path else None
    found = adapter_folder(model.adapter)
    if found is None:
        remedy = "Give a folder, or a hub id that this machine can reach"
        raise InputError(f"model.adapter={model.adapter}", f"no {ADAPTER_CONFIG} is there", remedy)
    return found


def _open_adapter(config: Config, source: Path, as_trained: bool) -> Opened:
    """PEFT's model on the base that `model.path` names beside `model.adapter`, or that the adapter itself names."""
    settings, given = read_settings(source), config.model
    name = given.adapter or given.path
    if given.adapter is not None:
        model = replace(given, tokenizer=tokenizer_beside(given, source))
    else:
        model = on_its_base(given, source, settings)
    remedy = f"name both: model.adapter={name} model.path=<folder or hub id of its base>"
    if not model.path:
        raise InputError(f"model.path={name}", "the adapter does not say which model it belongs to", f"N{remedy[1:]}")
    carried = of_adapter(source, f"model.path={source}", config.data.labels)
    if settings["task_type"] == "SEQ_CLS":
        labels = carried.labels
        if labels:
            config = replace(config, **_as_trained(with_class_head(), config.data, carried, as_trained))
    else:
        config = replace(config, **_as_trained(config.objective, config.data, carried, as_trained))
        labels = config.data.labels if config.objective.label_prompt is not None else []
    try:
        opened = _assemble(replace(config, model=model), labels, str(name), carried)
    except InputError as error:
        if given.adapter is None and error.value == f"model.path={model.path}":
            rule = f"its base, {model.path}, does not open: {error.rule}"
            raise InputError(f"model.path={name}", rule, f"If the base has moved, {remedy}") from None
        raise
    return replace(opened, model=add_saved_adapter(source, opened.model, len(opened.tokenizer)))


def _assemble(
    config: Config, labels: list[str], what: str, carried: Carried = NOTHING, trained: bool = False, sharded: bool = False
) -> Opened:  # fmt: skip
    """Base model and tokenizer; with `trained`, the run's method on it, its parameters still to be read.

    Args:
        sharded: as of `open_model`.
        carried: what an export says of the classifier in it.
    """
    tokenizer = load_tokenizer(config.model)
    config = replace(config, model=settle_template(config.model, config.data, config.objective, tokenizer, Watch().say))
    if config.objective.label_prompt is not None:
        carried.require_tokens(config.objective, tokenizer, f"model.path={what}")
    architecture = load_architecture(config.model, len(tokenizer))
    stops = stop_token_ids(tokenizer, model_stop_ids(config.model, architecture))
    choose_pad_token(tokenizer, config.model.pad_token, stops)
    heads = heads_of(config.objective)
    if heads and len(labels) < 2:
        remedy = "Give data.labels=[...] in the order of the outputs, or a model that names them"
        raise InputError("data.labels", "a classifier's classes are not known", remedy)
    dtype = storage_dtype(config.model.dtype, config.method) if trained else getattr(torch, config.model.dtype.value)
    args = (config.model, architecture, tokenizer, labels if heads else None, config.seed, dtype)
    merging = trained and merges(config.model)
    model, weights = load(*args, sharded and not merging, Watch().say)
    if merging:
        model = merge_start(model, config.model, len(tokenizer), Watch().say)
    if trained:
        apply_method(config.method, model, heads, config.seed, find_unused(model, heads) if weights is None else ())
        widen_masters(model)
        narrow_frozen(model, config.model.dtype)
    if weights is not None:
        weights.take(model)
    if not heads:
        set_generation(model, tokenizer)
    if trained:  # last: by the tokenizer's own template it is settled where answers stop
        name_rendering(tokenizer, config.objective, read_back=True)
    data: DataConfig = replace(config.data, labels=labels) if labels else config.data
    below = carried.below if labels else None
    return Opened(
        replace(config, data=data), model, tokenizer, heads, labels, stops, what, below=below, weights=weights
    )
