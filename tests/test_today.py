"""What is left for another day is tested on one."""

from __future__ import annotations

import pytest
import today


@pytest.mark.parametrize(("length", "parts"), [(1, 4), (4, 4), (10, 3), (11, 4), (313, 6)])
def test_every_cell_has_its_day(monkeypatch, length, parts):
    cells, first = [f"cell {i}" for i in range(length)], 739_582 - 739_582 % min(parts, length)
    seen = []
    for day in range(first, first + min(parts, length)):
        monkeypatch.setenv(today.VARIABLE, str(day))
        chosen = today.some(cells, parts)
        assert chosen == today.some(cells, parts) == sorted(chosen, key=cells.index)
        assert length // parts <= len(chosen) <= -(-length // min(parts, length))
        seen += chosen
    assert sorted(seen) == sorted(cells)
    monkeypatch.setenv(today.VARIABLE, "all")
    assert today.some(cells, parts) == cells


def test_the_day_is_kept_for_the_workers_and_the_parts_change(monkeypatch):
    monkeypatch.delenv(today.VARIABLE, raising=False)
    assert today.seed() == today.os.environ[today.VARIABLE] == today.seed()
    days = []
    for day in range(739_500, 739_600, 4):
        monkeypatch.setenv(today.VARIABLE, str(day))
        days.append(tuple(today.some(range(40), 4)))
    assert len(set(days)) > 20, "the parts are dealt anew in each turn"
