"""Tables and plots of `kernels.py`'s record: `kernels.md`, and `kernels-KERNEL.png` for each kernel. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB, GB = 2**20, 1e9
COLOURS = {"ours": "#1b6ca8", "ours-chunks": "#7fb3d8", "eager": "#8a8a8a"}
OTHER, FLOOR_COLOUR = "#d9a05b", "#b3261e"
EXPLANATION = """\
Milliseconds are medians (20 % and 80 % are in the record), each repetition on a flushed L2 cache and with the step's launches
waiting on the GPU; *forward* is that of training. The floor is measured in the same run: cuBLAS of the products that the case
cannot do without, one after the other, and its other bytes at the speed of a large copy; *of the floor* is the floor's time
over the provider's. *Peak* is memory over the inputs, gradients that are returned included. Errors are against float64 of the
same inputs: the largest over the largest value, and RMS over RMS, of the output or gradient that is worst. *Ratio* is eager's
time over the provider's, forward + backward: above 1 is faster."""


def render(record: dict[str, Any], out: Path) -> list[str]:
    """Write all of it; return a line per file."""
    paths = [out / "kernels.md"]
    paths[0].write_text(markdown(record))
    for kernel in dict.fromkeys(row["kernel"] for row in record["cases"]):
        rows = [row for row in record["cases"] if row["kernel"] == kernel and measured(row)]
        if rows:
            paths.append(out / f"kernels-{kernel}.png")
            plot(rows, record, paths[-1])
    return [f"wrote {path}" for path in paths]


def measured(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: cell for name, cell in row["providers"].items() if "skipped" not in cell}


def floor_ms(row: dict[str, Any], side: str) -> float | None:
    """The mean of the runs that there are. `side`: `forward` or `both`."""
    found = [cell[f"{side}_ms"] for cell in row["floors"].values() if "skipped" not in cell]
    return sum(found) / len(found) if found else None


def worst(cell: dict[str, Any]) -> tuple[str, str, float | None, float | None] | None:
    """(where, where, max, RMS): the worst of all outputs and gradients; None as a figure: not finite."""
    errors = cell.get("errors")
    if not errors:
        return None

    def most(kind: str) -> str:
        return max(errors, key=lambda name: float("inf") if errors[name][kind] is None else errors[name][kind])

    largest, mean = most("max"), most("rms")
    return largest, mean, errors[largest]["max"], errors[mean]["rms"]


def title(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in row["sizes"].items())
    if row["kernel"] in ("linear_cross_entropy", "rms_norm", "add_rms_norm"):
        what = "head" if row["kernel"] == "linear_cross_entropy" else "weight"
        parts += f"; {what} {'trained' if row['trains'] else 'frozen'}"
    parts += f"; {row['ignored']:.0%} of tokens ignored" if row["ignored"] else ""
    return f"{row['kernel']}: {parts}" + (f"; dropout {row['p']:g}" if row["p"] else "")


