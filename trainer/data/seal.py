"""Seals: what the file of a table held when it was written, so that no byte of it is used that changed since.

The values of the tokens are nearly all of a file. They have a SHA-256 for each block of 64 KiB, and a block is looked at when
one of its tokens is first read. All else (structure, lengths, spans, labels, digests, places) has one SHA-256, which is compared
before Arrow reads the file: Arrow trusts what it maps.

SHA-256, because it is what the rest of the project uses, and the fastest of hashlib where the processor has instructions for
it (1.75 GB/s against 0.93 for BLAKE2b on an AMD EPYC). A block of 1 MiB would cost the first batch, of some 500 rows all over
the file, sixteen times as much.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
from tritune.trainer.regular import open_regular, read_regular

BLOCK_BYTES = 1 << 16
DIGEST_BYTES = 16  # of each block's SHA-256: as many as make a second content with the same ones out of reach
SEAL_BYTES = 1 << 32  # no file of seals is longer: it would be of 16 TiB of tokens


@dataclass(frozen=True)
class Facts:
    """What the manifest has of a table's file.

    Attributes:
        num_bytes: of the file.
        rest: SHA-256 of everything but the values of the tokens.
        num_ranges: how many pieces the values of the tokens lie in, one a record batch.
        seal: SHA-256 of the file of seals.
    """

    num_bytes: int
    rest: str
    num_ranges: int
    seal: str


class Damaged(Exception):
    """A file is not what was written. The message has which, and how that shows."""


def write_seal(table: Path) -> Facts:
    """Hash a table's file, write the hashes beside it, and return what the manifest is to have of it."""
    data = _map(table)
    ranges = _token_ranges(data)
    digests = [_digest(data, *block) for block in _blocks(ranges).tolist()]
    content = ranges.astype("<i8").tobytes() + b"".join(digests)
    seal_path(table).write_bytes(content)
    return Facts(len(data), _hash_rest(data, ranges), len(ranges), hashlib.sha256(content).hexdigest())


def seal_path(table: Path) -> Path:
    return table.with_suffix(".seal")


def open_sealed(table: Path, facts: Facts, damaged: Callable[[str], NoReturn]) -> tuple[pa.Table, Guard]:
    """Map a table, after everything in it but the tokens was found unchanged; with it, what watches over these.

    Args:
        damaged: called when a token is read from a block that changed, with what is wrong; it raises.

    Raises:
        Damaged: something changed.
        OSError: a file cannot be opened.
    """
    content = read_regular(seal_path(table), SEAL_BYTES)
    if hashlib.sha256(content).hexdigest() != facts.seal:
        raise Damaged(f"{seal_path(table).name} changed after it was written (SHA-256 differs)")
    ranges = np.frombuffer(content, "<i8", 2 * facts.num_ranges).reshape(-1, 2)
    digests = np.frombuffer(content, f"V{DIGEST_BYTES}", offset=ranges.nbytes)
    data = _map(table)
    if len(data) != facts.num_bytes:
        raise Damaged(f"{table.name} has {len(data):,} bytes, and {facts.num_bytes:,} were written")
    if _hash_rest(data, ranges) != facts.rest:
        raise Damaged(f"{table.name} changed after it was written (SHA-256 differs)")
    with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data))) as reader:
        return reader.read_all(), Guard(data, ranges, digests, lambda: damaged(f"{table.name} changed on the disk"))


class Guard:
    """Watches over the values of a table's tokens.

    Args:
        data: the mapped file.
        ranges: int64 [n, 2], where in it values lie, ascending.
        digests: of the blocks that these ranges are cut into, in order.
    """

    def __init__(
        self, data: np.ndarray, ranges: np.ndarray, digests: np.ndarray, damaged: Callable[[], NoReturn]
    ) -> None:
        self._data, self._digests, self._damaged = data, digests, damaged
        self._address = data.__array_interface__["data"][0]
        self._blocks = _blocks(ranges)
        self._starts = np.ascontiguousarray(self._blocks[:, 0])
        self._seen = np.zeros(len(self._blocks), bool)

    def require(self, values: np.ndarray) -> None:
        """Return once the blocks of `values`, a view of the file, were found unchanged, now or before."""
        if not len(values):
            return
        start = values.__array_interface__["data"][0] - self._address
        first, last = self._starts.searchsorted((start, start + values.nbytes - 1), "right") - 1
        if not self._seen[first : last + 1].all():
            self._look(int(first), int(last))

    def require_all(self) -> None:
        """Return once every block was found unchanged."""
        self._look(0, len(self._blocks) - 1)

    def _look(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            if not self._seen[block]:
                if _digest(self._data, *self._blocks[block].tolist()) != self._digests[block].tobytes():
                    self._damaged()
                self._seen[block] = True


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [n], mapped.

    Raises:
        Damaged: the file is empty.
        OSError: it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except ValueError:  # nothing can be mapped of no bytes
            raise Damaged(f"{path.name} is empty") from None


def _token_ranges(data: np.ndarray) -> np.ndarray:
    """Where in a table's file the values of the tokens lie, int64 [n, 2]."""
    address, found = data.__array_interface__["data"][0], []
    with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data))) as reader:
        for chunk in reader.read_all()["ids"].chunks:
            values = chunk.values.buffers()[1]
            if values is not None and values.size:
                found.append((values.address - address, values.address - address + values.size))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _blocks(ranges: np.ndarray) -> np.ndarray:
    """The blocks of the ranges, int64 [m, 2]; each range begins with one of its own."""
    parts = [np.arange(start, stop, BLOCK_BYTES) for start, stop in ranges.tolist()]
    starts = np.concatenate([np.zeros(0, np.int64), *parts])
    stops = np.minimum(starts + BLOCK_BYTES, np.repeat(ranges[:, 1], [len(p) for p in parts]))
    return np.stack([starts, stops], 1)


def _digest(data: np.ndarray, start: int, stop: int) -> bytes:
    return hashlib.sha256(data[start:stop].data).digest()[:DIGEST_BYTES]


def _hash_rest(data: np.ndarray, ranges: np.ndarray) -> str:
    """SHA-256 of everything outside of the ranges."""
    hashed, at = hashlib.sha256(), 0
    for start, stop in [*ranges.tolist(), (len(data), len(data))]:
        hashed.update(data[at:start].data)
        at = stop
    return hashed.hexdigest()
