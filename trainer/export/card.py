"""The model card in Hugging Face's form: `README.md` with metadata that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tritune.trainer import __version__
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.choices import Form, Storage
from tritune.trainer.export.card_labels import asking, labels_part
from tritune.trainer.model.load import auto_class
from tritune.trainer.redact import redact

if TYPE_CHECKING:
    from tritune.trainer.export.check import Agreement
    from tritune.trainer.export.source import Source


def write_card(directory: Path, source: Source, form: Form, agreement: Agreement) -> None:
    """Write `README.md`: what it is, how to load it, how it was trained, how it scores. Data files by name, not by path."""
    config = source.config
    name = Path(config.run.dir).name if config.run.dir else "model"
    parts = [
        "---\n" + yaml.safe_dump(_metadata(source, form, name), sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        _what(source, form),
        "## Load",
        _load(source, form),
        *labels_part(source, form),
        "## Scores",
        _scores(source.facts.get("eval") or {}),
        "## Training",
        _training(source),
        f"Written by Tritune {__version__}. Reloaded with {agreement.reader}, {_verdict(agreement)}: {agreement.line()}.",
    ]
    (directory / "README.md").write_text(redact("\n\n".join(p for p in parts if p)) + "\n")


def _verdict(agreement: Agreement) -> str:
    if agreement.holds:
        return "it gives the trained model's logits"
    return "**it does not give the trained model's logits**, and was written because `export.insist` asked for it"


def _metadata(source: Source, form: Form, name: str) -> dict[str, Any]:
    config = source.config
    metadata: dict[str, Any] = {
        "library_name": _library(source, form),
        "pipeline_tag": "text-classification" if source.heads else "text-generation",
        "tags": ["tritune", config.objective.name, *config.method.tags],
    }
    if config.model.path:
        metadata["base_model"] = _base_name(config.model)
        metadata["base_model_relation"] = {Form.adapter: form.value, Form.merged: "merge"}.get(form, "finetune")
    task = {"type": metadata["pipeline_tag"]}
    results = []
    for split, pair in (source.facts.get("eval") or {}).items():
        values = [{"type": k, "value": v} for k, v in (pair["tuned"] or {}).items() if v is not None]
        results.append({"task": task, "dataset": {"name": split, "type": "local"}, "metrics": values})
    if results:
        metadata["model-index"] = [{"name": name, "results": results}]
    return metadata


def _library(source: Source, form: Form) -> str:
    if form is not Form.adapter:
        return "transformers"
    return "peft" if source.config.method.in_peft else "tritune"


def _what(source: Source, form: Form) -> str:
    config = source.config
    made = config.method.made_as(form)
    base = f"`{_base_name(config.model)}`" if config.model.path else "a model with random weights"
    question = f"\n\nThe question: {config.report.question}" if config.report.question else ""
    return f"{made} {base}; objective `{config.objective.name}`.{question}"


def _base_name(model: ModelConfig) -> str:
    path = str(model.path)
    return Path(path).name if Path(path).is_dir() else path


def _load(source: Source, form: Form) -> str:
    if _library(source, form) != "tritune":
        return f"```python\n{_snippet(source, form)}\n```"
    asked = "generate.file=rows.jsonl generate.out=answers.jsonl"
    return f"PEFT has no such method; Tritune puts the adapter on its base:\n\n```sh\ntritune generate model.path=. {asked}\n```"


def _snippet(source: Source, form: Form) -> str:
    auto = auto_class(source.model.config, bool(source.heads)).__name__
    lines, asked = [f"from transformers import {auto}, AutoTokenizer", ""], asking(source, form)
    if form is not Form.adapter:
        lines += ['tokenizer = AutoTokenizer.from_pretrained(".")', f'model = {auto}.from_pretrained(".")']
        return "\n".join([*lines, *asked])
    options = f", num_labels={len(source.labels)}" if source.heads else ""
    lines[0:1] = [*(["import json", ""] if asked else []), "from peft import PeftModel", lines[0]]
    lines += ['tokenizer = AutoTokenizer.from_pretrained(".")']
    lines += [f'base = {auto}.from_pretrained("{_base_name(source.config.model)}"{options})']
    if source.config.model.add_tokens or source.config.model.chat_template == "chatml":
        lines += ["base.resize_token_embeddings(len(tokenizer))"]
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, ".")', *asked])


def _scores(results: dict[str, Any]) -> str:
    rows = []
    for split, pair in results.items():
        for figure, value in (pair["tuned"] or {}).items():
            shown = ["-" if v is None else f"{v:.4f}" for v in ((pair["base"] or {}).get(figure), value)]
            rows.append(f"| {split} | {figure} | {shown[0]} | {shown[1]} |")
    head = "| split | figure | base | this model |\n| --- | --- | ---: | ---: |\n"
    return head + "\n".join(rows) if rows else "None were computed."


def _lineage(found: dict[str, Any] | None) -> str | None:
    """The adapter from which the run went on: by the run and the step behind it, where they are known."""
    if not found:
        return None
    behind = f"step {found['step']} of {Path(found['run']).name}, " if "run" in found else ""
    merged = ", merged into its base" if found["mode"] == "merge" else ""
    return f"{behind}adapter sha256 {found['sha256'][:16]}{merged}"


def _training(source: Source) -> str:
    config, facts = source.config, source.facts
    rows: list[tuple[str, Any]] = [("method", config.method.name), *config.method.facts()]
    rows += [
        ("went on from", _lineage(facts.get("lineage"))),
        ("data", Path(config.data.train).name if config.data.train else None),
        ("sequences per step", config.train.batch_size),
        ("steps", facts.get("tested_step") or facts.get("step")),
        ("tokens", facts.get("tokens")),
        ("optimizer", f"{config.optim.name}, lr {config.optim.lr}, {config.optim.schedule.value}"),
        ("precision", config.model.dtype.value),
        ("storage of the base", None if config.model.storage is Storage.plain else config.model.storage.value),
        ("seed", config.seed),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    return f"| | |\n| --- | --- |\n{table}"
