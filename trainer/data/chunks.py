"""Raw rows on their way from a file to whoever parses them, and their parsing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tritune.trainer.data.files import not_utf8
from tritune.trainer.errors import InputError, reason

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

_SAID = {",": "commas", "\t": "tabs", ";": "semicolons"}
BLANK = " \t\r"  # JSON's white space within a line


@dataclass(frozen=True)
class Row:
    """One raw row. `place` is where it stands: file:line, or file:row for formats without lines."""

    fields: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Lines:
    """JSONL: whole lines, and the number of the first."""

    data: bytes
    first: int


@dataclass(frozen=True)
class Cells:
    """CSV: the header, and the cells of each row with its line."""

    header: list[str]
    rows: list[tuple[int, list[str]]]
    delimiter: str = ","


@dataclass(frozen=True)
class Elements:
    """A JSON array: the text of each row with its line."""

    rows: list[tuple[int, str]]


@dataclass(frozen=True)
class Texts:
    """Plain text: each text with its line."""

    rows: list[tuple[int, str]]


@dataclass(frozen=True)
class Batch:
    """A record batch as an Arrow stream, and the number of its first row: pyarrow pickles all that a slice is cut from."""

    stream: bytes
    first: int
    decode: bool  # by the features of `datasets` that its schema carries


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file, about 1 MiB, as they were read; `parse_chunk` makes rows of them. It pickles.

    `num_rows` counts what `parse_chunk` yields, good and bad, and `first` those of the file before it. A body that is an
    `InputError` is one bad row that was not held.
    """

    path: str
    num_rows: int
    body: Lines | Elements | Cells | Texts | Batch | InputError
    first: int = 0


def parse_chunk(chunk: Chunk) -> Iterator[Row | InputError]:
    """The rows of a chunk in order; in the place of a bad one its fault."""
    match chunk.body:
        case Lines():
            return _parse_lines(chunk.path, chunk.body)
        case Elements():
            return (_parse_line(f"{chunk.path}:{line}", text) for line, text in chunk.body.rows)
        case Cells():
            return _parse_cells(chunk.path, chunk.body)
        case Texts():
            return _parse_texts(chunk.path, chunk.body)
        case Batch():
            return _parse_batch(chunk.path, chunk.body)
    return iter([chunk.body])


def after(chunk: Chunk, rows: int) -> Chunk:
    """A chunk without its first rows."""
    body: Lines | Elements | Cells | Texts | Batch
    match chunk.body:
        case Lines(data, first):
            start = 0
            for _ in range(rows):
                blank = True
                while blank:
                    end = data.index(b"\n", start) + 1
                    blank = not data[start:end].strip(BLANK.encode() + b"\n")
                    start, first = end, first + 1
            body = Lines(data[start:], first)
        case Elements(elements):
            body = Elements(elements[rows:])
        case Cells(header, cells, delimiter):
            body = Cells(header, cells[rows:], delimiter)
        case Texts(texts):
            body = Texts(texts[rows:])
        case Batch(_, first, decode):
            body = Batch(stream_of(_batch(chunk.body).slice(rows)), first + rows, decode)
        case InputError():
            raise AssertionError("a chunk of one row has no rest")
    return replace(chunk, num_rows=chunk.num_rows - rows, body=body)


def stream_of(batch: RecordBatch) -> bytes:
    """A batch as an Arrow stream, without what it is a slice of."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _batch(body: Batch) -> RecordBatch:
    import pyarrow

    return pyarrow.ipc.open_stream(body.stream).read_next_batch()


def _parse_lines(path: str, body: Lines) -> Iterator[Row | InputError]:
    try:
        lines = body.data.decode().split("\n")
    except UnicodeDecodeError:
        yield from _parse_undecodable(path, body)
        return
    decode = json.JSONDecoder().raw_decode  # json.loads takes twice as long, for white space around the object
    for number, line in enumerate(lines, body.first):
        try:
            fields, end = decode(line)
        except (ValueError, RecursionError):
            fields, end = None, 0
        if isinstance(fields, dict) and (end == len(line) or not line[end:].strip(BLANK)):
            yield Row(fields, f"{path}:{number}")
        elif line.strip(BLANK):
            yield _parse_line(f"{path}:{number}", line)


def _parse_line(place: str, line: str) -> Row | InputError:
    """One line, with a message about what is wrong with it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        if "\0" in line:
            return _nul(place, line.index("\0"))
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return InputError(
            place, f"this line is not JSON: {at}", "Mend or remove the line; each line is one JSON object"
        )
    if isinstance(fields, dict):
        return Row(fields, place)
    if isinstance(fields, list) and fields and all(isinstance(part, dict) for part in fields):
        return Row({"messages": fields}, place)  # a conversation a line, without a name
    rule = f"this line is a JSON {type(fields).__name__}, and a row is an object"
    return InputError(place, rule, 'Write {"prompt": ..., "response": ...} or the like')


