"""Chunks through forked processes: in order, ended ones named; a template that is hostile on one row only costs that row."""

from __future__ import annotations

import os
import re
import signal

import pytest
from harness import children
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data import isolated
from tritune.trainer.data.confined_rows import ConfinedRows
from tritune.trainer.data.encode import Conversations
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.pipeline import encode_records
from tritune.trainer.data.spans import ChatTemplate
from tritune.trainer.data.templates import render
from tritune.trainer.data.workers import in_order
from tritune.trainer.errors import InputError
from tritune.trainer.model.tokenizer import byte_tokenizer

DOUBLED = "{% set n = namespace(a=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}{{ {n.a: 1} | length }}"
CHAIN = (
    "{% set n = namespace(a=[1]) %}{% for i in range(99999) %}{% set n.a = n.a | select %}{% endfor %}{{ n.a | first }}"
)
HOARD = (
    "{% set n = namespace(t='x' * 60000000, l=[]) %}{% for i in range(99) %}{% set n.l = n.l + [n.t ~ i] %}{% endfor %}"
)
HOSTILE = {
    "endless": (DOUBLED, "more than 0.5 s of the processor"),
    "crash": (CHAIN, r"by signal 11 \(SIGSEGV\)|more than 0.5 s"),
    "memory": (HOARD, "more than (512 MiB of memory|0.5 s)"),  # a busy machine takes its time
}
HONEST = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ' ' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
HONEST += "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"


def rows(count: int, bad: tuple[int, ...]) -> list[Record]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(2)]
    return [Record(f"rows:{i}", messages=[*talk, {"role": "user", "content": "now"}, *talk[1:]] if i in bad else talk)
            for i in range(count)]  # fmt: skip


def tokenizer_with(hostile: str):
    """No trial meets it: no conversation of theirs has a turn that says so."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | selectattr('content', 'eq', 'now') | list %}" + hostile + "{% endif %}" + HONEST
    )
    return tokenizer


def encoder_with(tokenizer, monkeypatch) -> Conversations:
    encoder = Conversations(tokenizer, DataConfig(), [4])  # tried, which takes a limit of whole seconds
    monkeypatch.setattr(isolated, "CPU_SECONDS", 0.5)
    return encoder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_is_hostile_on_one_row_costs_that_row(name, monkeypatch):
    source, why = HOSTILE[name]
    tokenizer = tokenizer_with(source)
    encoder = encoder_with(tokenizer, monkeypatch)
    pieces = list(in_order(lambda bad: encode_records(rows(7, bad), encoder), iter([(), (5,), ()]), 2))
    assert [p.batch.num_rows for p in pieces] == [7, 6, 7]
    pieces.append(encode_records(rows(7, (5,)), Conversations(tokenizer, DataConfig(), [4])))
    for piece in (pieces[1], pieces[3]):
        [fault] = piece.bad
        assert re.search(f"^the chat template was stopped on this row: it .*({why})", fault.rule), fault.rule
        assert fault.value == "rows:5"
        assert piece.batch.num_rows == 6
    with pytest.raises(InputError, match="rows:5: the chat template was stopped on this row"):
        render(tokenizer, rows(7, (5,))[5].messages, "rows:5")


@pytest.mark.parametrize("num_procs", [0, 1])
def test_a_second_row_refuses_the_template(num_procs, monkeypatch):
    encoder, records = encoder_with(tokenizer_with(DOUBLED), monkeypatch), rows(9, (5, 6, 7, 8))
    said = r"model\.chat_template: .* was stopped again, on rows:6: it takes more than 0\.5 s"
    with pytest.raises(InputError, match=said):
        list(in_order(encoder, iter([records]), num_procs)) if num_procs else encoder(records)


def test_rows_are_the_same_wherever_they_are_rendered():
    tokenizer = tokenizer_with("")
    encoder, records = Conversations(tokenizer, DataConfig(), [4]), rows(9, (2, 3))
    [made] = in_order(encoder, iter([records]), 1)
    here = encoder(records)
    assert made.columns.batch().equals(here.columns.batch())
    template = ChatTemplate(tokenizer)
    assert ConfinedRows(template)([(r.messages, r.place, None) for r in records]) == [
        template.rows(r.messages, r.place) for r in records
    ]


def test_a_process_that_ends_otherwise_is_a_failure():
    before = children()

    def work(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    found = in_order(work, iter(range(9)), 2)
    with pytest.raises(RuntimeError, match=r"by signal 9.*lower cache\.num_procs"):
        list(found)
    assert children() == before
