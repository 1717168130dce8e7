"""Ranks: how they start, what they agree on, which part of a tensor is whose, and who of them died."""
