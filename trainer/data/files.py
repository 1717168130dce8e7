"""Which files a source is, and their bytes: decompressed, without a byte order mark, cut at line ends, in constant memory."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tritune.trainer.config.data import DataConfig, training_sources
from tritune.trainer.data.encodings import as_utf8, remedy_for
from tritune.trainer.data.opening import cannot_open, open_regular, what_is
from tritune.trainer.errors import InputError, reason

CHUNK_BYTES = 1 << 18
LINE_BYTES = 32 << 20  # no line, cell or paragraph is held beyond this; also bounds what an unclosed quote swallows
# One decompressed piece is unbounded but for its input, of which 4 bytes can become 128 KiB: at most 16 MiB at a time.
# Costs 1.2 ns a byte over pieces of 64 KiB.
_ZSTD_BYTES = 512
ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "txt", ".md": "txt",
}  # fmt: skip
FORMATS = (
    ".jsonl, .json (lines or one array), .csv, .tsv, .txt (each also as .gz or .zst), .parquet, a folder or a glob "
    "of such files, a folder saved by datasets, or hf://name[@config]:split"
)


def format_of(path: Path) -> str | None:
    """The format that a name says, compressed or not; None where it says none that is read."""
    if path.suffix in (".gz", ".zst"):
        inner = ENDINGS.get(Path(path.stem).suffix)
        return None if inner == "parquet" else inner
    return ENDINGS.get(path.suffix)


def require_source(source: str, key: str) -> None:
    """Refuse a source that is not there, before anything expensive starts."""
    source_files(source, key)


def require_sources(config: DataConfig) -> None:
    """Refuse files that are not there, before anything else is done."""
    named = {f"data.{name}": getattr(config, name) for name in ("validation", "test", "retention")}
    for source, key in [*training_sources(config).values(), *((s, k) for k, s in named.items() if s is not None)]:
        require_source(source, key)


def source_files(source: str, key: str) -> list[Path]:
    """The files of a local source in reading order: shards by name, a glob's by path; [] for `hf://`.

    Args:
        key: the config key it came from, for messages; its last word is the split of a saved `DatasetDict`.

    Raises:
        InputError: nothing is there, or nothing of a known format, or files of more than one format, or something that cannot
            be opened or is no regular file.
    """
    if source.startswith("hf://"):
        name, _, split = source[5:].partition(":")
        if not name or not split:
            raise InputError(f"{key}={source}", "a hub dataset needs a name and a split", "Write hf://name:split")
        return []
    path, place = Path(source), f"{key}={source}"
    what = what_is(path, place)
    if what == "folder":
        return _saved_files(path, key) if is_saved(path) else _shards(_inside(path, place), source, key)
    if what == "file":
        if format_of(path) is None:
            rule = f"files ending in {path.suffix or 'nothing'} are not read"
            raise InputError(place, rule, f"Use {FORMATS}")
        return [path]
    if glob.has_magic(source):
        return _shards(map(Path, glob.glob(source, recursive=True)), source, key)
    raise InputError(place, "the file does not exist", _similar(path))


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    names = ("state.json", "dataset_dict.json")
    return any(what_is(folder / name, str(folder / name)) == "file" for name in names)


def read_blocks(path: Path, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a file, decompressed, as UTF-8, in blocks of `size` but for the last, without a byte order mark.

    Raises:
        InputError: a compressed stream is cut off or broken; all that was read before comes first.
    """
    held: list[bytes] = []
    length, begun, damage = 0, False, None
    try:
        for piece in as_utf8(_pieces(path, size), path):
            held.append(piece)
            length += len(piece)
            if length >= max(size, 3):  # a byte order mark has three, and is not cut
                data = _joined(held, begun)
                whole = len(data) // size * size
                yield from (data[i : i + size] for i in range(0, whole, size))
                held, length, begun = [data[whole:]], len(data) - whole, True
    except InputError as error:
        damage = error
    if data := _joined(held, begun):
        yield data
    if damage is not None:
        raise damage


def line_blocks(path: Path, limit: int = LINE_BYTES, size: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes | int]]:
    r"""Whole lines, as many as end in about `size` bytes, with the number of the first. Lines end in \n.

    A line of more than `limit` bytes is passed over without being held: its size stands for it, an int. `limit` is not
    below `size`.

    Raises:
        InputError: a compressed stream is cut off or broken, at the line where that is; whole lines before it come first.
    """
    number, held, length = 1, [b""], 0  # held: the beginning of line `number`
    try:
        for block in read_blocks(path, size):
            start = 0
            head = block.find(b"\n")
            if head < 0:
                length += len(block)
                held = [*held, block] if length <= limit else []
                continue
            if length + head > limit:
                yield number, length + head
                number, held, start = number + 1, [], head + 1
            cut = block.rfind(b"\n") + 1
            if cut > start:
                data = b"".join([*held, memoryview(block)[start:cut]])
                yield number, data
                number += data.count(b"\n")
            held, length = [block[cut:]], len(block) - cut
    except InputError as damage:
        raise InputError(f"{path}:{number}", damage.rule, damage.remedy) from None
    if length > limit:
        yield number, length
    elif length:
        yield number, b"".join(held)


