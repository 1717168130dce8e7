"""Which implementation computes: `triton` or `reference`. What was chosen, and why, is announced."""

from __future__ import annotations

AVAILABLE = ("auto", "reference")


def choose(name: str) -> tuple[str, str]:
    """Return the implementation for `kernels=<name>` and the reason, for the log.

    Raises:
        ValueError: the name is not an implementation.
    """
    if name not in AVAILABLE:
        raise ValueError(f"kernels={name}: there is no such implementation. Use {' or '.join(AVAILABLE)}")
    return "reference", "asked for" if name == "reference" else "this version has no Triton kernels yet"
