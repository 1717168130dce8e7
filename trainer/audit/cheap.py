"""What the tokenized rows alone say: read off their tables without a text, so that every training run can afford it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase
from tritune.trainer.audit.findings import PLACES, Finding, Severity, counted
from tritune.trainer.audit.reading import similar_labels, unread
from tritune.trainer.audit.repeats import contents_of, repeats
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import BadRows, Overlong, SpecialTokens, Unrendered
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.encode import chat_template
from tritune.trainer.data.examples import Examples, as_numpy, flat
from tritune.trainer.data.masks import verify
from tritune.trainer.data.remarks import Kind, named
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.splits import Splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import adds_bos

RATIO = 10  # of the commonest label's rows to the rarest's; BANKING77, which trains well, has 5
UNSPELT = 1e-3  # the share of tokens from which it is a warning that they stand for characters without one
SHOWN = 12  # characters
PROBE = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]


def cheap_findings(
    data: DataConfig, objective: ObjectiveConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> list[Finding]:
    """Rows left out and cut, stop and BOS tokens, the chat template on a probe, exact repetitions and leaks, labels.

    Costs under a second a million rows. Blocks of pre-training text say nothing of the documents in them: repetitions
    are not looked for there.

    Args:
        splits: as they were read, with `data` or more leniently; what would have been refused by `data` is a fault.
    """
    findings: list[Finding] = []
    for name, examples in splits.examples.items():
        findings += [*_left_out(data, name, examples), *_cut(data, name, examples)]
        findings += unread(name, examples.report)
        findings += _double_bos(objective, name, examples, tokenizer)
        if (
            objective.learns is Learns.answers
            and name != "retention"
            and len(examples)
            and not examples.report.stop_rows
        ):
            severity = Severity.fault if data.require_stop_token else Severity.note
            text = f"{name}: no row trains a stop token, so the model would not learn to end an answer"
            findings.append(Finding(Check.no_stop_token, severity, len(examples), text, details={"split": name}))
        findings += _said(data, name, examples)
    findings += _template(data, objective, tokenizer)
    findings += repeats({name: contents_of(examples) for name, examples in splits.examples.items()})
    if "train" in splits.examples and splits.labels:
        findings += [*label_balance(splits), *similar_labels(splits)]
    return findings


def _left_out(data: DataConfig, name: str, examples: Examples) -> Iterator[Finding]:
    report = examples.report
    if report.bad:
        severity = Severity.note if data.bad_rows is BadRows.skip else Severity.fault
        text = f"{name}: {counted(report.bad, 'row')} that cannot be read"
        yield Finding(Check.bad_rows, severity, report.bad, text, list(report.bad_places), details={"split": name})
    if not data.overlong.cuts:  # rows that are too long are left out whole, or refused
        report = replace(report, dropped=report.dropped - report.beyond, beyond=0)
    if report.dropped:
        severity = Severity.fault if report.ends_the_run(data.unsupervised) else Severity.note
        text = f"{name}: {counted(report.dropped, 'row')} without a token to train on"
        places = list(report.dropped_places)
        yield Finding(Check.unsupervised, severity, report.dropped, text, places, details={"split": name})


def _said(data: DataConfig, name: str, examples: Examples) -> Iterator[Finding]:
    """What was said of rows when they were encoded."""
    for kind, tally in examples.report.remarks.items():
        rows, details = tally["rows"], {"split": name, **tally["parts"]}
        match kind:
            case Kind.apart:
                text = (
                    f"{name}: {counted(tally['parts']['conversations'], 'conversation')} in {counted(rows, 'row')}: the"
                )
                text += " template writes earlier answers otherwise once another turn follows"
                yield Finding(Check.turns_apart, Severity.note, rows, text, tally["places"], details=details)
            case Kind.unrendered:
                text = f"{name}: {counted(rows, 'row')} of which the chat template leaves something out: {named(tally['parts'])}"
                severity = Severity.fault if data.unrendered is Unrendered.refuse else Severity.warning
                if severity is Severity.warning:
                    text += "; trained without it (data.unrendered=warn)"
                yield Finding(Check.unrendered, severity, rows, text, tally["places"], details=details)
            case Kind.control:
                kept = data.special_tokens is SpecialTokens.keep
                text = f"{name}: {counted(rows, 'row')} with control tokens in their texts: {named(tally['parts'])}; encoded as "
                text += "the tokens that they are (data.special_tokens=keep)" if kept else "text"
                yield Finding(Check.control_tokens, Severity.warning, rows, text, tally["places"], details=details)
            case Kind.unknown | Kind.by_bytes | Kind.unknown_answers:
                yield _unspelt(name, examples, kind, tally)
            case Kind.truncated_answers if data.overlong.cuts:
                text = f"{name}: {counted(rows, 'row')} with a cut answer: {tally['parts']['tokens']:,} trained tokens lost. "
                text += f"data.max_length={int(as_numpy(examples.table['full_length']).max())} holds them whole"
                yield Finding(Check.truncated_answers, Severity.warning, rows, text, tally["places"], details=details)
            case Kind.empty:
                text = f"{name}: {counted(rows, 'row')} with an answer that trains nothing but what closes it"
                yield Finding(Check.empty_answers, Severity.warning, rows, text, tally["places"], details=details)


def _unspelt(name: str, examples: Examples, kind: str, tally: dict[str, Any]) -> Finding:
    """Tokens that stand for characters which the tokenizer does not have; a warning from a thousandth on."""
    report, count = examples.report, sum(tally["parts"].values())
    answers = kind == Kind.unknown_answers
    share = count / max(report.supervised_tokens if answers else report.tokens, 1)
    how = "are spelt byte by byte" if kind == Kind.by_bytes else "are <unk>"
    text = (
        f"{name}: {share:.2%} of the {'trained ' if answers else ''}tokens {how}, in {counted(tally['rows'], 'row')}: "
    )
    text += named({repr(c)[1:-1] if len(c) == 1 else c: n for c, n in tally["parts"].items()}, SHOWN)
    text += "; a model cannot learn to write these" if answers else ""
    severity = Severity.warning if share > UNSPELT else Severity.note
    details = {"split": name, "kind": str(kind), "share": share, "characters": tally["parts"]}
    return Finding(Check.unspelt, severity, tally["rows"], text, tally["places"], details=details)


def _cut(data: DataConfig, name: str, examples: Examples) -> Iterator[Finding]:
    full = as_numpy(examples.table["full_length"])
    long = np.flatnonzero(full > examples.lengths)
    count, tokens = len(long) + examples.report.too_long, int((full - examples.lengths)[long].sum())
    if not count or name == "retention":  # which is cut to a length of its own
        return
    limit = data.max_length
    text = f"{name}: {count:,} of {len(full) + examples.report.too_long:,} rows over {limit:,} tokens"
    details = {"split": name, "tokens": tokens, "longest": int(full.max()) if len(full) else None}
    places = [examples.place(row) for row in long[:PLACES].tolist()]
    notes = [f"{length:,} tokens" for length in full[long[:PLACES]].tolist()]
    match data.overlong:
        case Overlong.cut | Overlong.cut_prompt_start | Overlong.cut_prompt_middle:
            share = tokens / max(int(full.sum()), 1)
            text += f", cut: {tokens:,} tokens lost, {share:.1%}"
            yield Finding(Check.truncation, Severity.warning, count, text, places, notes, details)
        case Overlong.drop:
            yield Finding(Check.truncation, Severity.note, count, f"{text}, left out", places, notes, details)
        case Overlong.refuse:
            severity = Severity.note if data.bad_rows is BadRows.skip else Severity.fault
            yield Finding(Check.bad_rows, severity, count, text, places, notes, details)


def _double_bos(
    objective: ObjectiveConfig, name: str, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Finding]:
    """Two BOS tokens at the start of a row; in blocks of text, where documents begin anywhere, two anywhere."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    anywhere = objective.learns is Learns.text and bos != tokenizer.eos_token_id and adds_bos(tokenizer)
    rows: list[np.ndarray] = []
    number = 0
    for chunk in examples.table["ids"].chunks:
        rows.append(number + np.flatnonzero(_twice(chunk, bos, anywhere)))
        number += len(chunk)
    found = np.concatenate([np.zeros(0, np.int64), *rows])
    if len(found):
        what = "holding" if anywhere else "that begin with"
        text = f"{name}: {len(found):,} of {number:,} rows {what} two BOS tokens ({tokenizer.bos_token})"
        places = [examples.place(row) for row in found[:PLACES].tolist()]
        yield Finding(Check.double_bos, Severity.fault, len(found), text, places, details={"split": name})


