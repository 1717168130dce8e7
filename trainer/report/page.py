"""The report's page: facts put into `report.html.j2`. Everything that comes from data or a model is escaped."""

from __future__ import annotations

import re
import shlex
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from tritune.trainer import __version__
from tritune.trainer.config.axes import CLASSIFICATION, Metric
from tritune.trainer.config.registry import axis_options
from tritune.trainer.metrics.progress import duration
from tritune.trainer.report.data_plots import pictures as data_pictures
from tritune.trainer.report.plots import curves
from tritune.trainer.report.record import Record
from tritune.trainer.report.risk import coverage_table, risk_pictures

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHARES = (
    "accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "coverage",
    "answered_accuracy",
)  # shown in percent
NAMES = {
    "bits_per_byte": "bits per byte",
    "macro_f1": "macro F1",
    "coverage": "answered (coverage)",
    "answered_accuracy": "accuracy where answered",
}
_SPECIAL = re.compile(r"<\|?[A-Za-z_/]+\|?>")


def render(record: Record) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        record=record,
        version=__version__,
        question=record.config["report"]["question"] or _question(record.config),
        headline=_headline(record),
        state=record.summary.get("status") or record.status.get("state", "unknown"),
        ended=record.summary.get("time") or record.status.get("time", ""),
        results=_results(record),
        samples=[{k: _marked(v) if isinstance(v, str) else v for k, v in s.items()} for s in record.samples],
        coverage=coverage_table(record.summary.get("abstain")),
        pictures=curves(record.steps, record.evaluations)
        + risk_pictures(record.summary.get("abstain"))
        + data_pictures(record.audit.get("splits", {})),
        data=_data(record.data),
        speed=_speed(record),
        written=_written(record.summary.get("export")),
        config=yaml.safe_dump(record.config, sort_keys=False),
        environment=_environment(record.environment),
        command="tritune train " + shlex.join(record.environment.get("overrides", [])),
    )


def _question(config: dict[str, Any]) -> str:
    model = config["model"]["path"]
    what = f"{Path(model).name}" if model else f"a {config['model']['config'].get('model_type')} with random weights"
    kind = axis_options("method").get(config["method"]["name"])
    given = {f.name: config["method"][f.name] for f in fields(kind) if f.name in config["method"]} if kind else {}
    trains = (kind and kind(**given).what_trains()) or config["method"]["name"]
    data = Path(config["data"]["train"]).name if config["data"]["train"] else "its data"
    return f"What does {trains} on {data} make of {what}?{_title(config)}"


def _title(config: dict[str, Any]) -> str:
    """What the objective does, in brackets; empty where the file that has the objective is not loaded here."""
    objective = axis_options("objective").get(config["objective"]["name"])
    return f" ({objective.title})" if objective is not None and objective.title else ""


def _headline(record: Record) -> str:
    """The answer in a line: the first figure that a reader would ask for, before and after."""
    for split in ("test", "validation"):
        pair = record.eval.get(split)
        if pair:
            tuned, base = pair["tuned"] or {}, pair["base"] or {}
            figure = next((f for f in ("accuracy", "perplexity", "loss") if f in tuned), None)
            if figure:
                before = f"{_value(figure, base[figure])} before, " if figure in base else ""
                name = NAMES.get(figure, figure)
                return f"{name.capitalize()} on the {split} split: {before}{_value(figure, tuned[figure])} after."
    state = record.status.get("state", "unknown")
    return f"The run is {state}" + (f" at step {record.steps[-1]['step']}." if record.steps else ".")


def _results(record: Record) -> list[dict[str, Any]]:
    rows = []
    objective = axis_options("objective").get(record.config["objective"]["name"])
    metrics = CLASSIFICATION | (dict(objective.metrics) if objective is not None else {})
    for split, pair in record.eval.items():
        tuned, base = pair["tuned"] or {}, pair["base"] or {}
        for index, (figure, after) in enumerate(tuned.items()):
            before = base.get(figure)
            better = None
            if before is not None and after is not None and before != after:
                better = (after > before) == metrics.get(figure, Metric()).higher_is_better
            count = record.data.get(split, {}).get("rows")
            rows.append({
                "split": split if index == 0 else "", "rows": count if index == 0 else None,
                "figure": NAMES.get(figure, figure.replace("_", " ")), "base": _value(figure, before),
                "tuned": _value(figure, after), "better": better,
            })  # fmt: skip
    return rows


def _value(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if figure in SHARES:
        return f"{value:.1%}"
    return f"{value:#.4g}".rstrip(".") if abs(value) < 1e4 else f"{value:.2e}"


def _data(data: dict[str, Any]) -> list[dict[str, Any]]:
    splits = [(n, r) for n, r in data.items() if isinstance(r, dict)]
    return [
        {
            "split": name,
            "rows": f"{r['rows']:,}",
            "tokens": f"{r['tokens']:,}",
            "supervised": f"{r['supervised_tokens'] / max(r['tokens'], 1):.0%}" if r["supervised_tokens"] else "-",
            "cut": f"{r['truncated_rows']:,}",
            "dropped": f"{r['dropped'] + r['bad'] + r['duplicates'] + r['too_long']:,}",
        }
        for name, r in splits
    ]


def _speed(record: Record) -> list[tuple[str, str]]:
    summary, steps = record.summary, record.steps
    facts: list[tuple[str, str]] = []
    if summary.get("parameters"):
        trainable, total = summary["parameters"]["trainable"], summary["parameters"]["total"]
        facts.append(("parameters that train", f"{trainable:,} of {total:,} ({trainable / max(total, 1):.1%})"))
    if summary.get("step"):
        facts.append(("steps", f"{summary['step']:,}" + (" (stopped early)" if summary.get("stopped_early") else "")))
        facts.append(("training time", f"{duration(summary['train_seconds'])} (min:s), without evaluation"))
        facts.append(("time of a step", f"{summary['train_seconds'] / summary['step'] * 1000:,.1f} ms on average"))
        facts.append(("tokens", f"{summary['tokens']:,}, of them {summary['label_tokens']:,} predicted"))
    rates = [s["tokens_per_second"] for s in steps if s.get("tokens_per_second")]
    if rates:
        facts.append(("tokens per second", f"{statistics.median(rates):,.0f} (median of steps)"))
        facts.append(("peak memory", f"{max(s['memory_gib'] for s in steps):.2f} GiB on rank 0"))
    if summary.get("skipped_steps"):
        facts.append(("steps not applied", f"{summary['skipped_steps']} (a loss or gradient was not finite)"))
    return facts


def _written(export: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not export:
        return []
    if "error" in export:
        return [("nothing", export["error"])]
    return [
        ("form", export["form"]),
        ("folder", export["directory"]),
        ("weights", f"{export['num_bytes']:,} bytes"),
        ("reloaded with", export["reader"]),
        ("largest logit difference", f"{export['max_difference']:.1e} (allowed {export['allowed']:.1e})"),
        ("KL divergence", f"{export['kl']:.1e} nats"),
    ]


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (k, str(environment[k])) for k in ("python", "platform", "device", "cpus", "world_size") if k in environment
    ]
    return facts + [(name, v) for name, v in environment.get("packages", {}).items() if v]


def _marked(text: str) -> Markup:
    """Escape, and set special tokens such as `<|im_start|>` back from the words."""
    parts, last = [], 0
    for found in _SPECIAL.finditer(text):
        parts += [escape(text[last : found.start()]), Markup('<span class="token">'), escape(found.group())]
        parts += [Markup("</span>")]
        last = found.end()
    return Markup("").join([*parts, escape(text[last:])])
