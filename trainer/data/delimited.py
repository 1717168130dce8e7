"""Files of cells: CSV and TSV, whatever stands between their cells."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    rows: list[tuple[int, list[str]]] = []
    header: list[str] | None = None
    last, size = number - 1, 0
    try:
        for line, last, cells in _rows(lines, delimiter, number):  # noqa: B007  of the last whole row, for what follows it
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
        rule = f"the row that begins here does not read as CSV, {error}"
        raise InputError(f"{path}:{last + 1}", rule, "Close its quotes, and double those within a cell") from None
    if rows and header:
        yield Chunk(str(path), len(rows), Cells(header, rows, delimiter))


def _rows(lines: Iterator[str], delimiter: str, number: int) -> Iterator[tuple[int, int, list[str]]]:
    """First line, last line and cells of each row; a quoted cell may run over several lines.

    Many write tabs and no quotes, where a cell may begin with one all the same. A line of as many cells as the header is a row
    then, unless a cell of it opens a quote and the next line is no row by itself.
    """
    if delimiter != "\t":
        reader, first = csv.reader(lines, delimiter=delimiter, strict=True), number
        while (cells := _next(reader, number)) is not None:
            last = number - 1 + reader.line_num
            yield first, last, cells
            first = last + 1
        return
    width, ahead = 0, next(lines, None)
    while ahead is not None:
        line, ahead = ahead, next(lines, None)
        cells = _bare(line)
        opened = any(cell.startswith('"') and not _is_quoted(cell) for cell in cells)
        width = width or len(cells)
        if len(cells) == width and (not opened or ahead is None or len(_bare(ahead)) == width):
            yield number, number, [cell[1:-1].replace('""', '"') if _is_quoted(cell) else cell for cell in cells]
            number += 1
            continue
        rest = itertools.chain([line], [] if ahead is None else [ahead], lines)
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        cells = _next(reader, number) or []
        taken = reader.line_num
        yield number, number + taken - 1, cells
        number += taken
        ahead = next(lines, None) if taken > 1 else ahead


def _next(reader: Any, number: int) -> list[str] | None:
    """The next row; what is wrong with it has its line, counted from `number`, the reader's first."""
    try:
        return next(reader, None)
    except csv.Error as error:
        raise csv.Error(f"at line {number - 1 + reader.line_num}: {error}") from None


def _bare(line: str) -> list[str]:
    """The cells of a line that has no quotes; none of an empty one."""
    line = line.rstrip("\r\n")
    return line.split("\t") if line else []


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


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
    """The names of the columns. Spreadsheets write columns that were once touched, without a name: they get their number."""
    if sum(not name.strip() for name in cells) > 1:
        cells = [name if name.strip() else f"column {number}" for number, name in enumerate(cells, 1)]
    if len(set(cells)) != len(cells):
        twice = sorted(name for name, count in Counter(cells).items() if count > 1)
        raise InputError(place, f"the column {some_names(twice)} stands twice in the header", "Rename one")
    if any("\0" in name for name in cells):
        raise InputError(place, "a column's name holds a NUL byte", "Remove it")
    return cells