def markdown(record: dict[str, Any]) -> str:
    lines = ["# Kernels", ""]
    if record["smoke"]:
        lines += ["**A smoke run on CPU, in Triton's interpreter: nothing here is a measurement.**", ""]
    machine = record["machine"]
    where = ", ".join(machine["gpus"]) or machine["cpu"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines += [f"{where}, {record['dtype']}, {record['date']}, commit {record['commit'] or 'unknown'}; `{record['command']}`,"
              f" {record['seconds']} s. {versions}.", "", EXPLANATION, ""]  # fmt: skip
    for row in record["cases"]:
        lines += _table(row, record["titles"], record["smoke"])
    return "\n".join(lines)


def _table(row: dict[str, Any], titles: dict[str, str], smoke: bool) -> list[str]:
    lines = [f"## {title(row)}", ""]
    floors = {side: floor_ms(row, side) for side in ("forward", "both")}
    if floors["both"] is not None:
        lines += [f"Floor: forward {_ms(floors['forward'])}, with backward {_ms(floors['both'])} ms"
                  f" ({sum(row['flops']) / 1e12:.3g} TFLOP of products, {sum(row['bytes']) / 1e6:,.4g} MB)."]  # fmt: skip
    losses = [cell["loss"] for cell in measured(row).values() if cell["loss"] is not None]
    if losses:
        lines += [f"The loss is {losses[0]:.2f} nats."]
    if row["target"]:
        lines += [_target(row, floors["both"], smoke)]
    lines += ["", "| provider | forward, ms | forward + backward, ms | ratio to eager | of the floor | peak, MiB | error, max"
              " | error, RMS |", "| --- | --: | --: | --: | --: | --: | --: | --: |"]  # fmt: skip
    cells = measured(row)
    eager = cells.get("eager")
    for name, cell in cells.items():
        both = cell["both_ms"]["p50"]
        ratio = f"{eager['both_ms']['p50'] / both:.2f}" if eager else "-"
        share = "-" if floors["both"] is None else f"{floors['both'] / both:.0%}"
        peak = "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / MIB:,.0f}"
        lines.append(f"| {titles[name]} | {_ms(cell['forward_ms']['p50'])} | {_ms(both)} | {ratio} | {share} | {peak} |"
                     f" {_error(cell)} |")  # fmt: skip
    lines.append("")
    rest = {name: cell for name, cell in row["providers"].items() if "skipped" in cell}
    lines += [f"- {titles[n]}: not measured: {cell['skipped']}" for n, cell in rest.items() if not cell.get("absent")]
    absent = [titles[n] for n, cell in rest.items() if cell.get("absent")]
    if absent:
        lines.append(f"- No kernel for this: {'; '.join(absent)}.")
    partly = {cell["errors_of"] for cell in cells.values() if cell["errors"]} - {"all rows"}
    lines += [f"- Errors are those of {what}." for what in sorted(partly)]
    return [*lines, ""]


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _error(cell: dict[str, Any]) -> str:
    found = worst(cell)
    if found is None:
        return f"{cell['errors_of']} | "
    largest, mean, most, rms = found
    shown = ["not finite" if v is None else f"{v:.1e}" for v in (most, rms)]
    return f"{shown[0]} ({largest}) | {shown[1]} ({mean})"


def _target(row: dict[str, Any], floor: float | None, smoke: bool) -> str:
    """The target beside what ours does; in a smoke run there is nothing to compare."""
    target, ours = row["target"], measured(row).get("ours")
    verdicts: list[tuple[str, str, bool]] = []
    if ours is not None:
        both, peak = ours["both_ms"]["p50"], ours["peak_bytes"]
        if target["milliseconds"] is not None:
            limit = target["milliseconds"]
            verdicts.append((f"at most {limit:g} ms", f"{both:.2f} ms", both <= limit))
        if target["gigabytes"] is not None and peak is not None:
            limit = target["gigabytes"]
            verdicts.append((f"at most {limit:g} GB", f"{peak / GB:.2f} GB", peak / GB <= limit))
        if target["of_floor"] is not None and floor is not None:
            limit = target["of_floor"]
            verdicts.append((f"at least {limit:.0%} of the floor", f"{floor / both:.0%}", floor / both >= limit))
    if smoke or not verdicts:
        wanted = [f"{k.replace('_', ' ')} {v:.3g}" for k, v in target.items() if v is not None]
        return f"Target: {', '.join(wanted)}; not measured."
    return "Target: " + "; ".join(f"{rule}: {got}, {'met' if met else 'MISSED'}" for rule, got, met in verdicts) + "."


def plot(rows: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    """Forward + backward of each provider, a panel for each shape; the dark part of a bar is forward."""
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    bars = max(len(measured(row)) for row in rows)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.6 * columns, (0.34 * bars + 1.5) * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        _panel(axis, row, record["titles"])
    for axis in list(axes.flat)[len(rows) :]:
        axis.axis("off")
    where = ", ".join(record["machine"]["gpus"]) or "CPU"
    note = "smoke run, not a measurement" if record["smoke"] else f"{where}, {record['dtype']}, {record['date']}"
    figure.suptitle(f"{rows[0]['kernel']} ({note})", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, row: dict[str, Any], titles: dict[str, str]) -> None:
    cells = measured(row)
    names = sorted(cells, key=lambda n: -cells[n]["both_ms"]["p50"])
    both = [cells[n]["both_ms"]["p50"] for n in names]
    forward = [min(cells[n]["forward_ms"]["p50"], b) for n, b in zip(names, both, strict=True)]
    colours = [COLOURS.get(n, OTHER) for n in names]
    axis.barh(range(len(names)), both, color=colours, alpha=0.55)
    axis.barh(range(len(names)), forward, color=colours)
    for place, value in enumerate(both):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the floor's line may pass beneath
        axis.annotate(_ms(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
    floor = floor_ms(row, "both")
    if floor is not None:
        axis.axvline(floor, color=FLOOR_COLOUR, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(names)), [titles[n] for n in names], fontsize=8)
    axis.set_xlim(0, 1.18 * max([*both, floor or 0.0]))
    dashed = "" if floor is None else f"; dashed: the floor, {_ms(floor)}"
    axis.set_xlabel(f"forward (dark) + backward, ms{dashed}", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title("\n".join(_wrapped(title(row).partition(": ")[2], 62)), fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(text: str, width: int) -> Iterable[str]:
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line
