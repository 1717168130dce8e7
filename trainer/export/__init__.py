"""Write a trained model for other tools, and prove it by reading it back with them before saying that it is done."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.config import ModelConfig
from tritune.trainer.config.choices import Form
from tritune.trainer.errors import ExportError, InputError
from tritune.trainer.export.card import write_card
from tritune.trainer.export.check import Agreement, compare, probe_ids
from tritune.trainer.export.source import Source, choose_form
from tritune.trainer.export.tokenizer_files import write_tokenizer
from tritune.trainer.export.write import new_folder, write_adapter, write_whole

EXPORT_FILES = ("README.md", "*.json", "*.safetensors", "chat_template.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Exported:
    """What was written: form, bytes of weights, and how the reloaded model compared."""

    form: Form
    directory: Path
    num_bytes: int
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form.value,
            "directory": str(self.directory),
            "num_bytes": self.num_bytes,
            **vars(self.agreement),
        }


def export(source: Source, directory: Path, say: Callable[[str], None]) -> Exported:
    """Write `directory` whole, or not at all; what stood there before stays until the new one was read back.

    Raises:
        InputError: merging is impossible for this model, or something else stands in `directory`.
        ExportError: what was written does not compute what was trained.
    """
    run = source.config.run.dir
    require_replaceable(directory, source.config.model, Path(run) if run else None)
    form = choose_form(source, say)
    try:
        return _export(source, form, directory, say)
    except ExportError as error:
        if source.config.export.form is not Form.auto or form is not Form.adapter or not source.config.method.merges:
            raise
        say(f"export    no adapter: {error}")
        say("export    the merged model is written instead; export.form=adapter insists")
        return _export(source, Form.merged, directory, say)


def require_replaceable(directory: Path, model: ModelConfig, run: Path | None) -> None:
    """Refuse to write an export where anything but an earlier export stands.

    Raises:
        InputError: the folder is the base model, the adapter that the run began with, the run, or holds other files.
    """
    target, value = directory.resolve(), f"export.dir={directory}"
    remedy = "Give a folder of its own"
    for path, name in (
        (model.path, "the base model"),
        (model.adapter, "the adapter that it began with"),
        (run, "the run"),
    ):
        if path and Path(path).exists() and (target == Path(path).resolve() or target in Path(path).resolve().parents):
            raise InputError(value, f"{name} is there, and an export replaces what it finds", remedy)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(value, "it is a file", remedy)
    names = {p.name for p in directory.iterdir()}
    card = directory / "README.md"
    ours = card.is_file() and "Written by Tritune" in card.read_text(encoding="utf-8", errors="replace")
    unknown = sorted(n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in EXPORT_FILES))
    if names and (unknown or not ours):
        rule = f"it holds {', '.join(unknown[:3]) or 'a model'}, which no export of ours left there"
        raise InputError(value, rule, remedy)


def _export(source: Source, form: Form, directory: Path, say: Callable[[str], None]) -> Exported:
    insist = source.config.export.insist
    partial = new_folder(directory)
    try:
        write_tokenizer(partial, source, say)
        size = (write_adapter if form is Form.adapter else write_whole)(partial, source, say)
        agreement = compare(partial, source, form, probe_ids(source.model, source.tokenizer))
        if not agreement.holds and not insist:
            raise ExportError(f"{agreement.reader} loads another model than was trained: {agreement.line()}")
        write_card(partial, source, form, agreement)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
    say(f"export    {form.value}, {size:,} bytes of weights: {directory}")
    said = "" if agreement.holds else "; written all the same (export.insist), and the card says so"
    say(f"export    reloaded with {agreement.reader}: {agreement.line()}{said}")
    return Exported(form, directory, size, agreement)
