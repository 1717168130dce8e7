"""Scores of a split, and base against tuned."""
