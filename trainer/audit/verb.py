"""`tritune audit [overrides as for train]`: read all data before a GPU is held, and say what is wrong with it.

Writes audit.json, rejects.jsonl and pictures, also when the exit status is 2.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tritune.trainer.audit.findings import blocking
from tritune.trainer.config import Config
from tritune.trainer.config.compose import load_config, split_argv
from tritune.trainer.errors import InputError
from tritune.trainer.redact import redact
from tritune.trainer.shown import shown
from tritune.trainer.verbs import exit_status

TELL_SECONDS = 5.0


def main(argv: list[str]) -> int:
    """Run the verb; return 0, 2 where something of `audit.fail_on` was found or the input is wrong, 1 where we failed."""
    config_dir, overrides = split_argv(argv)

    def call() -> None:
        error = audit(load_config(overrides, config_dir, training=False))
        if error is not None:
            raise error

    return exit_status(call)


def audit(config: Config) -> InputError | None:
    """Read, print the page, write the folder; return what `audit.fail_on` makes of it.

    Raises:
        InputError: nothing can be read, or the folder cannot be written.
    """
    from tritune.trainer.audit.page import render_page
    from tritune.trainer.audit.read import read_audit
    from tritune.trainer.data.splits import Watch
    from tritune.trainer.report.data_plots import draw
    from tritune.trainer.run.directory import replace_file, write_whole_json

    began = time.perf_counter()
    found = read_audit(config, Watch(_Teller().notify))
    folder = Path(config.audit.out or (Path(config.run.dir) / "audit" if config.run.dir else "audit"))
    try:
        content = {"about": found.about, "splits": found.facts, "findings": [asdict(f) for f in found.findings]}
        write_whole_json(folder / "audit.json", content)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.rejects]
        replace_file(folder / "rejects.jsonl", redact("".join(lines)))
        for name, (_, svg) in draw(found.facts).items():
            replace_file(folder / name, svg)
    except OSError as error:
        rule = f"the results cannot be written there ({error.strerror})"
        raise InputError(f"audit.out={folder}", rule, "Give another audit.out") from None
    print(redact(render_page(found, color=sys.stdout.isatty())))
    rejected = f", {len(found.rejects):,} rows left out in rejects.jsonl" if found.rejects else ""
    print(shown(f"{folder}/audit.json{rejected}; {time.perf_counter() - began:.1f} s"))
    return blocking(found.findings, config.audit.fail_on)


class _Teller:
    """A line on standard error every few seconds: a large source takes minutes."""

    def __init__(self) -> None:
        self._told = time.perf_counter()

    def notify(self, name: str, rows: int, tokens: int) -> None:
        if time.perf_counter() - self._told >= TELL_SECONDS:
            self._told = time.perf_counter()
            count = f", {tokens:,} tokens" if tokens else ""
            print(shown(f"audit     {name}: {rows:,} rows{count}"), file=sys.stderr, flush=True)
