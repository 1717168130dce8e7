"""Read rows. A row keeps its place (`file:line`), so that every later complaint can name it.

Reading cuts files into chunks of raw rows, which any process can parse. One row or a thousand files: memory stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.choices import TextUnit
from tritune.trainer.data.chunks import BLANK, Batch, Chunk, Lines, Row, Texts, after, parse_chunk, stream_of
from tritune.trainer.data.delimited import read_csv, read_tsv
from tritune.trainer.data.files import (
    CHUNK_BYTES,
    LINE_BYTES,
    format_of,
    is_saved,
    line_blocks,
    read_blocks,
    source_files,
    text_blocks,
    too_long,
)
from tritune.trainer.data.files import FORMATS as FORMATS
from tritune.trainer.data.files import require_source as require_source
from tritune.trainer.data.files import require_sources as require_sources
from tritune.trainer.data.json_array import is_array, read_array
from tritune.trainer.errors import InputError, LostConnectionError, UnreachableError, reason

if TYPE_CHECKING:
    from pyarrow import RecordBatch

BATCH_ROWS = 1000


def read_chunks(source: str, key: str, text_unit: TextUnit, skip: int = 0) -> Iterator[Chunk | InputError]:
    """Cut a source into chunks, in the order of its files.

    A fault of a file (broken compression or Parquet, bytes that are no text, no row) is yielded in its place, and reading
    goes on with the next file.

    Args:
        key: the config key that the source came from, for messages.
        skip: start after so many rows, good and bad, of those that all chunks together hold. They are not parsed, and not
            read either where the format allows. A file's fault comes again if it stands after `skip` rows or later.

    Raises:
        InputError: nothing is there, or it is no data; a hub dataset or a folder saved by `datasets` does not read on.
    """
    passed = 0
    files = source_files(source, key)
    whole = not files or is_saved(Path(source))
    for path in [Path()] if whole else files:
        if whole:
            chunks = _read_saved(source, key, skip) if Path(source).is_dir() else _read_hub(source)
        else:
            chunks = _READERS[format_of(path) or ""](path, text_unit, skip - passed)
        before = passed
        try:
            for chunk in chunks:
                rows = chunk if isinstance(chunk, int) else chunk.num_rows
                if not isinstance(chunk, int) and passed + rows > skip:
                    cut = max(skip - passed, 0)
                    yield replace(after(chunk, cut) if cut else chunk, first=passed - before + cut)
                passed += rows
        except InputError as fault:
            if whole:
                raise
            if passed >= skip:
                yield fault
        else:
            if passed == before and passed >= skip:
                place = f"{key}={source}" if whole or str(path) == source else str(path)
                yield InputError(place, "the file holds no row", "Give a file with rows, or leave it out")


def read_all(source: str, key: str, text_unit: TextUnit) -> Iterator[Row | InputError]:
    """Yield the rows of a source, parsed in this process, and in the place of a bad one its fault.

    Raises:
        InputError: nothing is there, or it is no data.
    """
    for chunk in read_chunks(source, key, text_unit):
        yield from [chunk] if isinstance(chunk, InputError) else parse_chunk(chunk)


def read_rows(source: str, key: str, text_unit: TextUnit) -> Iterator[Row]:
    """Yield the rows of a source, parsed in this process; `key` is the config key it came from, for messages.

    Raises:
        InputError: the first fault, of the source, a file or a row.
    """
    for row in read_all(source, key, text_unit):
        if isinstance(row, InputError):
            raise row
        yield row


# -- reading: an int stands for rows that were passed over ----------------------------------------------------------------


def _read_json(path: Path, _: TextUnit, __: int) -> Iterator[Chunk]:
    """Rows of one line each, or one array: whatever the file is called, its beginning says which."""
    try:
        head = next(read_blocks(path), b"").decode(errors="replace")
    except InputError:  # which comes again, at its line
        head = ""
    return read_array(path) if is_array(head) else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Chunk]:
    blank = BLANK.encode()
    for number, data in line_blocks(path):
        if isinstance(data, int):
            yield Chunk(str(path), 1, too_long(f"{path}:{number}", data))
            continue
        some = bool(data.strip(blank + b"\n"))  # a file can hold a GiB of line ends
        rows = sum(1 for line in data.split(b"\n") if line.strip(blank)) if some else 0
        if rows:
            yield Chunk(str(path), rows, Lines(data, number))


def _read_txt(path: Path, unit: TextUnit, _: int) -> Iterator[Chunk]:
    rows: list[tuple[int, str]] = []
    size = 0
    fault = None
    try:
        for line, text in _texts(path, unit):
            rows.append((line, text))
            size += len(text) + 1
            if size >= CHUNK_BYTES:
                yield Chunk(str(path), len(rows), Texts(rows))
                rows, size = [], 0
    except InputError as error:
        fault = error
    if rows:
        yield Chunk(str(path), len(rows), Texts(rows))
    if fault is not None:
        raise fault


def _texts(path: Path, unit: TextUnit) -> Iterator[tuple[int, str]]:
    r"""Documents with their lines; \r\n becomes \n. A paragraph ends at a line of white space."""
    blocks = ((number, text.replace("\r\n", "\n")) for number, text in text_blocks(path))
    if unit is TextUnit.file:  # held whole: it is one row
        text = "".join(text for _, text in blocks)
        if text.strip():
            yield 1, text
        return
    lines = (pair for number, text in blocks for pair in enumerate(text.removesuffix("\n").split("\n"), number))
    if unit is TextUnit.line:
        yield from ((number, line) for number, line in lines if line.strip())
        return
    held: list[str] = []
    first, size = 1, 0
    for number, line in lines:
        if line.strip():
            if not held:
                first, size = number, 0
            held.append(line)
            size += len(line)
            if size > LINE_BYTES:
                rule = f"the paragraph that begins here has more than {LINE_BYTES:,} characters"
                raise InputError(
                    f"{path}:{first}", rule, "Put empty lines between documents, or set data.text_unit=line"
                )
        elif held:
            yield first, "\n".join(held)
            held = []
    if held:
        yield first, "\n".join(held)


def _read_parquet(path: Path, _: TextUnit, skip: int) -> Iterator[Chunk | int]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Pages as they are needed: by default every column of the file was read before the first row, the whole file.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            start = 0
            while start < len(groups) and number + groups[start].num_rows <= skip:
                number += groups[start].num_rows
                start += 1
            yield number
            widest = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
            size = min(max(CHUNK_BYTES // max(widest, 1), 1), BATCH_ROWS)
            for batch in file.iter_batches(size, row_groups=range(start, len(groups))):
                yield from _batches(str(path), batch, number + 1, decode=False)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        rule = f"it does not read as Parquet{f' after row {number}' if number else ''}: {reason(error)}"
        raise InputError(str(path), rule, "Write the file again") from None


def _read_saved(folder: str, key: str, skip: int) -> Iterator[Chunk | int]:
    """A folder saved by `datasets`, or of one with splits that which the key names."""
    import pyarrow
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    # What a damaged JSON file of its makes `datasets` raise is whatever it meets first.
    faults = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
    try:
        dataset = load_from_disk(folder)
        if isinstance(dataset, DatasetDict):
            dataset = dataset[key.rpartition(".")[2]]
        begin = min(skip, len(dataset))
        yield begin
        if begin < len(dataset):
            yield from _from_datasets(folder, dataset.select(range(begin, len(dataset))), begin)
    except (*faults, DatasetsError, pyarrow.ArrowException) as error:
        rule = f"the saved dataset does not read: {reason(error)}"
        raise InputError(f"{key}={folder}", rule, "Save it again") from None


def hub_version(source: str) -> str:
    """What `datasets` calls this version of a hub dataset: a commit, or a hash of files; other rows have another.

    Raises:
        InputError: there is no such dataset, or the hub cannot be reached.
    """
    from datasets import load_dataset_builder

    name, config, _ = hub_name(source)
    with _hub_errors(source):
        return str(load_dataset_builder(name, config).hash)


def _read_hub(source: str) -> Iterator[Chunk]:
    """`hf://org/name:split`, `hf://org/name@config:split`, or a local folder of files, `hf://./folder:split`.

    Streamed, but for a split that only a downloaded dataset has: `train[:10%]`, `train+test`.
    """
    from datasets import load_dataset

    name, config, split = hub_name(source)
    with _hub_errors(source):
        dataset = load_dataset(name, config, split=split, streaming=not set("[+(") & set(split))
    with _hub_errors(source, begun=True):
        yield from _from_datasets(source, dataset, 0)


def hub_name(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf://name[@config]:split`."""
    name, _, split = source[5:].partition(":")  # train[:10%] has a colon of its own
    name, _, config = name.partition("@")
    return name, config or None, split


