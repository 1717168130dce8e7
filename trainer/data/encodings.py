"""The text encoding of a file's bytes: UTF-8 as it stands, UTF-16 and UTF-32 by their mark or their NUL bytes, made UTF-8."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path

from tritune.trainer.errors import InputError

# UTF-32's little-endian mark begins with that of UTF-16, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_UNMARKED = 16  # bytes of which every second is NUL: no text that is read has one, so this is UTF-16 without a mark


def as_utf8(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The same text as UTF-8. A UTF-8 mark stays, for whoever reads on.

    Raises:
        InputError: it begins as UTF-16 or UTF-32 and does not go on so.
    """
    head, damage = b"", None
    try:
        while len(head) < _UNMARKED and (piece := next(pieces, None)) is not None:
            head += piece
    except InputError as error:  # what was read before it comes first
        damage = error
    mark, name = encoding_of(head)
    rest = itertools.chain([head] if head else [], pieces)
    yield from rest if name is None else _decoded(rest, mark, name, path)
    if damage is not None:
        raise damage


def _decoded(pieces: Iterator[bytes], mark: bytes, name: str, path: Path) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(name)()
    begun = False
    try:
        for piece in pieces:
            text = decoder.decode(piece if begun else piece[len(mark) :])
            begun = True
            if text:
                yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        said = getattr(error, "reason", str(error))
        rule = f"it begins as {name.upper()}, and does not read as such: {said}"
        raise InputError(str(path), rule, "Write the file again, as UTF-8") from None


def encoding_of(head: bytes) -> tuple[bytes, str | None]:
    """The mark that a file begins with, and the encoding that must be decoded; None where it is UTF-8 or unknown."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return mark, name
    some = head[:_UNMARKED]
    if len(some) == _UNMARKED:
        even, odd = some[::2], some[1::2]
        if not any(odd) and all(even):
            return b"", "utf-16-le"
        if not any(even) and all(odd):
            return b"", "utf-16-be"
    return b"", None


def remedy_for(path: str, data: bytes) -> str:
    """A command that makes UTF-8 of a file whose bytes are none."""
    if b"\0" in data:  # an encoding of two bytes that begins with letters of another alphabet
        return f"Convert it: iconv -f utf-16 -t utf-8 {path} > new, and give that"
    # 0x80 to 0x9f are control characters in Latin 1, and quotes, dashes and the euro in what Windows calls by that name.
    name = "windows-1252" if any(0x80 <= byte < 0xA0 for byte in data) else "latin1"
    return f"Convert it: iconv -f {name} -t utf-8 {path} > new, and give that"
