"""Kernels are tested in the tiles that a GPU runs, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of the folder but what compiles for other chips or measures: tests that take seconds are left out."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def shipped_tiles():
    """The interpreter otherwise takes many rows a program, because it takes them one after the other."""
    from tritune.kernels import language

    kept, language.span = language.span, 1
    yield
    language.span = kept