@contextmanager
def _hub_errors(source: str, begun: bool = False) -> Iterator[None]:
    """A fault of the user's as an `InputError`.

    Raises:
        UnreachableError: the hub does not answer.
        LostConnectionError: it no longer does, and rows were read (`begun`).
    """
    import pyarrow
    from datasets.exceptions import DatasetsError

    # No such split or config, a script, or bad rows.
    faults = (OSError, ValueError, LookupError, TypeError, RuntimeError, DatasetsError, pyarrow.ArrowException)
    try:
        yield
    except Exception as error:
        if begun and _is_lost(error):
            raise LostConnectionError(f"{source}: the connection to the hub was lost: {reason(error)}") from error
        rule = f"the dataset did not load: {reason(error)}"
        remedy = "Check name, @config and :split, and that the hub can be reached"
        if _is_lost(error):
            raise UnreachableError(source, rule, remedy) from None
        if isinstance(error, faults):
            raise InputError(source, rule, remedy) from None
        raise


def _is_lost(error: Exception) -> bool:
    """Whether it is the network or the server. By name: several HTTP clients stand behind `datasets`, and come and go."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    names = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "ClientConnectionError"}
    return not names.isdisjoint(c.__name__ for c in type(error).__mro__)


def _from_datasets(path: str, dataset: Any, passed: int) -> Iterator[Chunk]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        for batch in table.combine_chunks().to_batches():
            yield from _batches(path, batch, passed + 1, decode=True)
            passed += batch.num_rows


def _batches(path: str, batch: RecordBatch, first: int, decode: bool) -> Iterator[Chunk]:
    size = max(batch.num_rows * CHUNK_BYTES // max(batch.nbytes, CHUNK_BYTES), 1)
    for start in range(0, batch.num_rows, size):
        part = batch.slice(start, size)
        yield Chunk(path, part.num_rows, Batch(stream_of(part), first + start, decode))


_READERS: dict[str, Callable[[Path, TextUnit, int], Iterator[Chunk | int]]] = {
    "jsonl": _read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": _read_parquet,
    "txt": _read_txt,
}
