"""Read rows from files. A row keeps its place (`file:line`), so that every later complaint can name it.

Formats: JSONL, CSV, Parquet, plain text, a folder written by `datasets`, and `hf://name[@config]:split` for the hub.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.trainer.config import DataConfig
from tritune.trainer.config_choices import TextUnit
from tritune.trainer.errors import InputError

FORMATS = ".jsonl, .json (lines), .csv, .tsv, .parquet, .txt, a folder saved by datasets, or hf://name[@config]:split"


@dataclass(frozen=True)
class Row:
    """One raw row. `place` is where it stands: file:line, or file:row for formats without lines."""

    fields: dict[str, Any]
    place: str


def require_source(source: str, key: str) -> None:
    """Refuse a source that is not there, before anything expensive starts."""
    if source.startswith("hf://"):
        if ":" not in source[5:]:
            raise InputError(f"{key}={source}", "a hub dataset needs a split", "Write hf://name:split")
        return
    path = Path(source)
    if not path.exists():
        raise InputError(f"{key}={source}", "the file does not exist", _similar(path))
    if path.is_file() and path.suffix not in _READERS:
        raise InputError(
            f"{key}={source}", f"files ending in {path.suffix or 'nothing'} are not read", f"Use {FORMATS}"
        )


def require_sources(config: DataConfig) -> None:
    """Refuse files that are not there, before anything else is done."""
    for name in ("train", "validation", "test", "retention"):
        source = getattr(config, name)
        if source is not None:
            require_source(source, f"data.{name}")


def read_rows(source: str, key: str, text_unit: TextUnit) -> Iterator[Row]:
    """Yield the rows of `source`; `key` is the config key it came from, for messages."""
    require_source(source, key)
    if source.startswith("hf://"):
        yield from _read_hub(source)
    elif Path(source).is_dir():
        yield from _read_dataset_folder(source, key)
    else:
        yield from _READERS[Path(source).suffix](Path(source), text_unit)


def _similar(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"The folder {parent} does not exist either. Give a path from {Path.cwd()}, or an absolute one"
    files = sorted(p.name for p in parent.iterdir() if p.suffix in _READERS)[:6]
    return f"In {parent} there is: {', '.join(files) or 'no data file'}"


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}:{line}", f"byte {data[error.start]:#04x} is not UTF-8", "Convert it: iconv -f latin1 -t utf-8"
        ) from None


def _read_jsonl(path: Path, _: TextUnit) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            rule = f"this line is not JSON: {at}"
            raise InputError(
                f"{path}:{number}", rule, "Mend or remove the line; each line is one JSON object"
            ) from None
        if not isinstance(fields, dict):
            rule = f"this line is a JSON {type(fields).__name__}, and a row is an object"
            raise InputError(f"{path}:{number}", rule, 'Write {"prompt": ..., "response": ...} or the like')
        yield Row(fields, f"{path}:{number}")


def _read_csv(path: Path, _: TextUnit) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        header = next(reader, None)
        if header is None:
            raise InputError(str(path), "the file is empty", "A CSV starts with a line of column names")
        if len(set(header)) != len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise InputError(f"{path}:1", f"the column {', '.join(twice)} stands twice in the header", "Rename one")
        first = reader.line_num + 1
        for cells in reader:
            place, first = f"{path}:{first}", reader.line_num + 1  # a quoted cell may run over several lines
            if not cells:
                continue
            if len(cells) != len(header):
                rule = f"this row has {len(cells)} cells, and the header {len(header)}"
                raise InputError(place, rule, "Quote cells that contain commas or line ends")
            yield Row(dict(zip(header, cells, strict=True)), place)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}", str(error), "Mend the line") from None


def _read_parquet(path: Path, _: TextUnit) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}:row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(str(path), f"it does not read as Parquet: {error}", "Write the file again") from None


def _read_txt(path: Path, unit: TextUnit) -> Iterator[Row]:
    text = _text(path).replace("\r\n", "\n")
    if unit is TextUnit.file:
        if text.strip():
            yield Row({"text": text}, f"{path}:1")
        return
    pattern = r"[^\n]+" if unit is TextUnit.line else r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*"
    line, seen = 1, 0
    for match in re.finditer(pattern, text):
        line += text.count("\n", seen, match.start())
        seen = match.start()
        if match.group().strip():
            yield Row({"text": match.group()}, f"{path}:{line}")


def _read_dataset_folder(folder: str, key: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    if not any((Path(folder) / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise InputError(f"{key}={folder}", "this folder was not saved by datasets", f"Use {FORMATS}")
    dataset = load_from_disk(folder)
    if isinstance(dataset, DatasetDict):
        split = key.rpartition(".")[2]
        if split not in dataset:
            raise InputError(
                f"{key}={folder}", f"it has no split {split}", f"It has {', '.join(dataset)}: name a folder"
            )
        dataset = dataset[split]
    for number, fields in enumerate(dataset, 1):
        yield Row(fields, f"{folder}:row {number}")


def _read_hub(source: str) -> Iterator[Row]:
    """`hf://org/name:split`, `hf://org/name@config:split`, or a local folder of files, `hf://./folder:split`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source[5:].rpartition(":")
    name, _, config = name.partition("@")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:  # not found, unreachable, or no such split or config
        rule = f"the dataset did not load: {str(error).strip().splitlines()[0]}"
        raise InputError(source, rule, "Check name, @config and :split, and that the hub can be reached") from None
    for number, fields in enumerate(dataset, 1):
        yield Row(fields, f"{source}:row {number}")


csv.field_size_limit(2**31 - 1)  # whole documents stand in cells
_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".md": _read_txt,
}
