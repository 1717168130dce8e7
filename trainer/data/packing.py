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
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # open rows by how many tokens still fit
    occupied = 0  # bit r: some open row has room for r tokens; finding the fullest that fits is one shift
    num_rows = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        fits = occupied >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            rows = with_room[room]
            row = rows.pop()
            if not rows:
                occupied ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[document] = row
        left = room - length
        if left:
            with_room[left].append(row)
            occupied |= 1 << left
    order = np.argsort(row_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return order, bounds
