"""What is trained of a conversation, against a reference that renders each of its beginnings and compares token by token."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc

import jinja2
import pytest
import today
from chat_templates import FAMILIES, Family, conversation, tokenizer_of
from transformers.utils.chat_template_utils import _compile_jinja_template
from tritune.trainer.audit.cheap import cheap_findings
from tritune.trainer.config import Config
from tritune.trainer.config.choices import Duplicates, Turns
from tritune.trainer.config.data import Check, DataConfig
from tritune.trainer.data.encode import Conversations
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.masks import verify
from tritune.trainer.data.spans import ChatTemplate, shared
from tritune.trainer.data.splits import read_splits
from tritune.trainer.data.turns import UNTRAINED
from tritune.trainer.errors import InputError

HEAD = "\ue000"
THOUGHT = "<think>\nparity\n</think>\n\nYes."


def trained(tokenizer, messages, tools=None, **settings) -> list[tuple[list[int], list[int]]]:
    """What stands before each trained stretch, and the stretch; of the encoder that training uses."""
    out = Conversations(tokenizer, DataConfig(max_length=1 << 20, **settings), [])(
        [Record("here", messages, tools=tools)]
    )
    if out.bad:
        raise out.bad[0]
    found = []
    for row in out.columns.batch().to_pylist():
        spans = list(zip(row["trained"][::2], row["trained"][1::2], strict=True))
        assert all(a < b for a, b in spans)
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(spans)), "disjoint, in order"
        found += [(row["ids"][:a], row["ids"][a:b]) for a, b in spans]
    return found


def reference(tokenizer, family: Family, messages, tools) -> list[tuple[str, set[str]]]:
    """By answer: what the model is asked with, and what it is to write (one of), from transformers' own rendering."""

    program = _compile_jinja_template(tokenizer.chat_template)

    def text(turns, asked=False):
        turns = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
        special = tokenizer.special_tokens_map
        return program.render(messages=turns, tools=tools, add_generation_prompt=asked, **special)

    user = [{"role": "user", "content": "a"}]
    header = text(user, True)[shared(text(user, True), text(user)) :]
    wanted, first = [], None
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            first = None
            continue
        first = i if first is None or not family.merges else first
        if family.merges and i + 1 < len(messages) and messages[i + 1]["role"] == "assistant":
            continue
        whole = text(messages[: i + 1])
        try:
            asked = text(messages[:first], True)
        except jinja2.UndefinedError:  # of an empty conversation
            asked = None
        if asked is None or (not whole.startswith(asked) and (not first or messages[first - 1]["role"] == "assistant")):
            probe = [*messages[:first], {**messages[first], "content": HEAD}, *messages[first + 1 : i + 1]]
            head = text(probe).partition(HEAD)[0]
            asked = head[: head.rindex(header) + len(header)] if header else head
        assert whole.startswith(asked)
        end = whole.rindex(family.close) + len(family.close)
        answer = whole[len(asked) : end]
        wanted.append((asked, {answer, answer + family.extra}))
    return wanted


def hold(name: str, count: int, seed: int) -> tuple[int, int]:
    """Compare `count` conversations; return how many answers were compared and how many conversations refused."""
    family, rng = FAMILIES[name], random.Random(f"{name} {seed}")
    tokenizer = tokenizer_of(family.template)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    answers = refused = 0
    for number in range(count):
        messages, tools = conversation(rng)
        try:
            wanted = reference(tokenizer, family, messages, tools)
        except jinja2.TemplateError:  # the template itself refuses the conversation
            with pytest.raises(InputError, match="the chat template fails on this row"):
                trained(tokenizer, messages, tools)
            refused += 1
            continue
        for turns in list(Turns)[: 1 + (number % 8 == 0)]:
            found = trained(tokenizer, messages, tools, turns=turns)
            assert len(found) == len(wanted), messages
            for asked, said in wanted:
                one = next(((ids(asked), ids(text)) for text in said if (ids(asked), ids(text)) in found), None)
                assert one is not None, (messages, asked, said, [tokenizer.decode(written) for _, written in found])
                found.remove(one)
        answers += len(wanted)
        if number % 8:
            continue
        last = trained(tokenizer, messages, tools, last_turn_only=True)
        assert [before for before, _ in last] == [ids(asked) for asked, _ in wanted[-1:]]
        assert verify(tokenizer, ChatTemplate(tokenizer), messages, "here", tools) is None or "</think>" in str(
            messages
        )
    return answers, refused


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_as_it_is_asked_for(name):
    answers, refused = hold(name, 40, seed=1)
    assert answers > 20
    assert refused < 40


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_of_many_conversations(name):
    answers, _ = hold(name, 300, seed=today.seed())
    assert answers > 150


@pytest.mark.parametrize("name", FAMILIES)
def test_a_flagged_answer_is_not_trained(name):
    """The first of two equal answers is flagged as not to be learnt: the second alone is trained, where it stands."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": ("ask", "yes")[i % 2]} for i in range(4)]
    tokenizer = tokenizer_of(FAMILIES[name].template)
    both = trained(tokenizer, messages)
    assert len(both) == 2
    messages[1][UNTRAINED] = True
    assert trained(tokenizer, messages) == both[1:]
    merged = [messages[0], messages[1], messages[3]]
    if FAMILIES[name].merges:
        with pytest.raises(InputError, match="writes turns 1 and 2 as one"):
            trained(tokenizer, merged)


def test_conversations_in_several_rows_are_counted_and_stay_together(tmp_path):
    """Their rows fall into one split, none is taken for a repetition, and a repeated conversation is left out whole."""
    rows = [[{"role": ("user", "assistant")[i % 2], "content": f"{n} {i}" if i % 2 == 0 else THOUGHT} for i in range(4)]
            for n in range(20)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*rows, rows[0]]))
    config = Config()
    config.data.train, config.cache.dir, config.data.duplicates = str(path), str(tmp_path / "cache"), Duplicates.drop
    config.data.validation_share, config.cache.num_procs = 0.3, 1
    tokenizer = tokenizer_of(FAMILIES["strips earlier thoughts"].template)
    splits = read_splits(config, tokenizer, None)
    places = {name: [e.place(row) for row in range(len(e))] for name, e in splits.examples.items()}
    assert not set(places["train"]) & set(places["validation"])
    assert all(places[name].count(place) == 2 for name in places for place in places[name])
    assert sum(map(len, places.values())) == 40
    assert sum(e.report.duplicates for e in splits.examples.values()) == 2
    found = cheap_findings(config.data, config.objective, splits, tokenizer)
    assert {f.name for f in found} == {Check.turns_apart}
    assert sum(f.details["conversations"] for f in found) == 20
    assert sum(f.count for f in found) == 40


def test_a_long_talk_keeps_few_of_its_beginnings():
    """Of 300 answers each beginning is as long as all before it: together they took 512 MiB, and the row was refused."""
    tokenizer = tokenizer_of(FAMILIES["plain"].template)
    talk = [{"role": ("user", "assistant")[i % 2], "content": "so \N{GRINNING FACE} " * 20} for i in range(600)]
    tracemalloc.start()
    (row,) = ChatTemplate(tokenizer).rows(talk, "here")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(row.spans) == 300
    assert peak < 24 * len(row.text) * 4
