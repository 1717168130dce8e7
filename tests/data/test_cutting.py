"""Overlong rows that lose tokens of what is asked, against a reference on lists of tokens and on rendered conversations."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
from chat_templates import FAMILIES, conversation, tokenizer_of
from encoded import tokenized
from harness import mask_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.config import Config
from tritune.trainer.config.choices import BadRows, Overlong, Unsupervised
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.cutting import Content, runs_to_cut, without
from tritune.trainer.data.encode import Conversations, Labelled
from tritune.trainer.data.examples import Examples
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.splits import Splits
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.objectives.classify import ClassifyConfig
from tritune.trainer.objectives.classify_token import ClassifyTokenConfig

START, MIDDLE = Overlong.cut_prompt_start, Overlong.cut_prompt_middle
LETTERS = "abcdefghijklmnopqrstuvwxyzäé漢😀"


def words(rng: random.Random, size: int) -> str:
    """A text in which no part repeats, so that what is left of it says which part it is."""
    return "".join(rng.choice(LETTERS) for _ in range(size))


class Rows:
    """One row at a time, of one tokenizer, with encoders that are made once."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.encoders = tokenizer, {}

    def __call__(self, record: Record, limit: int, how: Overlong, **more) -> Examples | None:
        """None of a row that trains nothing, or that its template refuses."""
        data = DataConfig(max_length=limit, overlong=how, unsupervised=Unsupervised.drop, bad_rows=BadRows.skip, **more)
        key = tuple(sorted(more.items()))
        if key not in self.encoders:
            self.encoders[key] = Conversations(self.tokenizer, data, [])
        self.encoders[key].data = data
        if not len(self.encoders[key]([record]).columns):
            return None
        return tokenized([record], self.encoders[key], data)


def shortened(text: str, size: int, how: Overlong) -> list[int]:
    """The reference: the last `size` tokens of a text, or as many of the beginning as of the end, the beginning's one more if
    odd; of characters that lie within them whole."""
    tokenizer = byte_tokenizer()
    characters = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in text]
    total = sum(map(len, characters))
    head = (size + 1) // 2 if how is MIDDLE else 0
    kept, at = [], 0
    for character in characters:
        at += len(character)
        if size >= total or at <= head or at - len(character) >= total - (size - head):
            kept += character
    return kept


@pytest.mark.parametrize("how", [START, MIDDLE])
def test_a_prompt_is_cut_and_its_answer_is_not(how):
    rng, tokenizer = random.Random(5), byte_tokenizer()
    tokenizer.chat_template = None
    rows = Rows(tokenizer)
    for number in range(150):
        prompt, answer = words(rng, rng.randint(1, 40)), words(rng, rng.randint(1, 20))
        asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        limit = rng.randint(4, 120)
        rest = limit - len(said) - 3  # BOS, the line end, EOS
        made = rows(Record(f"f:{number}", prompt=prompt, response=answer), limit, how)
        whole = tokenizer(f"<bos>{prompt}\n{answer}<eos>", add_special_tokens=False)["input_ids"]
        if rest < 0:  # the answer alone is too long: the end goes, and that is said
            beyond = len(asked) + 2 >= limit
            assert (made is None) == beyond
            if made is not None:
                assert made.ids(0).tolist() == whole[:limit]
                cut = made.report.remarks["truncated_answers"]
                assert (cut["rows"], cut["places"]) == (1, [f"f:{number}"])
                assert cut["parts"] == {"tokens": len(whole) - limit}
            continue
        kept = shortened(prompt, min(rest, len(asked)), how)
        newline = whole[len(asked) + 1]
        row = [tokenizer.bos_token_id, *kept, newline, *said, tokenizer.eos_token_id]
        assert made.ids(0).tolist() == row
        assert made.spans(0).tolist() == [[len(kept) + 2, len(row)]]
        assert "truncated_answers" not in made.report.remarks
        lost = len(asked) - len(kept)
        assert (made.report.truncated_rows, made.report.truncated_tokens) == (int(lost > 0), lost)


FAMILIES_AS_WRITTEN = ["plain", "marks the answer", "writes a system turn of its own", "takes turns, without a system",
                       "ends the whole with its own token", "trims"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES_AS_WRITTEN)
