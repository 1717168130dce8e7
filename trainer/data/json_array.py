"""JSON that is no JSONL: one array of rows, or objects printed over several lines. Cut at its rows, in constant memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tritune.trainer.data.chunks import Chunk, Elements
from tritune.trainer.data.files import CHUNK_BYTES, LINE_BYTES, not_utf8, read_blocks, too_long
from tritune.trainer.errors import InputError

_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_ROWS = re.compile(r"\[\s*\{")  # an array of objects, whole or not
_OPEN = ("{", "[", ",")  # how a line ends whose value goes on


def is_array(head: str) -> bool:
    """Whether a file that begins so is one array, or objects over several lines, and no rows of one line each.

    Args:
        head: its beginning, 256 KiB of it or all.
    """
    start = _end_of(_SPACE, head, 0)
    line, _, rest = head[start:].partition("\n")
    if not line.startswith(("{", "[")):
        return False
    decode = json.JSONDecoder().raw_decode
    try:
        _, end = decode(line)
    except (ValueError, RecursionError):
        if _ROWS.match(head, start):
            return True
        try:
            _, end = decode(head, start)
        except (ValueError, RecursionError):
            return len(head) >= CHUNK_BYTES // 4 and line.rstrip().endswith(_OPEN)  # in characters; it was cut
        return "\n" in head[start:end]
    return line.startswith("[") and not line[end:].strip() and not rest.strip()


def read_array(path: Path) -> Iterator[Chunk]:
    """The rows of a file of which `is_array` is true, as texts with their lines; with their numbers where several share a line.

    Raises:
        InputError: it does not read on as JSON; the rows before come first.
    """
    rows: list[tuple[int, str]] = []
    size = before = 0
    try:
        for number, (line, text) in enumerate(_elements(path), 1):
            rows.append((number if line == before else line, text))
            before = line
            size += len(text)
            if size >= CHUNK_BYTES:
                yield Chunk(str(path), len(rows), Elements(rows))
                rows, size = [], 0
    except InputError:
        if rows:
            yield Chunk(str(path), len(rows), Elements(rows))
        raise
    if rows:
        yield Chunk(str(path), len(rows), Elements(rows))


def _elements(path: Path) -> Iterator[tuple[int, str]]:
    decode = json.JSONDecoder().raw_decode
    blocks = _texts(path)
    text, line, at, ended = "", 1, 0, False

    def more() -> bool:
        """Read as much again as is held, so that a long row is not decoded over and over; false at the end."""
        nonlocal text, at, ended
        text, at = text[at:], 0
        parts, wanted = [text], max(len(text), 1)
        while wanted > 0 and (part := next(blocks, None)) is not None:
            parts.append(part)
            wanted -= len(part)
        text = "".join(parts)
        ended = ended or len(parts) == 1
        return len(parts) > 1

    def skip(pattern: re.Pattern[str]) -> None:
        nonlocal at, line
        while True:
            stop = _end_of(pattern, text, at)
            line += text.count("\n", at, stop)
            at = stop
            if at < len(text) or not more():
                return

    skip(_SPACE)
    array = text.startswith("[", at)
    at += array
    closed = not array
    while True:
        skip(_BETWEEN)
        if array and text.startswith("]", at):
            closed, at = True, at + 1
            skip(_SPACE)
        if at == len(text):
            if not closed:
                raise InputError(f"{path}:{line}", "the array that the file begins with is not closed", _CLOSE)
            return
        if closed and array:
            raise InputError(f"{path}:{line}", "something follows the array that the file begins with", _ONE)
        try:
            _, stop = decode(text, at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, ValueError) and not ended and len(text) - at <= LINE_BYTES and more():
                continue
            raise _fault(path, line, text, at, error) from None
        if stop == len(text) and not ended and more():  # a number may go on
            continue
        yield line, text[at:stop]
        line += text.count("\n", at, stop)
        at = stop


def _texts(path: Path) -> Iterator[str]:
    """The file as text, in blocks that may end anywhere: it can be one line.

    Raises:
        InputError: bytes that are not UTF-8.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        for block in read_blocks(path):
            text = decoder.decode(block)
            line += text.count("\n")
            yield text
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise not_utf8(f"{path}:{line}", error) from None


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


_CLOSE = "Fetch or write the file again: its end is missing"
_ONE = "Write one array of all rows, or each row as one line"


def _fault(path: Path, line: int, text: str, at: int, error: Exception) -> InputError:
    if len(text) - at > LINE_BYTES:
        return too_long(f"{path}:{line}", len(text) - at)
    said = str(error)
    if isinstance(error, json.JSONDecodeError):
        said = f"{error.msg} at line {line + text.count(chr(10), at, error.pos)}"
    return InputError(f"{path}:{line}", f"the row that begins here is not JSON: {said}", "Mend or remove it")
