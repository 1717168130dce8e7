"""Duplicates, near duplicates and contradictions, beside sets compared one with another."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritune.trainer.data.contradictions import contradictory
from tritune.trainer.data.duplicates import WORDS, NearDuplicates, across, exact_key, normalised


def shingles(text: str) -> set[tuple[str, ...]]:
    words = normalised(text).split(" ")
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def brute(texts, threshold) -> dict[tuple[int, int], float]:
    """All pairs by Python's sets."""
    sets = [shingles(t) for t in texts]
    pairs = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(sets), 2):
        shared = len(a & b)
        if shared and shared / (len(a) + len(b) - shared) >= threshold:
            pairs[i, j] = shared / (len(a) + len(b) - shared)
    return pairs


def connected(pairs, count) -> list[list[int]]:
    near = defaultdict(set)
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    groups, seen = [], set()
    for start in range(count):
        if start in near and start not in seen:
            group, ahead = {start}, [start]
            while ahead:
                new = near[ahead.pop()] - group
                group |= new
                ahead += new
            seen |= group
            groups.append(sorted(group))
    return groups


def audited(texts, threshold=0.8) -> NearDuplicates:
    found = NearDuplicates(threshold)
    for text in texts:
        found.add(text)
    return found


def edited(rng: random.Random, count: int, vocabulary: int) -> list[str]:
    """Texts of 0 to 80 words; half of them a copy of an earlier one with some words changed, left out or moved."""
    texts: list[str] = []
    for _ in range(count):
        words = rng.choices([f"w{i}" for i in range(vocabulary)], k=rng.randint(0, 80))
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, 4)):
                at = rng.randrange(len(words) + 1)
                words[at : at + rng.randint(0, 1)] = rng.choices(["x", "y", "w1"], k=rng.randint(0, 2))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [3, 30, 5000])
def test_random_texts_beside_all_pairs(threshold, vocabulary):
    texts = edited(random.Random(f"{threshold} {vocabulary}"), 250, vocabulary)
    want = brute(texts, threshold)
    found = audited(texts, threshold)
    assert len(want) > 10
    assert {(i, j): s for i, j, s in found.pairs()} == want  # nothing missed, nothing more, the same similarities
    assert found.groups() == connected(want, len(texts))
    assert all(found.similarity(i, j) == s for (i, j), s in itertools.islice(want.items(), 50))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=12), max_size=14), st.floats(0.05, 1.0))
def test_any_texts_and_any_threshold(texts, threshold):
    texts = [" ".join(words) for words in texts]
    want = brute(texts, threshold)
    found = audited(texts, threshold)
    assert {(i, j): s for i, j, s in found.pairs()} == want
    assert found.groups() == connected(want, len(texts))


@pytest.mark.parametrize(("size", "changed"), [(10, 0), (12, 3), (7, 2)])
def test_a_similarity_right_at_the_threshold_counts(size, changed):
    """0.7 * 10 and the like are a little over the whole number in floating point."""
    texts = [" ".join(f"a{i}" for i in range(size + 2)), " ".join(f"a{i}" for i in range(changed, size + 2))]
    similarity = (size - changed) / size
    assert list(audited(texts, similarity).pairs()) == [(0, 1, similarity)]
    assert audited(texts, min(1.0, similarity + 1e-6)).groups() == ([[0, 1]] if not changed else [])


@pytest.mark.parametrize(("words", "length", "threshold"), [(4, 12, 0.3), (3, 16, 0.4), (3, 8, 0.4), (4, 8, 0.4)])
def test_groups_where_every_list_is_long_and_mixed(words, length, threshold):
    """What joins two groups then stands in the middle of a list whose ends are of one group already."""
    rng = random.Random(3)
    for _ in range(4):
        texts = [" ".join(rng.choices("abcd"[:words], k=rng.randint(3, length))) for _ in range(120)]
        assert audited(texts, threshold).groups() == connected(brute(texts, threshold), len(texts))


def test_order_of_adding_only_renumbers():
    texts = edited(random.Random(4), 300, 40)
    groups = {frozenset(g) for g in audited(texts).groups()}
    order = random.Random(5).sample(range(len(texts)), len(texts))
    again = audited([texts[i] for i in order]).groups()
    assert {frozenset(order[i] for i in g) for g in again} == groups
    assert again == sorted(again)
    assert all(g == sorted(g) for g in again)


def test_more_texts_after_asking():
    texts = edited(random.Random(6), 200, 40)
    found = audited(texts[:120])
    assert found.groups() == audited(texts[:120]).groups()
    for text in texts[120:]:
        found.add(text)
    assert len(found) == 200
    assert found.groups() == audited(texts).groups() == connected(brute(texts, 0.8), 200)


def test_nothing_and_one_text():
    assert audited([]).groups() == audited(["one text of some words"]).groups() == []
    assert list(audited([]).pairs()) == []


@pytest.mark.parametrize("own", [(4, 5), (3, 30)])
def test_many_rows_with_one_long_beginning(own):
    """The shared part makes lists as long as the corpus; compared one with another this would take minutes."""
    rng = random.Random(7)
    prompt = " ".join(f"p{i}" for i in range(100))
    texts = [f"{prompt} " + " ".join(f"{i}x{k}" for k in range(rng.randint(*own))) for i in range(3000)]
    lengths = [len(shingles(t)) for t in texts]
    shared = 98
    shortest = min(lengths)
    want = [i for i, n in enumerate(lengths) if shared / (n + shortest - shared) >= 0.8]
    assert audited(texts).groups() == [want]


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, float("nan")])
def test_a_threshold_that_is_none(threshold):
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicates(threshold)


