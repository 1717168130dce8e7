"""Held-out parts that are the end of each file: everything is there once, in order, and parts begin where something begins."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from options import learning
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Duplicates, HeldOut, Kind, TextUnit
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data import records
from tritune.trainer.data.held_out import LEAST, MOVED, Ends, edges_of, end_near, find_ends, is_contiguous, records_in
from tritune.trainer.data.kinds import Reading, Record
from tritune.trainer.data.records import read_chunks
from tritune.trainer.data.splits import read_splits
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

WORDS = ["the", "cat", "sat", "on", "größer", "漢字", "mat", "and", "saw", "a", "bird"]


def prose(rng: random.Random, paragraphs: int) -> str:
    """Paragraphs of sentences, of lines."""
    made = []
    for _ in range(paragraphs):
        said = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + "." for _ in range(rng.randint(1, 8))]
        made.append("".join(s + rng.choice([" ", "\n"]) for s in said).strip())
    return "\n\n".join(made) + "\n"


def settings(tmp_path, path, **data) -> Config:
    config = Config()
    config.objective = learning("pretrain")
    config.data.train, config.cache.dir = str(path), str(tmp_path / "cache")
    config.cache.num_procs = 1
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def texts(config: Config) -> dict[str, list[str]]:
    """The documents of each split, as their tokens spell them."""
    tokenizer = byte_tokenizer()
    splits = read_splits(config, tokenizer, None)
    found = {}
    for name, examples in splits.examples.items():
        ids = [t for i in range(len(examples)) for t in examples.ids(i).tolist()]
        found[name] = tokenizer.decode(ids).split("<bos>")[1:]
    assert splits.at_ends == ["data.train"] * (config.data.held_out is not HeldOut.hash)
    return found


def test_a_plain_text_is_held_out_at_its_end(tmp_path):
    """By default, and in units: paragraphs of each of two files; nothing is lost, nothing stands twice."""
    rng, whole = random.Random(1), []
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(2):
        text = prose(rng, 120)
        (folder / f"{number}.txt").write_text(text)
        whole.append([p for p in text.rstrip("\n").split("\n\n") if p.strip()])
    found = texts(settings(tmp_path, folder, validation_share=0.1, test_share=0.15, max_length=64))
    at = dict.fromkeys(found, 0)
    for paragraphs in whole:
        size = sum(map(len, paragraphs))
        for name, share in (("train", 0.75), ("validation", 0.1), ("test", 0.15)):
            mine = found[name][at[name] :]
            count = next((i for i, p in enumerate(mine) if p not in paragraphs), len(mine))
            part, at[name] = mine[:count], at[name] + count
            assert part == paragraphs[:count], f"{name} is what comes next"
            assert abs(sum(map(len, part)) / size - share) < 0.03
            paragraphs = paragraphs[count:]
        assert paragraphs == []
    by_hash = texts(settings(tmp_path, folder, validation_share=0.1, held_out=HeldOut.hash, max_length=64))
    places = [whole[0].index(p) for p in by_hash["validation"] if p in whole[0]]
    assert places[-1] - places[0] > len(places), "what it is not: anywhere"


@pytest.mark.parametrize("name", ["book.txt", "books.jsonl"])
def test_a_text_that_is_one_row_is_cut_where_something_ends(tmp_path, name):
    rng, path = random.Random(2), tmp_path / name
    text = prose(rng, 150)
    path.write_text(text if name.endswith("txt") else json.dumps({"text": text}) + "\n")
    more = {"text_unit": TextUnit.file} if name.endswith("txt") else {"held_out": HeldOut.contiguous}
    found = texts(settings(tmp_path, path, validation_share=0.1, max_length=100, **more))
    assert {split: len(documents) for split, documents in found.items()} == {"train": 1, "validation": 1}
    ((train,), (validation,)) = found["train"], found["validation"]
    whole = text.rstrip()
    assert (train + validation).rstrip() in (whole, whole[:-1]), "but for a last token of which no block is made"
    assert train.endswith("\n\n"), "a paragraph has ended"
    assert abs(len(validation) / len(text) - 0.1) < 0.012
    if name == "books.jsonl":
        with pytest.raises(InputError, match=r"rows none falls to .*data\.held_out=contiguous"):
            read_splits(settings(tmp_path, path, validation_share=0.1), byte_tokenizer(), None)


def write(path, rows: list[str]) -> None:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
        case ".json":
            path.write_text(json.dumps([{"text": t} for t in rows]))  # all of them in one line
        case ".parquet":
            pa.parquet.write_table(pa.table({"text": rows}), path)
        case ".txt":
            path.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".txt"])
def test_every_character_is_there_once_in_order(tmp_path, monkeypatch, ending):
    """Over formats and chunks: the reference knows the rows and counts characters."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 300)
    rng = random.Random(ending)
    for trial in range(40):
        count = rng.randint(1, 12)
        rows = ["".join(prose(rng, rng.choice([1, 1, 60])).replace("\n", " ")).strip() for _ in range(count)]
        path = tmp_path / f"{trial}{ending}"
        write(path, rows)
        shares = rng.choice([{"validation": 0.1}, {"validation": 0.3, "test": 0.1}, {"test": 0.5}])
        data = DataConfig(held_out=HeldOut.contiguous, text_unit=TextUnit.line, kind=Kind.text)
        ends = find_ends(str(path), "data.train", data, learning("pretrain"), shares)
        reading = Reading(data, learning("pretrain"))
        chunks = list(read_chunks(str(path), "data.train", TextUnit.line))
        found = [record for chunk in chunks for record in records_in(chunk, reading, ends)]
        assert all(isinstance(record, Record) for record in found)
        assert "".join(r.text for r in found) == "".join(rows)
        order = [ends.points.index(r.point(r.digest())) for r in found]
        assert order == sorted(order), "train, validation, test"
        total = sum(map(len, rows))
        least = total * min(*shares.values(), 1 - sum(shares.values()))
        for number, share in enumerate(shares.values(), 1):
            part = sum(len(r.text) for r, o in zip(found, order, strict=True) if o == number)
            if least >= LEAST:
                assert abs(part - share * total) <= 2 * MOVED * least + 2
        starts = [sum(len(r.text) for r in found[:i]) for i in range(len(found))]
        begins = {sum(map(len, rows[:i])): i for i in range(count)}
        for record, start in zip(found, starts, strict=True):
            if start in begins and ending in (".jsonl", ".txt"):
                assert record.place == f"{path}:{begins[start] + 1}"
            elif start not in begins:
                assert least >= LEAST
                assert "".join(rows)[start - 1] == " ", "a sentence or a word has ended"


