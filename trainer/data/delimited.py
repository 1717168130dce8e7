"""Files of cells: CSV and TSV, whatever stands between their cells."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.chunks import Cells, Chunk
from tritune.trainer.data.files import CHUNK_BYTES, LINE_BYTES, text_blocks
from tritune.trainer.errors import InputError, some_names

DELIMITERS = (",", ";", "\t", "|")
_TRIED_ROWS = 50  # that have to agree on what stands between their cells
_TRIED_CHARS = 1 << 16
_DECLARED = "sep="  # a first line of Excel's: what follows is the delimiter


def read_csv(path: Path, _: TextUnit, __: int) -> Iterator[Chunk]:
    """Rows of cells with their lines, the header apart; the delimiter is found where it is not a comma."""
    return _read(path, ",")


def read_tsv(path: Path, _: TextUnit, __: int) -> Iterator[Chunk]:
    """The same where a tab is what the name promises."""
    return _read(path, "\t")


def _read(path: Path, promised: str) -> Iterator[Chunk]:
    csv.field_size_limit(LINE_BYTES)  # whole documents stand in cells, and an unclosed quote swallows no more than this
    blocks = text_blocks(path)
    head = next(blocks, None)
    if head is None:
        return
    declared, number, first_text = _declared(*head)
    delimiter = declared or delimiter_of(first_text[:_TRIED_CHARS], promised)
    lines = (line for _, text in itertools.chain([(number, first_text)], blocks) for line in _lines(text))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    header: list[str] | None = None
    passed = number - 1  # lines before the reader's first
    first, size = number, 0
    try:
        for cells in reader:
            line, first = first, passed + reader.line_num + 1  # a quoted cell may run over several lines
            if not cells:
                continue
            if header is None:
                header = _header(cells, f"{path}:{line}")
                continue
            rows.append((line, cells))
            size += sum(map(len, cells)) + len(cells)
            if size >= CHUNK_BYTES:
                yield Chunk(str(path), len(rows), Cells(header, rows, delimiter))
                rows, size = [], 0
    except (csv.Error, InputError) as error:
        if rows and header:
            yield Chunk(str(path), len(rows), Cells(header, rows, delimiter))
        if isinstance(error, InputError):
            raise
        line = passed + reader.line_num
        rule = f"the row that begins here does not read as CSV, at line {line}: {error}"
        raise InputError(f"{path}:{first}", rule, "Close its quotes, and double those within a cell") from None
    if rows and header:
        yield Chunk(str(path), len(rows), Cells(header, rows, delimiter))


def _declared(number: int, text: str) -> tuple[str | None, int, str]:
    """The delimiter that a first line `sep=;` declares, and what comes after that line with its number."""
    line, end, rest = text.partition("\n")
    name = line.rstrip("\r")
    if name.startswith(_DECLARED) and len(name) == len(_DECLARED) + 1 and end:
        return name[-1], number + 1, rest
    return None, number, text


def delimiter_of(text: str, promised: str = ",") -> str:
    """What stands between the cells: `promised` where the first rows have several cells by it, as many as the header;
    else the only other that does so; else the only one that the header has. Rows then say what is wrong with them.

    Args:
        text: the beginning of the file.
    """
    agreeing = [d for d in DELIMITERS if _agree(text, d)]
    if promised in agreeing or len(agreeing) > 1:
        return promised
    header = text.partition("\n")[0]
    found = agreeing or [d for d in DELIMITERS if d in header]
    return found[0] if len(found) == 1 else promised


def _agree(text: str, delimiter: str) -> bool:
    """Whether the first rows have as many cells as the header, and more than one."""
    rows: list[list[str]] = []
    lines = _lines(text if len(text) < _TRIED_CHARS else text[: text.rfind("\n") + 1])
    try:
        for cells in csv.reader(lines, delimiter=delimiter, strict=True):
            rows += [cells] if cells else []
            if len(rows) == _TRIED_ROWS:
                break
    except csv.Error:  # at the end of what was read, where a quoted cell goes on
        pass
    return bool(rows) and len(rows[0]) > 1 and all(len(cells) == len(rows[0]) for cells in rows)


def _lines(text: str) -> Iterator[str]:
    return iter(io.StringIO(text, newline=""))


def _header(cells: list[str], place: str) -> list[str]:
    if len(set(cells)) != len(cells):
        twice = sorted(name for name, count in Counter(cells).items() if count > 1)
        raise InputError(place, f"the column {some_names(twice)} stands twice in the header", "Rename one")
    if any("\0" in name for name in cells):
        raise InputError(place, "a column's name holds a NUL byte", "Remove it")
    return cells