SAME = [
    ("Where is my card?", "  where is\tmy CARD "),
    ("“Don’t,” she said.", '"Don\'t" she said'),
    ("ＡＢＣ ﬁne", "abc fine"),
    ("Straße\u00a0neu", "STRASSE neu"),
    ("cafe\u0301 au lait", "Café au lait!"),
    ("你好，世界。", "你好 世界"),
    ("Card ? Help ...", "card help"),
]
OTHER = [
    ("where is my card", "where is my car"),
    ("What is 3 + 4?", "What is 3 - 4?"),
    ("It costs 3.5", "It costs 35"),
    ("It is -5", "It is 5"),
    ("It is .5", "It is 5"),
    ("?", "!"),
    ("", "..."),
    ("if !ready", "if ready"),
    ("हिन्दी काम", "हिन्दी कम"),
    ("not so", "so not"),
    ("他是好人", "她是好人"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_to_a_reader(one, other):
    assert one != other
    assert normalised(one) == normalised(other)
    assert audited([one, other], 1.0).groups() == [[0, 1]]
    assert exact_key(one) != exact_key(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_another_text(one, other):
    assert normalised(one) != normalised(other)
    assert audited([one, other]).groups() == []


@given(st.text())
def test_normalised_is_stable_and_one_line(text):
    once = normalised(text)
    assert once == " ".join(once.split())
    assert normalised(text.replace(" ", " \n ")) == once
    assert len(exact_key(text)) == 16


def test_short_texts_count_only_when_equal():
    texts = [" ".join(w) for n in (1, 2) for w in itertools.product(["yes", "no", "Yes!", "maybe"], repeat=n)]
    want = [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(texts), 2) if normalised(a) == normalised(b)]
    assert len(want) == 11
    assert sorted((i, j) for i, j, _ in audited(texts, 0.01).pairs()) == want


def test_across_splits():
    groups = [[0, 1], [2, 9], [3, 5, 10], [6, 8], [10, 11]]
    assert across(groups, [5, 10, 12]) == [[2, 9], [3, 5, 10]]
    assert across(groups, [12]) == []
    assert across([[4, 5]], [5, 10]) == [[4, 5]]
    assert across([[5, 9]], [5, 10]) == []


@pytest.fixture(scope="module")
def banking(shared) -> tuple[list[tuple[str, str]], int]:
    rows, ends = [], []
    for split in ("train", "test"):
        with (shared / "intent" / f"banking77_{split}.csv").open(encoding="utf-8", newline="") as file:
            rows += [(row["text"], row["category"]) for row in csv.DictReader(file)]
        ends.append(len(rows))
    return rows, ends[0]


def test_banking77(banking):
    """Every pair, by an index of shingles that takes no short cut; and what was read by eye."""
    rows, train = banking
    texts = [text for text, _ in rows]
    sets = [shingles(t) for t in texts]
    having, want = defaultdict(list), {}
    for i, own in enumerate(sets):
        for j, shared in Counter(itertools.chain.from_iterable(having[shingle] for shingle in own)).items():
            if (similarity := shared / (len(own) + len(sets[j]) - shared)) >= 0.8:
                want[j, i] = similarity
        for shingle in own:
            having[shingle].append(i)
    found = audited(texts)
    assert {(i, j): s for i, j, s in found.pairs()} == want
    assert 100 < len(want) < 200
    groups = found.groups()
    assert groups == connected(want, len(texts))
    leaked = across(groups, [train, len(texts)])
    assert 40 < len(leaked) < 70
    agree = sum(rows[i][1] == rows[j][1] for i, j in want)
    assert agree / len(want) > 0.9  # messages that repeat each other are meant alike: few are wrongly taken for one
    assert contradictory(rows) == []


def test_instructions(shared):
    with (shared / "instruct" / "instruct_2000_permissive.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 1400, 2000)]
    texts = [" ".join((row["instruction"], row["input"])) for row in rows]
    want = brute(texts, 0.6)
    assert len(want) > 50
    assert {(i, j): s for i, j, s in audited(texts, 0.6).pairs()} == want
    assert audited(texts, 0.6).groups() == connected(want, len(texts))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "A.", "b", "c d", b"a", b"c", b""]), st.sampled_from("xyz"))))
def test_contradictions_beside_a_dictionary(rows):
    by_input = defaultdict(lambda: defaultdict(list))
    for number, (given_, label) in enumerate(rows):
        by_input[normalised(given_).encode() if isinstance(given_, str) else given_][label].append(number)
    want = sorted(sorted(labels.values()) for labels in by_input.values() if len(labels) > 1)
    assert [c.rows for c in contradictory(iter(rows))] == want


def test_a_contradiction_by_hand():
    rows = [("Where is it?", "lost"), ("other", "x"), ("where is it", "late"), ("WHERE IS IT", "lost")]
    assert [c.rows for c in contradictory(rows)] == [[[0, 3], [2]]]