def text_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """The same as text, for formats in which a bad line leaves the rest in doubt.

    Raises:
        InputError: besides, bytes that are not UTF-8 and a line that is too long; the lines before come first.
    """
    for number, data in line_blocks(path):
        if isinstance(data, int):
            raise too_long(f"{path}:{number}", data)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            good = data[: data.rfind(b"\n", 0, error.start) + 1]
            if good:
                yield number, good.decode()
            line = number + good.count(b"\n")
            raise not_utf8(f"{path}:{line}", error) from None
        yield number, text


def too_long(place: str, size: int) -> InputError:
    rule = f"this line has {size:,} bytes, and {LINE_BYTES:,} is the most"
    return InputError(place, rule, "Cut it into several rows")


def not_utf8(place: str, error: UnicodeDecodeError) -> InputError:
    rule = f"byte {error.object[error.start]:#04x} is not UTF-8"
    return InputError(place, rule, remedy_for(place.rpartition(":")[0], error.object))


def _joined(pieces: list[bytes], begun: bool) -> bytes:
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return data if begun else data.removeprefix(b"\xef\xbb\xbf")


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    ending = path.suffix
    remedy = "Fetch or write the file again"
    try:
        if ending == ".gz":
            with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) as file:
                while piece := file.read1(size):  # read() loses what came before the end of a stream cut off
                    yield piece
        elif ending == ".zst":
            yield from _unzstd(path)
        else:
            with open_regular(path) as plain:
                while piece := plain.read(size):
                    yield piece
    except EOFError:
        raise InputError(str(path), f"the file ends early: its {ending} stream is cut off", remedy) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(str(path), f"it does not read as {ending}: {reason(error)}", remedy) from None


def _unzstd(path: Path) -> Iterator[bytes]:
    """Frame by frame; the library's own streaming reader takes a file that is cut off for one that is whole."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    with open_regular(path) as file:
        frame, begun = decompressor.decompressobj(), False
        try:
            while data := file.read(_ZSTD_BYTES):
                while data:
                    piece = frame.decompress(data)
                    if piece:
                        yield piece
                    data, begun = frame.unused_data, not frame.eof
                    if frame.eof:
                        frame = decompressor.decompressobj()
        except zstandard.ZstdError as error:
            rule = f"it does not read as .zst: {reason(error)}"
            raise InputError(str(path), rule, "Fetch or write the file again") from None
    if begun:
        raise EOFError


def _shards(paths: Iterable[Path], source: str, key: str) -> list[Path]:
    """Those of `paths` whose names say a format; folders and hidden ones are left out, what is no file is refused."""
    named = sorted(p for p in paths if format_of(p) and not p.name.startswith("."))
    files = [p for p in named if what_is(p, str(p)) == "file"]
    if not files:
        what = "this folder was not saved by datasets, and it" if Path(source).is_dir() else "this pattern"
        raise InputError(f"{key}={source}", f"{what} holds no file that is read", f"Use {FORMATS}")
    one_of = {format_of(p): p.name for p in files}
    if len(one_of) > 1:
        names = ", ".join(one_of.values())
        rule = f"its files are of more than one format: {names}"
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        raise InputError(f"{key}={source}", rule, f"Name those of one: {folder}/*{''.join(files[0].suffixes[-2:])}")
    return files


def _saved_files(folder: Path, key: str) -> list[Path]:
    """The Arrow files of a folder saved by `datasets`, of the split that the key names where it has splits."""
    whole = folder
    if what_is(folder / "dataset_dict.json", str(folder / "dataset_dict.json")) == "file":
        splits = _saved_names(whole, folder / "dataset_dict.json", "splits", key)
        split = key.rpartition(".")[2]
        if split not in splits:
            rule = f"it has no split {split}"
            raise InputError(f"{key}={folder}", rule, f"It has {', '.join(splits)}: name a folder")
        folder /= split
    names = _saved_names(whole, folder / "state.json", "_data_files", key)
    for name in ("dataset_info.json", *names):  # what `datasets` opens by itself
        if what_is(folder / name, str(folder / name)) != "file":
            raise InputError(f"{key}={whole}", f"its file {folder / name} is not there", "Save the dataset again")
    return [folder / name for name in names]


def _saved_names(whole: Path, path: Path, field: str, key: str) -> list[str]:
    """The names, of splits or files, that one of the JSON files of a saved folder lists."""
    with open_regular(path) if what_is(path, str(path)) else io.BytesIO() as file:
        text = file.read()
    try:
        listed = json.loads(text)[field]
        names = [part["filename"] for part in listed] if field == "_data_files" else list(listed)
    except (ValueError, LookupError, TypeError, RecursionError):
        listed, names = None, []
    if not isinstance(listed, list) or not all(map(_is_plain, names)):
        rule = f"it was saved by datasets, but {path} does not say which {field.strip('_')} it has"
        raise InputError(f"{key}={whole}", rule, "Save the dataset again")
    return names


def _is_plain(name: object) -> bool:
    """Whether it names something in the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _inside(folder: Path, place: str) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise cannot_open(place, error) from None


def _similar(path: Path) -> str:
    parent = path.parent
    if what_is(parent, str(parent)) != "folder":
        return f"The folder {parent} does not exist either. Give a path from {Path.cwd()}, or an absolute one"
    files = sorted(p.name for p in _inside(parent, str(parent)) if format_of(p))[:6]
    return f"In {parent} there is: {', '.join(files) or 'no data file'}"
