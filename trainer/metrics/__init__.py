"""Figures: what a step and a split measured, and where they are written."""