def _parse_undecodable(path: str, body: Lines) -> Iterator[Row | InputError]:
    """One line is not UTF-8: all are decoded one by one."""
    for number, line in enumerate(body.data.split(b"\n"), body.first):
        if line.strip(BLANK.encode()):
            try:
                yield _parse_line(f"{path}:{number}", line.decode())
            except UnicodeDecodeError as error:
                yield not_utf8(f"{path}:{number}", error)


def _nul(place: str, index: int) -> InputError:
    return InputError(place, f"it holds a NUL byte, as character {index + 1}", "Remove it, or fetch the file again")


def _parse_cells(path: str, body: Cells) -> Iterator[Row | InputError]:
    width = len(body.header)
    for line, cells in body.rows:
        if len(cells) > width and not any(cells[width:]):  # a spreadsheet's empty columns, which the header leaves out
            cells = cells[:width]
        if len(cells) != width:
            rule = f"this row has {len(cells)} cells, and the header {width}"
            remedy = f"Quote cells that contain {_SAID.get(body.delimiter, body.delimiter)} or line ends"
            yield InputError(f"{path}:{line}", rule, remedy)
        elif "\0" in (joined := ",".join(cells)):
            yield _nul(f"{path}:{line}", joined.index("\0"))
        else:
            yield Row(dict(zip(body.header, cells, strict=True)), f"{path}:{line}")


def _parse_texts(path: str, body: Texts) -> Iterator[Row | InputError]:
    for line, text in body.rows:
        if "\0" in text:
            yield _nul(f"{path}:{line}", text.index("\0"))
        else:
            yield Row({"text": text}, f"{path}:{line}")


def _parse_batch(path: str, body: Batch) -> Iterator[Row | InputError]:
    import pyarrow

    batch = _batch(body)
    features = _features(batch) if body.decode else None
    names = class_names(batch.schema)
    nested = [field.name for field in batch.schema if pyarrow.types.is_nested(field.type)]
    faults = (ValueError, OverflowError, pyarrow.ArrowException)  # text that is not UTF-8, a time out of Python's range
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except faults:
        rows = None
    for index in range(batch.num_rows):
        place = f"{path}:row {body.first + index}"
        try:
            fields = batch.slice(index, 1).to_pylist(maps_as_pydicts="strict")[0] if rows is None else rows[index]
            fields = fields if features is None else features.decode_example(fields)
            for name in nested:
                fields[name] = without_nulls(fields[name])
            for name, words in names.items():
                fields[name] = _named(fields[name], words, name, place)
            yield Row(fields, place)
        except InputError as error:
            yield error
        except faults as error:
            yield InputError(place, f"the row does not read: {reason(error)}", "Write it again, or remove it")


def without_nulls(value: Any) -> Any:
    """A value of Arrow's without the nulls in its objects: it fills them in where other rows have a key that this has not."""
    if isinstance(value, dict):
        return {k: without_nulls(v) if isinstance(v, dict | list) else v for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) if isinstance(v, dict | list) else v for v in value]
    return value


def class_names(schema: Schema) -> dict[str, list[str]]:
    """Column -> the names of its classes, of what `datasets` saved as numbers with names (`ClassLabel`)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        known = {n: f["names"] for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {n: words for n, words in known.items() if n in schema.names and isinstance(words, list)}


def _named(value: Any, words: list[str], column: str, place: str) -> Any:
    if not isinstance(value, int) or value == -1:  # what `datasets` writes where a label is not known
        return None if value == -1 else value
    if not 0 <= value < len(words):
        rule = f"column {column} is {value}, and it has names for 0 to {len(words) - 1}"
        raise InputError(place, rule, "Mend the row, or skip such rows with data.bad_rows=skip")
    return words[value]


def _features(batch: RecordBatch) -> Any:
    """What `datasets` has to make of Arrow's values (JSON, images), if anything."""
    from datasets import Features
    from datasets.features.features import require_decoding

    features = Features.from_arrow_schema(batch.schema)
    return features if any(map(require_decoding, features.values())) else None
