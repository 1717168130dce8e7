"""The export tried before the first step, on files without weights: what would fail after days of training fails now."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from tritune.trainer.config.choices import Form
from tritune.trainer.errors import InputError, reason
from tritune.trainer.export.card import write_card
from tritune.trainer.export.check import Agreement
from tritune.trainer.export.source import Source, choose_form
from tritune.trainer.export.tokenizer_files import write_tokenizer
from tritune.trainer.export.write import new_folder
from tritune.trainer.methods.adapter_io import save_settings
from tritune.trainer.methods.states import as_it_is, shapes_of
from tritune.trainer.model.load import auto_class
from tritune.trainer.model.scorer import TESTED_FAMILIES

_PASSING = {"transformers_version", "_name_or_path", "architectures", "dtype", "use_cache"}  # what a save may change
_WITHOUT = "Mend it, or train without an export (export.enabled=false)"
Shapes = dict[str, list[int]]


def rehearse(source: Source, directory: Path, say: Callable[[str], None]) -> None:
    """Write and read back all of an export but its weights, whose names and shapes are compared; leave nothing behind.

    Args:
        source: before anything is sharded; meta parameters are fine, `logits` is not asked.
        directory: where the export will be.

    Raises:
        InputError: what could not be saved, or would come back as something else.
    """
    form = choose_form(source, lambda text: None)
    try:
        partial = new_folder(directory)
    except OSError as error:
        rule = f"it cannot be written ({error.strerror or error})"
        raise InputError(f"export.dir={directory}", rule, "Give another export.dir, or export.enabled=false") from None
    parts = {
        "the tokenizer": lambda: write_tokenizer(partial, source, say),
        "the generation config": lambda: _try_generation_config(partial, source),
        "the model's config": lambda: _try_config(partial, source, say),
        "the weights": lambda: _try_weights(partial, source, form, say),
        "the model card": lambda: write_card(partial, source, form, Agreement(0.0, 0.0, 0.0, 0.0, "nothing yet")),
    }
    try:
        for what, attempt in parts.items():
            try:
                attempt()
            except InputError:
                raise
            except Exception as error:
                rule = f"{what} of the export could not be saved when training is over ({reason(error)})"
                raise InputError(f"export.form={form.value}", rule, _WITHOUT) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _try_generation_config(partial: Path, source: Source) -> None:
    if not source.heads:
        source.model.generation_config.save_pretrained(partial)  # type: ignore[union-attr,operator]


def _try_config(partial: Path, source: Source, say: Callable[[str], None]) -> None:
    config = source.model.config
    config.save_pretrained(partial)
    before, after = (
        json.loads(c.to_json_string(use_diff=False)) for c in (config, AutoConfig.from_pretrained(partial))
    )
    changed = sorted(k for k in {*before, *after} - _PASSING if before.get(k) != after.get(k))
    if changed:
        key = changed[0]
        rule = f"its config comes back from a file with other values: {key} was {before.get(key)}, is {after.get(key)}"
        if not source.config.export.insist:
            remedy = "export.insist=true trains, and writes it as it is"
            raise InputError(f"model.path={source.config.model.path}", rule, remedy)
        say(f"export    {rule}; it will be written as it is (export.insist)")


def _try_weights(partial: Path, source: Source, form: Form, say: Callable[[str], None]) -> None:
    if form is not Form.adapter:
        return _try_whole(partial, source)
    if not source.config.method.in_peft:
        return _try_own(partial, source)
    if _plain(source):
        return None
    try:
        _try_adapter(partial, source)
    except InputError as error:
        if source.config.export.form is not Form.auto or not source.config.method.merges:
            raise
        say(f"export    no adapter, but the merged model in the end: {error.rule}")
        _try_whole(partial, source)


def _plain(source: Source) -> bool:
    """Whether the adapter is of the form that tests hold against PEFT for this family. Importing PEFT takes about a tenth
    of the way to the first step, and is left to the end for these."""
    return not source.config.method.needs_peft(source.heads) and source.model.config.model_type in TESTED_FAMILIES


def _try_whole(partial: Path, source: Source) -> None:
    """The names that will be written are those of the model that the written config describes."""
    _compare(source.config.method.whole_shapes(source.model), shapes_of(_empty_model(source, partial)), source)


def _try_adapter(partial: Path, source: Source) -> None:
    """The names that will be written are those of PEFT's own adapter by the written settings."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = source.config
    save_settings(partial, config.method, source.model, source.heads, config.model.path, config.model.revision)
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")  # PEFT's advice on ties: the logits are compared in the end
        model = get_peft_model(_empty_model(source, partial), PeftConfig.from_pretrained(str(partial)))
    expected = _shapes(config.method.adapter_tensors(source.model, source.heads, as_it_is))
    _compare(expected, _shapes(get_peft_model_state_dict(model, save_embedding_layers=False)), source)


def _try_own(partial: Path, source: Source) -> None:
    """The names that will be written are those of the method's layers on a fresh base."""
    method, heads = source.config.method, source.heads
    fresh = _empty_model(source, partial)
    with init_empty_weights(include_buffers=False):
        method.attach(fresh, heads, 0, ())
    written, read = (_shapes(method.adapter_tensors(m, heads, as_it_is)) for m in (source.model, fresh))
    _compare(written, read, source)


def _empty_model(source: Source, partial: Path) -> PreTrainedModel:
    """What transformers makes of the config in `partial`, without values."""
    auto = auto_class(source.model.config, bool(source.heads))
    with init_empty_weights(include_buffers=False):
        return auto.from_config(AutoConfig.from_pretrained(partial), dtype=torch.float32)


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _compare(written: Shapes, read: Shapes, source: Source) -> None:
    differ = sorted(n for n in {*written, *read} if written.get(n) != read.get(n))
    if not differ:
        return
    name = differ[0]
    rule = (
        f"{len(differ)} tensor(s) of the export would not fit whoever reads it: {name} is "
        f"{written.get(name, 'not')} written, and {read.get(name, 'not')} expected"
    )
    remedy = "Try another export.form, or train without an export (export.enabled=false)"
    raise InputError(f"model.path={source.config.model.path or source.config.model.config}", rule, remedy)
