"""Exact repetitions, counted from digests, beside a count in plain Python; what ends a run; where shares cut."""

from __future__ import annotations

import json
from collections import defaultdict

import corpus
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.audit.findings import REMEDIES, Finding, Severity, beside, blocking, counted
from tritune.trainer.audit.repeats import Contents, repeats
from tritune.trainer.audit.review import _documents
from tritune.trainer.audit.texts import parts_of, read_texts, records_of
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.data import FAIL_ON, Check
from tritune.trainer.data.splits import read_splits
from tritune.trainer.model.tokenizer import load_tokenizer

ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2), st.sampled_from("abc")), max_size=40)


def contents(rows: list[tuple[int, int, str]], name: str, digests: np.ndarray) -> Contents:
    labels = np.array([label for _, label, _ in rows], np.int64)
    return Contents(digests[[c for c, _, _ in rows]], labels, lambda row: f"{name}:{row + 1}")


@settings(max_examples=150, deadline=None)
@given(ROWS, ROWS, st.integers(0, 2**32 - 1))
def test_repetitions_are_those_that_python_counts(train, test, seed):
    digests = np.random.default_rng(seed).integers(1, 2**63, (7, 2)).astype(np.uint64)
    digests[1, 0] = digests[2, 0]  # the same half
    digests[6] = 0  # not known
    splits = {"train": contents(train, "train", digests), "test": contents(test, "test", digests)}
    found = {(f.name, f.details.get("split")): f for f in repeats(splits)}
    for name, rows in (("train", train), ("test", test)):
        seen, again = set(), []
        for number, (content, label, _) in enumerate(rows, 1):
            if content != 6 and (content, label) in seen:
                again.append(f"{name}:{number}")
            seen.add((content, label))
        finding = found.pop((Check.duplicates_exact, name), None)
        assert (finding.places if finding else []) == again
    trained = {content for content, _, _ in train}
    leaked = [f"test:{n}" for n, (c, _, _) in enumerate(test, 1) if c in trained and c != 6]
    finding = found.pop((Check.leakage_exact, "test"), None)
    assert (finding.places if finding else []) == leaked
    known = sum(c != 6 for c, _, _ in test)
    assert ((Check.split_leaked, "test") in found) == (len(leaked) >= 0.05 * known > 0)
    found.pop((Check.split_leaked, "test"), None)
    labels = defaultdict(set)
    for content, label, _ in [*train, *test]:
        labels[content].add(label)
    several = {c for c, said in labels.items() if len(said) > 1 and c != 6}
    finding = found.pop((Check.contradictions, None), None)
    assert (finding.count if finding else 0) == len(several)
    assert not found


def test_what_fails_on_is_named_ends_a_run_unless_it_is_a_note():
    findings = [
        Finding(Check.personal, Severity.warning, 2, "2 rows", ["a.jsonl:3"]),
        Finding(Check.bad_rows, Severity.note, 1, "1 row", ["a.jsonl:4"]),
        Finding(Check.double_bos, Severity.fault, 1, "train: 1 row", ["/x/a.jsonl:5"], ["why"]),
    ]
    assert blocking(findings, []) is None
    assert blocking(findings, ["bad_rows", "leakage_exact"]) is None
    error = blocking(findings, [c.value for c in FAIL_ON])
    assert error is not None
    assert error.value == "audit: double_bos"
    assert error.rule == "train: 1 row (a.jsonl:5: why)"
    assert error.remedy.startswith(REMEDIES[Check.double_bos])
    assert blocking(findings, ["personal", "double_bos"]).value == "audit: personal, double_bos"
    assert set(REMEDIES) == set(Check)


def test_places_are_named_shortly():
    assert beside("/a/x.csv:7", "/a/x.csv:12") == "line 12"
    assert beside("/a/x.parquet:row 7", "/a/x.parquet:row 12") == "row 12"
    assert beside("/b/x.csv:7", "/a/x.csv:12") == "x.csv:12"
    assert (counted(1, "row"), counted(2000, "row")) == ("1 row", "2,000 rows")


@pytest.mark.parametrize("how", ["data.held_out=hash", "data.group=who", "data.held_out=contiguous"])
def test_rows_fall_to_the_splits_that_the_tables_have(tmp_path, how):
    rows = [row | ({"who": f"{i % 17}"} if "group" in how else {}) for i, row in enumerate(corpus.clean_rows(300, 4))]
    path = corpus.write(tmp_path / "train.jsonl", rows)
    options = ["objective=sft", "model=tiny", f"data.train={path}", "data.validation_share=0.2", "data.test_share=0.3"]
    config = load_config([*options, how], training=False)
    splits = read_splits(config, load_tokenizer(config.model), None)
    (part,) = parts_of(config.data, config.objective)
    found = defaultdict(list)
    for record in records_of(part):
        found[part.split_of(record.point(record.digest()))].append(record.place)
    assert set(found) == {"train", "validation", "test"}
    for name, examples in splits.examples.items():
        assert splits.at_ends == ["data.train"] * ("contiguous" in how)
        assert found[name] == [examples.place(row) for row in range(len(examples))], json.dumps(found)[:200]


def test_neighbours_of_a_text_leak_only_what_stands_twice(tmp_path):
    """Its end is held out, as paragraphs; one of those stands in train as well."""
    path, twice = tmp_path / "book.txt", "This is said at the beginning, and again at the end."
    paragraphs = [f"Paragraph {i} says {i * 37 % 101}." for i in range(300)]
    paragraphs[3] = paragraphs[290] = twice
    path.write_text("\n\n".join(paragraphs) + "\n")
    options = ["objective=pretrain", "model=tiny", f"data.train={path}", "data.validation_share=0.1"]
    config = load_config([*options, "audit.near_duplicates=false"], training=False)
    texts = read_texts(config.data, config.objective, config.audit)
    held = [
        place for place, split in zip(texts.places, texts.splits, strict=True) if texts.names[split] == "validation"
    ]
    assert [int(place.rpartition(":")[2]) for place in held] == [2 * i + 1 for i in range(300 - len(held), 300)]
    (leak,) = [f for f in repeats(_documents(texts)) if f.name is Check.leakage_exact]
    assert (leak.count, leak.places, leak.notes) == (1, [f"{path}:581"], ["as line 7"])
