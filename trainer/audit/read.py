"""Everything that the configuration names, read leniently: what would stop a run is counted, and reading goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.audit.facts import facts_of
from tritune.trainer.audit.findings import PLACES, Finding, Severity, counted
from tritune.trainer.audit.review import review
from tritune.trainer.audit.sightings import hide
from tritune.trainer.audit.texts import Part, Texts, parts_of, read_texts
from tritune.trainer.config import Config, ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import BadRows, Duplicates, Overlong, Unrendered, Unsupervised
from tritune.trainer.config.data import Check, DataConfig, training_sources
from tritune.trainer.data.encoded import BEYOND
from tritune.trainer.data.examples import as_numpy
from tritune.trainer.data.plain_chat import settle_template
from tritune.trainer.data.splits import Splits, Watch, read_splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.generation_config import model_stop_ids
from tritune.trainer.model.load import context_length, load_architecture
from tritune.trainer.model.tokenizer import load_tokenizer

_ORDER = {severity: number for number, severity in enumerate(Severity)}


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        facts: by split, of `facts_of`.
        findings: the gravest first.
        rejects: of every row that is left out: place, fate (bad, unsupervised), why, split's source key.
        about: what was read and with what: objective, tokenizer, max_length, context.
    """

    facts: dict[str, dict[str, Any]]
    findings: list[Finding]
    rejects: list[dict[str, str]]
    about: dict[str, Any] = field(default_factory=dict)


def read_audit(config: Config, watch: Watch) -> Audit:
    """Read every source twice, as tokens (cached) and as text, and say what is wrong.

    Raises:
        InputError: there is nothing to read, or no tokenizer.
    """
    parts = parts_of(config.data, config.objective)
    if not parts:
        raise InputError("data.train=None", "there is nothing to read", "Give data.train=<file>")
    tokenizer = load_tokenizer(config.model)
    model = settle_template(config.model, config.data, config.objective, tokenizer, watch.say)
    config = replace(config, model=model)
    data, objective = config.data, config.objective
    try:
        architecture = load_architecture(config.model, len(tokenizer))
        context = context_length(architecture, config.method.positions_taken)
        stops, unknown = model_stop_ids(config.model, architecture), None
    except InputError as error:  # a tokenizer alone is enough here
        context, stops, unknown = None, [], error.rule
    texts = read_texts(data, objective, config.audit, lambda key, rows: watch.notify(f"{key}, its text", rows, 0))
    labels = _label_set(data, objective, texts)
    lenient = replace(config, data=_lenient(data, [*labels, *_others(texts, labels)]))
    splits, faults = _splits(lenient.data, lambda names: read_splits(lenient, tokenizer, context, stops, names, watch))
    known = len(labels)
    splits.labels = splits.labels[:known]
    for examples in splits.examples.values():
        examples.labels[examples.labels >= known] = -1
    rejects = _rejects(splits, parts)
    findings = [Finding(Check.unreadable, Severity.fault, 1, hide(str(e))) for e in _distinct([*texts.faults, *faults])]
    if context is not None and data.max_length > context:
        text = f"data.max_length={data.max_length}, and the model has a context of {context:,} tokens"
        findings.append(Finding(Check.over_context, Severity.fault, 1, text))
    findings += _named(cheap_findings(data, objective, splits, tokenizer), rejects)
    findings += _unread(parts, splits, texts)
    reviewed = review(data, objective, texts, labels, tokenizer)
    if any(f.name is Check.bad_rows for f in findings):  # the rows of the sample among them
        reviewed = [f for f in reviewed if f.name is not Check.bad_rows]
    if any(f.name is Check.empty_answers for f in findings):  # the same, and those of calls that are not written
        reviewed = [f for f in reviewed if f.name is not Check.empty_answers]
    findings = _without_less(findings, reviewed) + reviewed
    findings = [_expected(data, objective, finding) for finding in findings]
    findings.sort(key=lambda f: (_ORDER[f.severity], list(Check).index(f.name)))
    about = {
        "objective": objective.name, "tokenizer": tokenizer.name_or_path or config.model.tokenizer,
        "max_length": data.max_length, "context": context, "context_unknown": unknown,
        "sources": {part.key: part.path for part in parts}, "labels": len(labels),
    }  # fmt: skip
    longest = [int(as_numpy(e.table["full_length"]).max()) for e in splits.examples.values() if len(e)]
    top = min(data.max_length, max(longest, default=1))
    facts = {n: facts_of(e, splits.labels, top) for n, e in splits.examples.items()}
    return Audit(facts, findings, rejects, about)


