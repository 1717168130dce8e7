"""Exact and near duplicates among texts. Near: the Jaccard similarity of word 3-grams, every pair at or over a threshold.

The pairs come from an exact similarity join (prefix filter; Chaudhuri et al. 2006, Bayardo et al. 2007), not from MinHash:
nothing is missed and nothing depends on a seed. Two sets as similar as t share an element among the first n - ceil(t n) + 1 of
each, in any one order of all elements. With the rare first, few texts meet that do not belong together.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Of a shingle; a shorter text is one as a whole. Of BANKING77's messages (12 words) 131 pairs are alike by 3-grams and not equal,
# 33 by 5-grams, and those read were repetitions nearly all; by 2-grams 241, with more labels that differ.
WORDS = 3
# Left off before a word. "." is not, nor "-" and "!": .5 is not 5, -5 not 5, !x not x.
_OPENING = "\"'([{<«¿¡"
_CLOSING = ".\"')]}>»,;:?!…。、"  # left off after a word
_QUOTES = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")
# Scripts written without spaces: each of these characters counts as a word (Thai, Lao, Myanmar, Khmer, kana, Han).
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff])"
)
_BITS = 60  # of a shingle's hash; the four above hold how common it is
_HASH = np.uint64((1 << _BITS) - 1)
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd: a bijection of 64 bits, so that the order of words counts
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finish (Steele et al. 2014)
_CHUNK = 1 << 18


def normalised(text: str) -> str:
    """What two texts have in common that a reader takes for the same: NFKC, case folded, words joined by single spaces.

    Punctuation goes where it closes or opens a word, as in prose, and stays inside and where it says something: 3.5 is not
    35, "3 + 4" not "3 - 4", -5 not 5, e-mail one word. Dropping all of it would make wrong duplicates in sums and code.
    A text with nothing else keeps it: "?" is not "!". Characters of scripts without spaces are a word each.
    """
    folded = text.lower() if text.isascii() else _folded(text)
    words = [word.lstrip(_OPENING).rstrip(_CLOSING) for word in folded.split()]
    return " ".join(filter(None, words)) or " ".join(folded.split())


def _folded(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold().translate(_QUOTES))


def exact_key(content: str | bytes) -> bytes:
    """16 bytes of BLAKE2b of the content as it stands (UTF-8): equal for equal contents, and in any process."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()


def across(groups: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[int]]:
    """The groups that hold texts of several splits, where the splits were added one after another.

    Args:
        ends: how many texts there were after each split, ascending: [len(train), len(train) + len(test)].
    """
    return [list(group) for group in groups if bisect_right(ends, group[0]) != bisect_right(ends, group[-1])]


