"""Hydra groups, YAML only. The package exists so that `importlib.resources` finds the files in a wheel."""