def _label_set(data: DataConfig, objective: ObjectiveConfig, texts: Texts) -> list[str]:
    """As `splits` has it: as given, or what occurs in train."""
    if objective.learns is not Learns.labels:
        return []
    return data.labels or sorted(texts.labels.get("train", {}))


def _others(texts: Texts, labels: list[str]) -> list[str]:
    return sorted({label for counts in texts.labels.values() for label in counts} - set(labels))


def _lenient(data: DataConfig, labels: list[str]) -> DataConfig:
    return replace(
        data, bad_rows=BadRows.skip, unsupervised=Unsupervised.drop, require_stop_token=False, unrendered=Unrendered.warn,
        overlong=data.overlong if data.overlong.cuts else Overlong.cut, duplicates=Duplicates.keep, labels=labels,
    )  # fmt: skip


def _splits(data: DataConfig, read_some: Callable[[Sequence[str]], Splits]) -> tuple[Splits, list[InputError]]:
    """The splits one by one, and why others are not there.

    Args:
        read_some: reads the splits of these names.
    """
    sources = training_sources(data)
    cut = [name for name in ("validation", "test") if getattr(data, f"{name}_share")]
    wanted = [("train", *cut)] if sources else []
    wanted += [(name,) for name in ("validation", "test", "retention") if getattr(data, name)]
    found, faults = Splits({}, data.labels, list(sources)), []
    for names in wanted:
        try:
            read = read_some(names)
            found.examples |= read.examples
            found.folders |= read.folders
        except InputError as error:
            faults.append(error)
    return found, faults


def _distinct(faults: list[InputError]) -> list[InputError]:
    return list({str(error): error for error in faults}.values())


def _rejects(splits: Splits, parts: list[Part]) -> list[dict[str, str]]:
    """The rows that were left out of the sources that could be read."""
    split_of, rejects = {part.key: part.split for part in parts}, []
    for row in splits.rejects():
        place, beyond, _ = row["place"].partition(BEYOND)
        why = BEYOND.strip(" ()") if beyond else hide(row["why"])
        rejects.append({**row, "place": place, "why": why, "split": split_of[row["source"]]})
    return rejects


def _named(findings: list[Finding], rejects: list[dict[str, str]]) -> list[Finding]:
    """With every place and reason of rows left out, of which a report has the first few."""
    fates = {Check.bad_rows: "bad", Check.unsupervised: "unsupervised"}
    named = []
    for finding in findings:
        rows = [
            r for r in rejects if r["fate"] == fates.get(finding.name) and r["split"] == finding.details.get("split")
        ][:PLACES]
        if rows and len(rows) >= len(finding.places) and "tokens" not in finding.details:
            finding = replace(finding, places=[r["place"] for r in rows], notes=[r["why"] for r in rows])
        named.append(finding)
    return named


def _expected(data: DataConfig, objective: ObjectiveConfig, finding: Finding) -> Finding:
    """Repetitions that training leaves out are no more than a note; those of several sources and of retention stay, and
    those between splits where a source of its own has one of them, or a content has several labels."""
    split = finding.details.get("split")
    near = data.duplicates is Duplicates.drop_near
    if data.duplicates is Duplicates.keep or split == "retention" or len(data.sources) > 1:
        return finding
    dropped = {Check.duplicates_exact, *([Check.duplicates_near] if near else [])}
    if not getattr(data, str(split), None) and not finding.details.get("relabelled"):
        labelled = objective.learns is Learns.labels  # of near ones those with the same label are left out
        dropped |= {Check.leakage_exact, Check.split_leaked, *([Check.leakage_near] if near and not labelled else [])}
    return replace(finding, severity=Severity.note) if finding.name in dropped else finding


def _unread(parts: list[Part], splits: Splits, texts: Texts) -> list[Finding]:
    """Bad rows of sources that gave no table, and so no rejects."""
    findings = []
    for part in parts:
        if part.split not in splits.examples and texts.bad[part.key]:
            count, places = texts.bad[part.key], texts.bad_places[part.key]
            text = f"{part.split}: {counted(count, 'row')} that cannot be read"
            names, why = [place for place, _ in places], [rule for _, rule in places]
            findings.append(Finding(Check.bad_rows, Severity.fault, count, text, names, why, {"split": part.split}))
    return findings


def _without_less(findings: list[Finding], reviewed: list[Finding]) -> list[Finding]:
    """Leave out what was found in the tables where the texts say it, and more: of rows and not of a probe; of normalised
    texts; of all documents and not of the retention text's alone."""
    said = {f.name for f in reviewed if f.severity is not Severity.note}
    said &= {Check.contradictions, Check.template_mismatch, Check.duplicates_exact}
    return [f for f in findings if f.name not in said]
