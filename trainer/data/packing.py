"""Several documents in one row: which stand together.

Best fit decreasing (Johnson 1973): within a window of the global order, from the longest document to the shortest, each goes
into the fullest row that still has room. Nothing is cut.
"""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents into rows of `capacity` tokens.

    Args:
        lengths: tokens of each document, int64 [n], none above `capacity`.

    Returns:
        order: int64 [n], document numbers, row by row; bounds: int64 [rows + 1], where in `order` each row begins.
    """
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # open rows by how many tokens still fit
    occupied = 0  # bit r: some open row has room for r tokens; finding the fullest that fits is one shift
    num_rows = 0
    rows: list[int] = []  # of each document, from the longest to the shortest
    # Those of one length together, at a third of the cost: the fullest row that fits remains it until it is full.
    for length, count in zip(ordered[starts].tolist(), np.diff(starts, append=len(lengths)).tolist(), strict=True):
        while count:
            fits = occupied >> length
            room = length + (fits & -fits).bit_length() - 1 if fits else capacity
            each = min(room // length, count)
            if fits:
                open_rows = with_room[room]
                number = min(len(open_rows), count) if each == 1 else 1
                taken = open_rows[: -number - 1 : -1]
                del open_rows[-number:]
                occupied ^= 0 if open_rows else 1 << room
            else:
                taken = list(range(num_rows, num_rows + (count if each == 1 else 1)))
                num_rows += len(taken)
            rows += taken * each
            count -= len(taken) * each
            left = room - each * length
            if left:
                with_room[left] += taken
                occupied |= 1 << left
    row_of = np.empty(len(lengths), np.int64)
    row_of[by_length] = rows
    order = np.argsort(row_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return order, bounds