def _twice(chunk: pa.ListArray, bos: int, anywhere: bool) -> np.ndarray:
    """Which rows have `bos` twice in a row, bool [n]."""
    values, offsets = flat(chunk)
    starts, ends = offsets[:-1], offsets[1:]
    twice = np.zeros(len(chunk), bool)
    if anywhere:
        pairs = np.flatnonzero((values[:-1] == bos) & (values[1:] == bos))
        pairs = pairs[(pairs >= offsets[0]) & (pairs + 1 < offsets[-1])]
        row = np.searchsorted(offsets, pairs, side="right") - 1
        twice[row[pairs + 1 < ends[row]]] = True
    else:
        long = ends - starts > 1
        twice[long] = (values[starts[long]] == bos) & (values[starts[long] + 1] == bos)
    return twice


def _template(data: DataConfig, objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """The chat template on a conversation of ours; one that it refuses shows nothing."""
    if objective.learns is not Learns.answers or not tokenizer.chat_template or "assistant" not in data.train_on:
        return
    template = chat_template(tokenizer, data)
    try:
        said = verify(tokenizer, template, PROBE, "a probe conversation")
    except InputError as error:
        said = _begins_otherwise(template, error)
    if said is not None and is_mismatch(said):
        yield Finding(Check.template_mismatch, Severity.fault, 1, f"the chat template: {said}")


def is_mismatch(said: str) -> bool:
    """Whether what `templates.verify` says is of the tokens that the model is asked with. It also says when the answer's
    tokens do not spell its text, as with a tokenizer that folds case, which harms nobody."""
    return "its tokens spell" not in said


def _begins_otherwise(template: ChatTemplate, error: InputError) -> str | None:
    """What `error`, of rendering the probe, comes from; None if not from the generation prompt."""
    try:
        asked = template.prompt(PROBE[:1], "a probe conversation")
    except InputError:
        return None  # a template that takes no such conversation: the rows have to show
    return f"{error.rule} (asked, it ends with {asked[-40:]!r})"


def label_balance(splits: Splits) -> Iterator[Finding]:
    """Labels that never occur in train, or far less often than the commonest."""
    labels = splits.examples["train"].labels
    counts = np.bincount(labels[labels >= 0], minlength=len(splits.labels))
    rare, common = int(counts.argmin()), int(counts.argmax())
    if counts[rare] * RATIO >= counts[common]:
        return
    few = np.flatnonzero(counts * RATIO < counts[common])
    text = f"train: {len(few):,} of {len(counts):,} labels have less than a tenth of the rows of the commonest"
    text += f" ({splits.labels[rare]}: {counts[rare]:,}, {splits.labels[common]}: {counts[common]:,})"
    details = {"labels": {splits.labels[i]: int(counts[i]) for i in few}}
    yield Finding(Check.label_balance, Severity.warning, len(few), text, details=details)
