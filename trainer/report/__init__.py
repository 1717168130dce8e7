"""`report.html`: one self-contained file that says what a run asked, what came of it, and how to run it again."""

from __future__ import annotations

from pathlib import Path

from tritune.trainer.report.page import render
from tritune.trainer.report.record import read_record
from tritune.trainer.run.directory import replace_file

NAME = "report.html"


def write_report(directory: Path) -> Path:
    """Write the report of a run from the files in its directory, whatever state it is in; return its path.

    Raises:
        InputError: the directory holds no run.
    """
    text = render(read_record(directory))
    path = directory / NAME
    replace_file(path, text)
    return path