def _shingles(text: str) -> np.ndarray:
    """[n] uint64, sorted, distinct, n >= 1, of 60 bits: the set of the text's shingles as hashes.

    Python's own string hash is keyed anew in every process. Results do not depend on the key but for a collision: one in
    10^13 for two texts of 300 words.
    """
    words = normalised(text).split(" ")
    if len(words) < WORDS:
        return np.array([hash(tuple(words)) & int(_HASH)], np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    count = len(words) - WORDS + 1
    mixed = hashes[:count].copy()
    for shift in range(1, WORDS):
        mixed *= _STEP
        mixed += hashes[shift : shift + count]
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX[0]
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX[1]
    mixed &= _HASH
    mixed.sort()
    fresh = np.ones(count, bool)
    np.not_equal(mixed[1:], mixed[:-1], out=fresh[1:])
    return mixed[fresh]


class NearDuplicates:
    """Texts, numbered 0, 1, 2 ... as they are added, and which of them nearly repeat each other.

    A text under three words is near only to one that is the same after `normalised`. Keeps 8 bytes a shingle, 700 a text of
    500 characters; asking takes half as much again for a while. No text can be added while `pairs` is being read.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        """
        Args:
            threshold: least Jaccard similarity |a & b| / |a | b| of two texts' shingles that counts, over 0 and up to 1.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold}: a Jaccard similarity over 0 and up to 1 is needed")
        self.threshold = threshold
        self._shingles = array("Q")
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        """Take the next text."""
        self._shingles.frombytes(_shingles(text).tobytes())
        self._ends.append(len(self._shingles))

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two texts by their numbers."""
        first, second = (np.asarray(self._shingles[self._ends[i] : self._ends[i + 1]]) & _HASH for i in (one, other))
        shared = len(np.intersect1d(first, second, assume_unique=True))
        return shared / (len(first) + len(second) - shared)

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """Every two texts (i < j) as similar as the threshold, with their similarity.

        n copies of a text are n (n - 1) / 2 pairs: `groups` is what to ask of a whole corpus.
        """
        join = _join(self._shingles, self._ends, self.threshold)
        for rank in range(len(self)):
            near, similarity = _near(join, rank, _earlier(join, rank, _places(join, rank)))
            this = int(join.text[rank])
            for other, value in zip(join.text[near].tolist(), similarity.tolist(), strict=True):
                yield min(this, other), max(this, other), value

    def groups(self) -> list[list[int]]:
        """Texts connected by pairs as similar as the threshold: groups of two and more, each ascending, by first member.

        Two texts of a group may be less similar than that, when others lie between them. The grouping is the same in
        whatever order the texts were added.
        """
        join = _join(self._shingles, self._ends, self.threshold)
        group = np.arange(len(self))  # by rank: its group's name, the rank of one member
        members: dict[int, list[int]] = {}  # of groups of two and more, by name
        alike = np.ones(len(join.member), bool)  # by a list's first place: all its members so far are of one group

        def connect(rank: int, candidates: np.ndarray) -> None:
            at_once = 32  # and ever more: one hit among the likeliest often makes the comparison with the rest needless
            while len(candidates := candidates[group[candidates] != group[rank]]):
                for other in _near(join, rank, candidates[:at_once])[0].tolist():
                    _merge(group, members, rank, other)
                candidates, at_once = candidates[at_once:], 2 * at_once

        for rank in range(len(self)):
            places = _places(join, rank)
            if not len(places):
                continue
            first = join.first[places]
            # First the shortest text of each list and the one before. Where many are alike they settle the matter, and a
            # list of this group alone needs no look: 20,000 rows with one long system prompt took minutes without.
            later = places > first
            likely = join.member[np.concatenate([first[later], places[later] - 1])]
            few = sorted(set(likely.tolist()))  # `np.unique` takes three times as long
            connect(rank, np.array(few, np.int64))
            settled = alike[first] & (group[join.member[first]] == group[rank])
            connect(rank, _earlier(join, rank, places[~settled]))
            alike[first] &= group[join.member[first]] == group[rank]
        return sorted(sorted(join.text[ranks].tolist()) for ranks in members.values())


@dataclass(frozen=True)
class _Join:
    """Texts by rank, ascending in the number of shingles, and for each shingle in a prefix the list of texts that have it.

    Lists lie one after another; a place is an index into them.
    """

    threshold: float
    keys: np.ndarray  # [shingles] uint64, ascending within a text: how common it is in 4 bits, then its hash
    starts: np.ndarray  # [texts + 1] by number: its first key
    text: np.ndarray  # [texts] by rank: its number
    sizes: np.ndarray  # [texts] by rank: its shingles, ascending
    member: np.ndarray  # [places] ranks, ascending within a list
    first: np.ndarray  # [places] the first place of the same list
    after: np.ndarray  # [places] keys of that text from this one on
    places: np.ndarray  # [places] by rank: the places where it stands
    places_of: np.ndarray  # [texts + 1] by rank: where its places begin


def _join(shingles: array[int], ends: array[int], threshold: float) -> _Join:
    """Orders `shingles` within each text by how rare they are (in place), and makes the lists."""
    keys = np.asarray(shingles)
    starts = np.asarray(ends).astype(np.int64)
    _mark_common(keys)
    for start, stop in pairwise(ends):
        keys[start:stop].sort()
    sizes = np.diff(starts)
    text = np.argsort(sizes, kind="stable")
    sizes = sizes[text]
    ranks, places_at = [], []
    for start in range(0, len(text), _CHUNK >> 4):
        some = np.arange(start, min(start + (_CHUNK >> 4), len(text)), dtype=np.int32)
        prefix = sizes[some] - _least(threshold * sizes[some]) + 1
        at = _ranges(starts[text[some]], prefix)
        shared = keys[at] > _HASH  # the others stand in one text only
        places_at.append(at[shared])
        ranks.append(np.repeat(some, prefix)[shared])
    at, rank = np.concatenate(places_at or [text]), np.concatenate(ranks or [text])
    order = np.argsort(keys[at], kind="stable")
    at, rank = at[order], rank[order]
    follows = keys[at[1:]] == keys[at[:-1]]
    begins = np.r_[True, ~follows][: len(at)]
    kept = np.r_[False, follows][: len(at)] | np.r_[follows, False][: len(at)]
    begins, member, at = begins[kept], rank[kept], at[kept]
    after = (starts[text[member] + 1] - at).astype(np.int32)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(member)), 0)) if len(member) else np.arange(0)
    places = np.argsort(member, kind="stable")
    places_of = np.searchsorted(member[places], np.arange(len(text) + 1))
    return _Join(threshold, keys, starts, text, sizes, member, first, after, places, places_of)


def _mark_common(keys: np.ndarray) -> None:
    """Put the binary logarithm of a shingle's count over the hash, in place. The count may be too high, never too low:
    it is of all shingles with the same last bits, 2 bytes each for about as many as there are."""
    table = np.zeros(1 << max(10, len(keys).bit_length() - 1), np.uint16)
    last = np.uint64(len(table) - 1)
    for start in range(0, len(keys), _CHUNK):
        seen, counts = np.unique(keys[start : start + _CHUNK] & last, return_counts=True)
        table[seen] = np.minimum(table[seen] + counts, 65535)
    for start in range(0, len(keys), _CHUNK):
        part = keys[start : start + _CHUNK]
        part &= _HASH
        part |= (np.frexp(table[part & last])[1] - 1).astype(np.uint64) << np.uint64(_BITS)


def _least(bound: np.ndarray) -> np.ndarray:
    """The least whole number at or over `bound`, which may be a rounding error too high: 0.7 * 10 is over 7."""
    return np.maximum(np.ceil(bound - 1e-9), 1).astype(np.int64)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices starts[0], starts[0] + 1, ... `lengths[0]` of them, then those from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _places(join: _Join, rank: int) -> np.ndarray:
    return join.places[join.places_of[rank] : join.places_of[rank + 1]]


def _earlier(join: _Join, rank: int, places: np.ndarray) -> np.ndarray:
    """Ranks before `rank`, distinct, that share a list with it at one of `places` and may be similar enough by their size
    and by where the first shared shingle stands: no more is shared than what follows it (Xiao et al. 2008). Those that
    share the most lists come first."""
    if not len(places):
        return places
    size, threshold = join.sizes[rank], join.threshold
    ranges = list(zip(join.first[places].tolist(), places.tolist(), strict=True))
    found = np.concatenate([join.member[first:place] for first, place in ranges])
    after = np.concatenate([join.after[first:place] for first, place in ranges])
    own = np.repeat(join.after[places], places - join.first[places])
    found, at, lists = np.unique(found, return_index=True, return_counts=True)
    shared = np.minimum(after[at], own[at])  # lists are in the order of keys: `at` is at the first that is shared
    possible = shared >= _least(threshold / (1 + threshold) * (size + join.sizes[found]))
    return found[possible][np.argsort(-lists[possible], kind="stable")]


def _near(join: _Join, rank: int, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the `candidates` (ranks) those as similar as the threshold to `rank`, and the similarities."""
    text = join.text[rank]
    own = join.keys[join.starts[text] : join.starts[text + 1]]
    similarity = np.zeros(len(candidates))
    at_once = max(1, _CHUNK // len(own))  # a candidate has no more shingles than this text
    for start in range(0, len(candidates), at_once):
        part = candidates[start : start + at_once]
        sizes = join.sizes[part]
        theirs = join.keys[_ranges(join.starts[join.text[part]], sizes)]
        found = np.minimum(np.searchsorted(own, theirs), len(own) - 1)
        shared = np.add.reduceat(own[found] == theirs, np.cumsum(sizes) - sizes, dtype=np.int64)
        similarity[start : start + at_once] = shared / (len(own) + sizes - shared)
    near = similarity >= join.threshold
    return candidates[near], similarity[near]


def _merge(group: np.ndarray, members: dict[int, list[int]], one: int, other: int) -> None:
    """Make two groups one; the smaller takes the name of the larger, so that a text is renamed log(n) times at most."""
    small, large = int(group[one]), int(group[other])
    if small == large:
        return
    if len(members.get(small, ())) > len(members.get(large, ())):
        small, large = large, small
    moved = members.pop(small, [small])
    members.setdefault(large, [large]).extend(moved)
    group[moved] = large
