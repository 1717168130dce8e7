"""An audit on one page of a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tritune.trainer.audit.findings import Finding, Severity
from tritune.trainer.audit.read import Audit
from tritune.trainer.config.axes import Learns
from tritune.trainer.config.registry import axis_options
from tritune.trainer.shown import shown

WIDTH = 100
SHOWN, FEW = 3, 1  # places of a finding; where there are many findings
MANY = 8  # findings
MOST, LINE = 18, 72  # findings on the page; characters of a place with its note
BAR = 40
STYLES = {Severity.fault: "bold red", Severity.warning: "yellow", Severity.note: "dim"}


def render_page(audit: Audit, color: bool = False) -> str:
    """Return the page, some 60 lines at most."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, force_terminal=color, no_color=not color, highlight=False, emoji=False)
    about = audit.about
    context = f"context {about['context']:,}" if about["context"] else "context unknown"
    if about["labels"]:
        context += f", {about['labels']:,} labels"
    console.print(
        Text(f"{about['objective']}, {shown(about['tokenizer'])}, max_length {about['max_length']:,}, {context}"),
        overflow="ellipsis", no_wrap=True,
    )  # fmt: skip
    if audit.facts:
        console.print(_splits(audit.facts))
    if "train" in audit.facts:
        if axis_options("objective")[about["objective"]].learns is not Learns.text:  # its blocks all have one length
            console.print(_lengths(audit.facts["train"]))
        if "labels" in audit.facts["train"]:
            console.print(_labels(audit.facts["train"]["labels"]))
    if audit.findings:
        console.print(_findings(audit.findings))
    else:
        console.print("nothing found")
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _splits(facts: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("split")
    for name in ("rows", "left out", "tokens", "trained", "stop token", "median", "95 %", "longest", "cut"):
        table.add_column(name, justify="right")
    for name, f in facts.items():
        lengths, rows = f["lengths"], max(f["rows"], 1)
        trained = f"{f['supervised_tokens'] / max(f['tokens'], 1):.0%}" if f["supervised_tokens"] else "-"
        stops = f"{f['stop_rows'] / rows:.1%}" if f["stop_rows"] else "-"
        cells = [f"{f['rows']:,}", f"{f['bad_rows'] + f['unsupervised_rows']:,}", f"{f['tokens']:,}", trained, stops]
        cells += [f"{lengths[n]:,}" if lengths else "-" for n in ("median", "p95", "longest")]
        table.add_row(name, *cells, f"{f['truncated_rows']:,}")
    return table


def _lengths(facts: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, title="tokens a row of train", title_justify="left", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max((count for *_, count in facts["histogram"]), default=1)
    for low, high, count in facts["histogram"]:
        table.add_row(
            f"{low:,} to {high - 1:,}", "█" * round(BAR * count / most) or ("▏" if count else ""), f"{count:,}"
        )
    return table


def _labels(counts: dict[str, int]) -> Text:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    ends = ordered if len(ordered) <= 6 else [*ordered[:3], *ordered[-3:]]
    parts = [f"{shown(label)} {count:,}" for label, count in ends]
    if len(ordered) > 6:
        parts.insert(3, "...")
    return Text("labels of train: " + ", ".join(parts))


def _findings(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings[:MOST]:
        few = SHOWN if len(findings) < MANY else FEW
        text = Text(shown(finding.text))
        places, more = [shown(p) for p in finding.shown(few)], max(finding.count, len(finding.places)) - few
        for number, place in enumerate(places, 1):
            rest = f"  and {more:,} more" if number == len(places) and more > 0 else ""
            room = LINE - len(rest)
            text.append(f"\n{place if len(place) <= room else place[: room - 3] + '...'}{rest}", style="dim")
        table.add_row(Text(finding.severity.value, style=STYLES[finding.severity]), finding.name.value, text)
    if len(findings) > MOST:
        table.add_row("", "", f"and {len(findings) - MOST:,} more findings in audit.json")
    return table
