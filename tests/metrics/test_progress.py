"""A live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os

from tritune.trainer.metrics.progress import Progress, duration

ROW = {"step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1234.0, "memory_gib": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_one_line_that_is_rewritten():
    stream = Terminal()
    progress = Progress(True, stream)
    for step in range(1, 21):
        progress.step({**ROW, "step": step}, 20)
    progress.say("saved")
    text = stream.getvalue()
    assert text.count("\r\033[K") == 21
    assert text.count("\n") == 1
    for word in ("step 20/20", "loss 2.5000", "1,234 tok/s", "ETA", "0.50 GiB"):
        assert word in text


def test_elsewhere_first_and_last_line_and_no_control_characters(tmp_path):
    stream = io.StringIO()
    progress = Progress(True, stream)
    progress.open_log(tmp_path / "train.log")
    for step in range(1, 21):
        progress.step({**ROW, "step": step}, 20)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "20/20"]
    assert "\r" not in stream.getvalue()
    assert len((tmp_path / "train.log").read_text().splitlines()) == 2


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = Progress(False, stream)
    progress.step(ROW, 20)
    progress.say("hello")
    assert stream.getvalue() == ""


def test_a_reader_that_is_gone_ends_nothing(tmp_path):
    """As of `| head`: the run goes on, everything is in the log, and the log says why the terminal is silent."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        progress = Progress(True, stream)
        progress.open_log(tmp_path / "train.log")
        progress.say("first")
        os.close(reader)
        for text in ("second", "third"):
            progress.say(text)
        progress.close()
    logged = [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()]
    said = "nobody reads what is printed any more (Broken pipe): it stands here alone"
    assert logged == ["first", said, "second", "third"]


def test_duration():
    assert (duration(5), duration(65), duration(3723)) == ("0:05", "1:05", "1:02:03")
