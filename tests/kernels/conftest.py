"""Kernels are tested in the tiles that a GPU runs, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def shipped_tiles():
    """The interpreter otherwise takes many rows a program, because it takes them one after the other."""
    from tritune.kernels import language

    kept, language.span = language.span, 1
    yield
    language.span = kept