def test_parts_of_a_text_are_named_by_their_lines():
    text = "".join(f"line {i}\n" for i in range(200))
    ends = Ends({"b.txt": edges_of([len(text)], [0.2, 0.2], True, [0.0, 0.0])}, [0.7, 0.1, 0.3])
    found = list(ends.parts(Record("b.txt:1", text=text), "b.txt", 0))
    assert "".join(r.text for r in found) == text
    assert [r.place for r in found] == [f"b.txt:{int(r.text.split()[1]) + 1}" for r in found]
    rows = Ends({"b.jsonl": edges_of([len(text)], [0.2], True, [0.0])}, [0.7, 0.1])
    _, second = rows.parts(Record("b.jsonl:1", text=text), "b.jsonl", 0)
    start = text.index(second.text)
    assert second.place == f"b.jsonl:1, from character {start + 1:,}"


def test_what_ends_is_the_largest_thing_that_does():
    text = "one two. three four\nfive six seven\n\neight nine ten. eleven"
    assert text[end_near(text, 30, 20) :].startswith("eight")
    assert text[end_near(text, 18, 6) :].startswith("five")
    assert text[end_near(text, 11, 4) :].startswith("three")
    assert text[end_near(text, 26, 4) :].startswith("six")
    assert end_near("x" * 90, 40, 20) == 40
    assert end_near("漢字。" * 30, 40, 5) in (39, 42)