def test_what_is_left_reads_as_its_template_writes_it(name):
    """The reference renders shortened conversations: the first exchanges go whole, then the beginning of the oldest question."""
    rng, family = random.Random(name), FAMILIES[name]
    tokenizer = tokenizer_of(family.template)
    rows = Rows(tokenizer)
    for number in range(25):
        turns = [words(rng, rng.randint(5, 30)) for _ in range(2 * rng.randint(1, 4))]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        head = [] if "system" in name or rng.random() < 0.5 else [{"role": "system", "content": "Say it briefly"}]

        def render(some, head=head):
            text = tokenizer.apply_chat_template([*head, *some], tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        full = rows(Record("f:1", messages=head + messages), 10_000, START, last_turn_only=True)
        stop = int(full.spans(0)[-1, 1])
        tail = full.lengths[0] - stop
        limit = rng.randint(stop // 3, stop + 2)
        made = rows(Record("f:1", messages=head + messages), limit, START, last_turn_only=True)
        expected = None
        for first in range(0, len(messages), 2):
            some = [dict(message) for message in messages[first:]]
            question = tokenizer(some[0]["content"], add_special_tokens=False)["input_ids"]
            over = max(len(render(some)) - tail - limit, 0)
            if over <= len(question):
                ends = itertools.accumulate((len(c.encode()) for c in some[0]["content"]), initial=0)
                over = next(end for end in ends if end >= over)  # whole characters
                expected = _without_beginning(render(some), question, over)[:limit]
                break
        if expected is None:
            continue  # system turns go as well, or the end: below
        assert made.ids(0).tolist() == expected, (number, limit)
        a, b = made.spans(0)[-1]
        was, _ = full.spans(0)[-1]
        assert made.ids(0)[a:b].tolist() == full.ids(0)[was:stop].tolist(), "the answer, whole"


def _without_beginning(ids: list[int], question: list[int], over: int) -> list[int]:
    at = next(i for i in range(len(ids)) if ids[i : i + len(question)] == question)
    return ids[:at] + ids[at + over :]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_no_answer_is_cut_while_there_is_something_else_to_cut(name):
    """Whatever a template does: what is trained is what is trained of the whole row, each gap between is part of its own."""
    rng = random.Random(name)
    rows, shorter, cut_anyway = Rows(tokenizer_of(FAMILIES[name].template)), 0, 0
    for number in range(40):
        messages, tools = conversation(rng)
        for message in messages:
            if message["role"] in ("user", "tool"):
                message["content"] += words(rng, rng.randint(0, 30))
        record = Record(f"f:{number}", messages=messages, tools=tools)
        how, more = rng.choice([START, MIDDLE]), {"last_turn_only": rng.random() < 0.5}
        full = rows(record, 10_000, how, **more)
        if full is None or len(full) != 1:  # a template that refuses it, or makes several rows of it
            continue
        limit = rng.randint(int(full.lengths[0]) // 2, int(full.lengths[0]))
        made = rows(record, limit, how, **more)
        if made is None or "truncated_answers" in made.report.remarks:
            cut_anyway += 1
            continue
        shorter += int(made.lengths[0] < full.lengths[0])
        assert made.lengths[0] <= limit
        (whole, trained), (left, kept) = ((e.ids(0).tolist(), mask_of(e, 0)) for e in (full, made))
        assert [i for i, t in zip(left, kept, strict=True) if t] == [
            i for i, t in zip(whole, trained, strict=True) if t
        ]
        assert len(made.spans(0)) == len(full.spans(0))
        for mine, theirs in zip(_gaps(left, made.spans(0)), _gaps(whole, full.spans(0)), strict=True):
            rest = iter(theirs)
            assert all(token in rest for token in mine), "in order, out of the same place"
    assert shorter > 4, "rows were cut"
    assert cut_anyway < 36


def _gaps(ids, spans) -> list[list[int]]:
    edges = [0, *spans.flatten().tolist(), len(ids)]
    return [ids[a:b] for a, b in zip(edges[:-1:2], edges[1::2], strict=True)][: len(spans)]


def test_the_middle_leaves_the_first_question_and_the_last():
    tokenizer = tokenizer_of(FAMILIES["plain"].template)
    rows = Rows(tokenizer)
    messages = [{"role": "system", "content": "Be brief, please"}]
    for number in range(6):
        messages += [{"role": "user", "content": f"question {number} " + "q" * 30},
                     {"role": "assistant", "content": f"answer {number} " + "a" * 10}]  # fmt: skip
    made = rows(Record("f:1", messages=messages), 260, MIDDLE, last_turn_only=True)
    text = tokenizer.decode(made.ids(0))
    assert made.lengths[0] == 260
    assert text.startswith("<|im_start|>system\nBe brief, please<|im_end|>\n<|im_start|>user\nquestion 0 ")
    assert re.search(r"question 5 q{30}<\|im_end\|>\n<\|im_start\|>assistant\nanswer 5 a{10}<\|im_end\|>$", text)
    assert [m[0] for m in re.findall(r"<\|im_start\|>(\w)", text)][:2] == ["s", "u"]
    roles = re.findall(r"<\|im_start\|>(\w+)", text)
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert text.count("<|im_end|>") == len(roles), "no turn is left open"


def test_a_system_turn_goes_last_and_what_a_template_writes_never():
    tokenizer = tokenizer_of(FAMILIES["plain"].template)
    rows = Rows(tokenizer)
    messages = [{"role": "system", "content": "S" * 20}, {"role": "user", "content": "U" * 20},
                {"role": "assistant", "content": "A" * 20}]  # fmt: skip

    def left(limit):
        made = rows(Record("f:1", messages=messages), limit, START)
        text = tokenizer.decode(made.ids(0))
        return text.count("S"), text.count("U"), text.count("A"), made.report.remarks.get("truncated_answers")

    length = int(rows(Record("f:1", messages=messages), 999, START).lengths[0]) - 1  # without the line end
    assert left(length - 5) == (20, 15, 20, None)
    assert left(length - 20) == (20, 0, 20, None)
    assert left(length - 33) == (7, 0, 20, None)
    named = [messages[0], {"role": "user", "content": "assistant"}, messages[2]]
    length = int(rows(Record("f:1", messages=named), 999, START).lengths[0]) - 1
    text = tokenizer.decode(rows(Record("f:1", messages=named), length - 4, START).ids(0))
    assert "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n" + "A" * 20 in text, (
        "a word of the template's"
    )
    assert text.count("S") == 16
    length = length - len("assistant") + 20
    short = [*messages[:2], {"role": "assistant", "content": "A" * 60}]
    made = rows(Record("f:1", messages=short), length, START)
    text = tokenizer.decode(made.ids(0))
    assert (text.count("S"), text.count("U"), text.count("A")) == (0, 0, 60)
    made = rows(Record("f:1", messages=short), length - 1, START)
    text = tokenizer.decode(made.ids(0))
    assert (text.count("S"), text.count("U")) == (20, 20), (
        "where nothing saves the answer, nothing is taken from the rest"
    )
    assert made.report.remarks["truncated_answers"]["parts"] == {"tokens": 41}


def test_the_text_of_a_class_is_cut_and_what_stands_around_it_is_not():
    rng, tokenizer = random.Random(3), byte_tokenizer()
    prompt = ClassifyTokenConfig(prompt="Text: {text}\nLabel:")
    for objective, head, tail in ((ClassifyConfig(), "<bos>", ""), (prompt, "<bos>Text: ", "\nLabel:")):
        for number in range(60):
            text = words(rng, rng.randint(1, 40))
            before, tokens, after = (
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, text, tail)
            )
            limit, how = rng.randint(len(before) + len(after) + 1, 100), rng.choice([START, MIDDLE])
            data = DataConfig(max_length=limit, overlong=how)
            made = tokenized([Record(f"f:{number}", text=text, label="a")], Labelled(tokenizer, data, objective), data)
            kept = shortened(text, min(limit - len(before) - len(after), len(tokens)), how)
            assert made.ids(0).tolist() == before + kept + after
            assert made.table["full_length"][0].as_py() == len(before) + len(tokens) + len(after)


@pytest.mark.parametrize("how", [Overlong.cut, START, MIDDLE])
def test_what_closes_the_text_of_a_class_is_kept(how):
    """As BERT's [CLS] text [SEP]: the tokens that its post-processor writes stand for no character."""
    tokenizer = byte_tokenizer()
    begin, close = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair=None, special_tokens=[("<bos>", begin), ("<eos>", close)]
    )
    text = "abcdefghij"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for limit in range(4, 14):
        data = DataConfig(max_length=limit, overlong=how)
        encode = Labelled(tokenizer, data, ClassifyConfig())
        room = min(limit - 2, len(tokens))
        kept = tokens[:room] if how is Overlong.cut else shortened(text, room, how)
        made = tokenized([Record("f:1", text=text, label="a")], encode, data)
        assert made.ids(0).tolist() == [begin, *kept, close]


def test_a_real_tokenizer_keeps_answers_whole(shared):
    """Tokens of several letters, a space of its own before words, and a template that writes BOS."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi-3-mini")
    tokenizer.chat_template = FAMILIES["plain"].template
    rows = Rows(tokenizer)
    rng = random.Random(8)
    vocabulary = ["the", " cat", " sat", " über", " 漢字", "\n\n", " on", " mat", ".", " Internationalisation"]
    for number in range(30):
        turns = ["".join(rng.choices(vocabulary, k=rng.randint(3, 30))) for _ in range(2)]
        messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns, strict=True)]
        messages = [{"role": "system", "content": "Answer the question."}, *messages]
        record = Record(f"f:{number}", messages=messages)
        full = rows(record, 999, START)
        (a, b), how = full.spans(0)[0].tolist(), rng.choice([START, MIDDLE])
        limit = b - rng.randint(0, 8)
        made = rows(record, limit, how)
        if "truncated_answers" in made.report.remarks:
            continue
        c, d = made.spans(0)[0].tolist()
        assert made.ids(0)[c:d].tolist() == full.ids(0)[a:b].tolist()
        assert d == limit, "no more than had to go"
        text = tokenizer.decode(made.ids(0), clean_up_tokenization_spaces=False)
        assert "Answer the question." in text
        assert text.count("<|im_start|>") == 3


def test_contents_in_any_order_give_what_is_asked_of_them():
    """The runs alone: disjoint, within contents, of the size that is wanted where whole turns do not force more."""
    rng = random.Random(1)
    for _ in range(500):
        asked, at = [], 1
        for _ in range(rng.randint(1, 3)):
            contents = []
            for _ in range(rng.randint(0, 4)):
                at += rng.randint(1, 4)
                stop = at + rng.randint(1, 9)
                contents.append(Content(at, stop, rng.choice(["user", "tool", "assistant", "system"])))
                at = stop
            asked.append(contents)
            at += 5
        room = sum(c.stop - c.start for contents in asked for c in contents)
        if not room:
            continue
        excess, middle = rng.randint(1, room), rng.random() < 0.5
        runs = runs_to_cut(asked, excess, middle)
        assert runs is not None, "contents have as many"
        assert sum(b - a for a, b in runs) >= excess
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(runs))
        flat = [c for contents in asked for c in contents]
        for a, b in runs:
            ends = ([c.role for c in flat if c.start <= at <= c.stop] for at in (a, b))
            assert set(next(ends)) & set(next(ends)), "from within a content to within one of the same role"
        ids = list(range(at))
        row, spans = without(ids, [(at - 3, at)], runs)
        gone = {i for a, b in runs for i in range(a, b)}
        assert row == [i for i in ids if i not in gone]
        assert row[slice(*spans[0])] == ids[at - 3 :]
        if len({c.role for c in flat}) == 1 and len(flat) == 1:
            assert len(gone) == excess


def test_no_answer_is_cut_without_being_named():
    """By default: at the start, in data.json by way of the report, and as a finding with a length that holds them whole."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    data = DataConfig(max_length=20)
    records = [Record("rows.jsonl:1", prompt="q", response="r" * 30), Record("rows.jsonl:2", prompt="q", response="r"),
               Record("rows.jsonl:3", prompt="q", response="r" * 40)]  # fmt: skip
    made = tokenized(records, Conversations(tokenizer, data, [tokenizer.eos_token_id]), data)
    assert "2 rows cut by 38 tokens, 2 of them in their answers: rows.jsonl:1, rows.jsonl:3" in made.report.line()
    assert made.report.remarks["truncated_answers"]["parts"] == {"tokens": 38}
    config = Config()
    config.data = data
    (found,) = [
        f
        for f in cheap_findings(config.data, config.objective, Splits({"train": made}), tokenizer)
        if f.name is Check.truncated_answers
    ]
    assert found.places == ["rows.jsonl:1", "rows.jsonl:3"]
    length = int(re.search(r"data\.max_length=(\d+) holds them whole", found.text)[1])
    for limit, cut in ((length, 0), (length - 1, 1)):
        again = replace(data, max_length=limit)
        rows = tokenized(records, Conversations(tokenizer, again, [tokenizer.eos_token_id]), again)
        assert rows.report.truncated_rows == cut
    refusing = replace(data, overlong=Overlong.refuse)
    with pytest.raises(InputError, match=r"rows\.jsonl:1.*data\.overlong=cut_prompt_start\|drop"):
        tokenized(records, Conversations(tokenizer, refusing, []), refusing)
