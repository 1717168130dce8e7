"""What the second reading of the rows found, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase
from tritune.trainer.audit.cheap import is_mismatch
from tritune.trainer.audit.findings import PLACES, Finding, Severity, beside, counted
from tritune.trainer.audit.repeats import Contents, repeats
from tritune.trainer.audit.sightings import hide
from tritune.trainer.audit.texts import Texts
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.choices import SpecialTokens
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.contradictions import contradictory
from tritune.trainer.data.control import ControlTokens
from tritune.trainer.data.encode import chat_template
from tritune.trainer.data.kinds import Record, turns_of
from tritune.trainer.data.masks import verify
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import render
from tritune.trainer.errors import InputError

COMPARED = 64  # training rows of a group that a row of another split is compared with


def review(
    data: DataConfig,
    objective: ObjectiveConfig,
    texts: Texts,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Finding]:
    """Near duplicates and leaks, questions with several answers, unknown labels, what rows show alone, and the
    chat template on a sample of rows. For pre-training exact repetitions of documents, too.

    Args:
        labels: the label set, of classification.
    """
    findings: list[Finding] = []
    if objective.learns is Learns.text:
        findings += repeats(_documents(texts))
    if texts.near is not None:
        findings += near(texts, data.similarity)
    if objective.learns is not Learns.text:
        findings += _answered_twice(texts, objective.learns is Learns.answers)
    if objective.learns is Learns.answers:
        findings += _prompt_leaks(texts)
    if objective.learns is Learns.labels:
        findings += _unknown_labels(texts, labels)
    findings += [found.finding(check) for check, found in texts.seen.items()]
    findings += _rendering(data, texts.sample, tokenizer)
    return findings


def _documents(texts: Texts) -> dict[str, Contents]:
    """Digests of the documents of pre-training, whose tables have blocks."""
    digests, splits, found = texts.keys(texts.digests), np.array(texts.splits), {}
    for number, name in enumerate(texts.names):
        rows = np.flatnonzero(splits == number)
        places = [texts.places[row] for row in rows.tolist()]
        found[name] = Contents(digests[rows], np.full(len(rows), -1), places.__getitem__)
    return found


def near(texts: Texts, similarity: float) -> Iterator[Finding]:
    """Rows that nearly repeat another of their split, and rows of other splits that nearly repeat one of train.

    Exact repetitions are not counted again. A row of a group counts once, however many it is near to.
    """
    assert texts.near is not None
    again: dict[int, list[tuple[int, int]]] = {}
    leaks: dict[int, list[tuple[int, int, float]]] = {}
    digests = texts.keys(texts.digests)
    trained = texts.names.index("train") if "train" in texts.names else -1
    for group in texts.near.groups():
        first: dict[int, dict[bytes, int]] = {}  # by split: contents and who has them first
        for row in group:
            first.setdefault(texts.splits[row], {}).setdefault(digests[row].tobytes(), row)
        for split, rows in first.items():
            one, *others = rows.values()
            again.setdefault(split, []).extend((other, one) for other in others)
            if split != trained and trained in first:
                for key, row in rows.items():
                    if key not in first[trained]:
                        alike = [(texts.near.similarity(row, t), t) for t in list(first[trained].values())[:COMPARED]]
                        best, other = max(alike, key=lambda pair: pair[0])
                        if best >= similarity - 1e-9:  # else only another row of the group lies between them
                            leaks.setdefault(split, []).append((row, other, best))
    counts = np.bincount(np.array(texts.splits, np.int64), minlength=len(texts.names))
    for split, pairs in sorted(again.items()):
        if pairs:
            pairs.sort()
            name, total = texts.names[split], int(counts[split])
            text = f"{name}: {len(pairs):,} of {counted(total, 'row')} nearly like another"
            places = [texts.places[a] for a, _ in pairs[:PLACES]]
            notes = [f"like {beside(texts.places[a], texts.places[b])}" for a, b in pairs[:PLACES]]
            details = {"split": name, "rows": total}
            yield Finding(Check.duplicates_near, Severity.warning, len(pairs), text, places, notes, details)
    for split, found in sorted(leaks.items()):
        found.sort()
        name = texts.names[split]
        text = f"{name}: {len(found):,} of {counted(counts[split], 'row')} nearly like one of train"
        notes = [f"like {beside(texts.places[a], texts.places[b])} ({alike:.0%})" for a, b, alike in found[:PLACES]]
        details = {"split": name, "rows": int(counts[split]), "share": len(found) / int(counts[split])}
        places = [texts.places[a] for a, _, _ in found[:PLACES]]
        yield Finding(Check.leakage_near, Severity.warning, len(found), text, places, notes, details)


def _answered_twice(texts: Texts, chat: bool) -> Iterator[Finding]:
    questions, answers = bytes(texts.questions), bytes(texts.answers)
    starts = range(0, len(questions), 16)
    found = contradictory((questions[i : i + 16], answers[i : i + 16].hex()) for i in starts)
    if not found:
        return
    rows = sum(len(part) for one in found for part in one.rows)
    pairs = [(other[0], one.rows[0][0]) for one in found for other in one.rows[1:]][:PLACES]
    places, notes = (
        [texts.places[a] for a, _ in pairs],
        [f"against {beside(texts.places[a], texts.places[b])}" for a, b in pairs],
    )
    if texts.said:
        notes = [f"{hide(texts.said[a])}, {n} {hide(texts.said[b])}" for (a, b), n in zip(pairs, notes, strict=True)]
    if chat:
        text = f"{counted(len(found), 'prompt')} answered in several ways ({rows:,} rows)"
        yield Finding(Check.same_prompt, Severity.note, len(found), text, places, notes)
    else:
        text = f"{counted(len(found), 'text')} with several labels ({rows:,} rows)"
        yield Finding(Check.contradictions, Severity.warning, len(found), text, places, notes)


def _prompt_leaks(texts: Texts) -> Iterator[Finding]:
    """Prompts of other splits that train has with another answer: whole rows that it has are leaks already."""
    questions, answers = texts.keys(texts.questions), texts.keys(texts.answers)
    splits = np.array(texts.splits)[: len(questions)]
    first: dict[bytes, int] = {}
    whole: set[bytes] = set()
    for row in np.flatnonzero(splits == (texts.names.index("train") if "train" in texts.names else -1)).tolist():
        first.setdefault(questions[row].tobytes(), row)
        whole.add(questions[row].tobytes() + answers[row].tobytes())
    for number, name in enumerate(texts.names):
        if name == "train" or not texts.asked[number]:
            continue
        rows = [
            row for row in np.flatnonzero(splits == number).tolist()
            if (key := questions[row].tobytes()) in first and key + answers[row].tobytes() not in whole
        ]  # fmt: skip
        if rows:
            text = f"{name}: {counted(len(rows), 'prompt')} that train answers otherwise"
            places = [texts.places[row] for row in rows[:PLACES]]
            others = [texts.places[first[questions[row].tobytes()]] for row in rows[:PLACES]]
            notes = [f"as {beside(a, b)}" for a, b in zip(places, others, strict=True)]
            yield Finding(Check.leakage_prompt, Severity.warning, len(rows), text, places, notes, {"split": name})


def _unknown_labels(texts: Texts, labels: Sequence[str]) -> Iterator[Finding]:
    for split, counts in texts.labels.items():
        strange = [label for label in counts if label not in set(labels)]
        if strange:
            count = sum(counts[label] for label in strange)
            text = f"{split}: {counted(count, 'row')} with a label outside the label set"
            pairs = [(place, label) for label in strange for place in texts.label_places[split, label]][:PLACES]
            places, notes = [place for place, _ in pairs], [repr(hide(label)) for _, label in pairs]
            yield Finding(Check.unknown_labels, Severity.fault, count, text, places, notes, {"split": split})


def _rendering(data: DataConfig, sample: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether sampled rows are trained on as the model will be asked; rows that the template fails on are bad rows."""
    if not sample or not tokenizer.chat_template or "assistant" not in data.train_on:
        return
    template = chat_template(tokenizer, data)
    control = ControlTokens(tokenizer, template.frame, data.special_tokens is SpecialTokens.keep)
    found: list[tuple[str, str]] = []
    spelt: list[tuple[str, str]] = []
    failed: list[tuple[str, str]] = []
    for record in sample:
        try:
            said = verify(tokenizer, template, turns_of(record), record.place, record.tools, control)
        except InputError as error:
            said = error.rule if _asked_otherwise(tokenizer, template, record) else None
            if said is None:
                failed.append((record.place, hide(error.rule)))
        if said is not None:
            (found if is_mismatch(said) else spelt).append((record.place, hide(said)))
    rows = f"of {counted(len(sample), 'row')} tried"
    if found:
        text = f"{len(found):,} {rows} rendered otherwise in training than when the model is asked"
        places, notes = [p for p, _ in found], [n for _, n in found]
        yield Finding(Check.template_mismatch, Severity.fault, len(found), text, places, notes, {"tried": len(sample)})
    if failed:
        text = f"{len(failed):,} {rows} that the chat template fails on"
        places, notes = [p for p, _ in failed], [n for _, n in failed]
        yield Finding(Check.bad_rows, Severity.fault, len(failed), text, places, notes, {"tried": len(sample)})
    if spelt:
        text = f"{len(spelt):,} {rows} with answers whose tokens do not spell their text"
        places, notes = [p for p, _ in spelt], [n for _, n in spelt]
        yield Finding(Check.template_mismatch, Severity.note, len(spelt), text, places, notes, {"tried": len(sample)})


def _asked_otherwise(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, record: Record) -> bool:
    """Whether what the model is asked with before a row's last answer is not how the row begins in training."""
    turns = turns_of(record)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        return False
    try:
        whole = render(tokenizer, turns, record.place, tools=record.tools)
        return not whole.startswith(template.prompt(turns[:last], record.place, record.tools))
    except InputError:  # the row is bad, and is found as such
        return False
