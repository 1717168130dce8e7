"""What is said is bounded, without secrets that were cut, and without what a terminal obeys."""

from __future__ import annotations

import io
import pickle

import pytest
from tritune.launch.cli import main as cli
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.metrics.progress import Progress
from tritune.trainer.shown import LIMIT, TAIL, bounded, escaped, shown

TOKEN = "hf_AbC123dEf456GhI789jKl012MnO345pQr6"


def test_control_characters_are_spelled_out_and_text_stays():
    assert escaped("\x1b[31mred\x07\x9b\u202e\r\x7f\udcff") == "\\x1b[31mred\\x07\\x9b\\u202e\\r\\x7f\\udcff"
    assert escaped("line\n\tcafé 漢字 🙂 بسم") == "line\n\tcafé 漢字 🙂 بسم"
    assert shown(f"\x1b[2J{TOKEN}") == "\\x1b[2J***"


def test_a_long_text_keeps_its_ends_and_says_how_much_is_left_out():
    text = "a" * LIMIT + "b" * 12_345 + "c" * TAIL
    assert bounded(text, tail=TAIL) == "a" * LIMIT + "... (12,345 characters left out)" + "c" * TAIL
    assert bounded(bounded(text)) == bounded(text)
    assert bounded("a" * LIMIT) == "a" * LIMIT


@pytest.mark.parametrize("at", range(LIMIT - len(TOKEN) - 2, LIMIT + 2))
def test_no_half_of_a_secret_is_left_by_a_cut(at):
    text = "- " * (at // 2) + TOKEN + " -" * 500
    assert not [n for n in range(8, len(TOKEN)) if TOKEN[:n] in bounded(text)]


def test_errors_are_bounded_wherever_the_length_stands():
    long = "x" * 1_000_000
    for parts in ((long, "rule", "Remedy"), ("value", long, "Remedy"), ("value", "rule", long)):
        error = InputError(*parts)
        assert len(str(error)) < 2 * (LIMIT + TAIL)
        assert "characters left out" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)  # it crosses from rank to rank
    fault = str(ConfigFaults([f"report.question={long}: the rule. The remedy"]))
    assert fault.endswith("the rule. The remedy")
    assert len(fault) < 2 * (LIMIT + TAIL)


@pytest.mark.parametrize("argv", [["config", "model.p\x1b[31math=1"], ["\x1b[31mtrian"], ["config", "report.question=\x1b[2J${"],
                                  ["evaluate", "run.dir=\x1b[2J"]])  # fmt: skip
def test_no_verb_puts_escape_codes_on_the_terminal(argv, capsys):
    assert cli(argv) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[" in said.err


def test_the_progress_spells_names_out_in_every_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = Progress(True, stream)
    progress.say("column \x1b]0;title\x07")
    progress.reading("name\x1b[31m", 1, 1)
    assert "\x1b" not in stream.getvalue().replace("\r\x1b[K", ""), "but for the code that clears our own line"
    assert "\\x1b]0;title\\x07" in stream.getvalue()