def test_rows_are_held_out_by_their_number_where_asked(tmp_path):
    """Of prompts and answers a file's last rows, and nothing of what `hash` and the default were changes."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q {i}", "response": "r" * (i % 7 + 1)} for i in range(200)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    digests = {}
    for how in HeldOut:
        config = settings(tmp_path, path, validation_share=0.2, test_share=0.1, held_out=how)
        config.objective = learning("sft")
        splits = read_splits(config, byte_tokenizer(), None).examples
        digests[how] = {name: e.digest for name, e in splits.items()}
        if how is HeldOut.contiguous:
            lines = {n: [int(e.place(i).rpartition(":")[2]) for i in range(len(e))] for n, e in splits.items()}
    assert lines == {"train": [*range(1, 141)], "validation": [*range(141, 181)], "test": [*range(181, 201)]}
    assert digests[HeldOut.auto] == digests[HeldOut.hash] != digests[HeldOut.contiguous]
    with pytest.raises(ConfigFaults, match=r"data\.held_out=contiguous: .*data\.group keeps each in one split"):
        load_config(
            ["objective=sft", "model=tiny", f"data.train={path}", "data.group=user", "data.held_out=contiguous"],
            training=False,
        )


def test_the_default_is_for_what_is_cut_in_units(tmp_path):
    for name in ("a.txt", "b.txt", "rows.jsonl"):
        (tmp_path / name).write_text("x\n")
    units, whole = DataConfig(), DataConfig(text_unit=TextUnit.file)
    text, folder, rows = str(tmp_path / "a.txt"), str(tmp_path / "*.txt"), str(tmp_path / "rows.jsonl")
    asked = [(text, units, "pretrain"), (folder, units, "pretrain"), (text, whole, "pretrain"),
             (folder, whole, "pretrain"), (rows, units, "pretrain"), (rows, units, "sft")]  # fmt: skip
    assert [is_contiguous(path, "data.train", data, learning(objective)) for path, data, objective in asked] == [
        True, True, True, False, False, False
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_near_duplicate_goes_with_all_its_parts_and_the_first_stays_with_all_of_its(tmp_path, ending):
    """A book held out at its end is one row: its held-out part is no repetition of its beginning, nor does it escape alone."""
    rng, folder = random.Random(6), tmp_path / "books"
    folder.mkdir()
    book = [rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(600)]
    other = [rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(600)]
    near = [*book[:300], "changed", *book[301:590], "also", *book[591:]]
    for name, words in (("a", book), ("b", near), ("c", other)):
        write(folder / f"{name}.{ending}", [" ".join(words)])
    how = {"held_out": HeldOut.contiguous, "duplicates": Duplicates.drop_near, "max_length": 64}
    config = settings(tmp_path, folder, validation_share=0.1, **how)
    found = texts(config)
    pairs = zip(found["train"], found["validation"], strict=True)
    assert [(train + held).split() for train, held in pairs] == [book, other]
    splits = read_splits(config, byte_tokenizer(), None)
    gone = [r["place"].partition(":1")[0] for r in splits.rejects()]
    assert gone == [str(folder / f"b.{ending}")] * 2
    assert [e.report.duplicates for e in splits.examples.values()] == [1, 1]


def test_many_small_files_give_the_shares_together(tmp_path):
    """A tenth of a poem is less than one of its paragraphs: some poems give one, each its last."""
    rng, folder = random.Random(7), tmp_path / "poems"
    folder.mkdir()
    poems = [["".join(rng.choices("abcdefgh ", k=rng.randint(20, 60))).strip() for _ in range(4)] for _ in range(60)]
    for number, poem in enumerate(poems):
        (folder / f"{number:02}.txt").write_text("\n\n".join(poem) + "\n")
    config = settings(tmp_path, folder, validation_share=0.1, test_share=0.1, max_length=64)
    found, total = texts(config), sum(len(p) for poem in poems for p in poem)
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(sum(map(len, found[name])) - share * total) <= 60, "of a paragraph, over all of them"
    for poem in poems:
        parts = [next(n for n, kept in enumerate(found.values()) if p in kept) for p in poem]
        assert parts == sorted(parts), "train, validation, test"
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=r"none falls to test.*data\.held_out=hash"):
        read_splits(config, byte_tokenizer(), None)


def test_edges_that_make_up_for_other_files_keep_their_order():
    """Whatever is owed: edges ascend, and where a text is cut twice both cuts are far from each other."""
    rng = random.Random(8)
    for _ in range(3000):
        sizes = [rng.choice([0, 10, 300, 5000]) for _ in range(rng.randint(1, 6))]
        shares, owed = rng.choice([[0.1, 0.1], [0.3, 0.05], [0.01, 0.4]]), [rng.uniform(-9000, 9000) for _ in range(2)]
        begins, before = [sum(sizes[:i]) for i in range(len(sizes) + 1)], list(owed)
        edges = edges_of(sizes, shares, True, owed)
        one, two = at = [begins[e.row] + e.at for e in edges]
        assert one <= two
        if edges[0].row == edges[1].row and edges[1].near:
            assert two - one > (edges[0].near + edges[1].near) * bool(edges[0].near)
        ideals = [sum(sizes) * (1 - sum(shares)), sum(sizes) * (1 - shares[1])]
        assert owed == pytest.approx([b + i - a for b, i, a in zip(before, ideals, at, strict=True)])


def test_processes_divide_a_text_alike(tmp_path):
    path, rng = tmp_path / "book.txt", random.Random(4)
    path.write_text(prose(rng, 4000))
    assert path.stat().st_size > 2 * records.CHUNK_BYTES
    made = []
    for procs in (1, 3):
        config = settings(tmp_path / str(procs), path, validation_share=0.05, test_share=0.05)
        config.cache.num_procs = procs
        made.append(read_splits(config, byte_tokenizer(), None).examples)
    one, three = made
    assert {n: e.digest for n, e in one.items()} == {n: e.digest for n, e in three.items()}
    tokens = {n: e.report.tokens for n, e in one.items()}
    assert tokens["validation"] == pytest.approx(0.05 * sum(tokens.values()), rel=0.02)
