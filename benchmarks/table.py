"""Records of measurements and the tables made from them.

Every ratio is above 1 if this project is better. It is the median of the ratios of single repeats,
not the ratio of two medians: whatever else the machine did in a repeat slowed both sides of it.
"""

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.timing import Times
from lab.core import UserError, checkpoints, constants, machine, runtime

OURS = "ours"
LIBRARIES = ("timm", "transformers", "torchvision", "vit-pytorch")  # names of packages


@dataclass(frozen=True)
class Row:
    """This project compared with another library on one workload."""

    workload: str
    library: str
    unit: str  # images/s, or s, of which fewer are better
    ours: float  # median
    theirs: float
    ratio: float  # median; above 1: this project is better
    lowest: float  # over the repeats
    highest: float
    ours_mb: int | None = None  # peak memory, if it was measured
    theirs_mb: int | None = None


@dataclass(frozen=True)
class Utilization:
    """The fraction of the matrix-product rate that a workload reaches."""

    workload: str
    library: str
    fraction: float  # median of the fractions of single repeats
    lowest: float
    highest: float
    product_rate: float  # FLOP/s of the matrix product


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Other seconds divided by one's, repeat by repeat: median, lowest and highest."""
    found = [b / a for a, b in zip(one, other, strict=True)]
    return median(found), min(found), max(found)


def compare(
    workload: str,
    times: Times,
    ours: str,
    libraries: list[str],
    images: float = 0,
    memory: dict[str, int] | None = None,
) -> list[Row]:
    """A row for each library that was measured in alternation with `ours`.

    Args:
        images: number of images in a measurement, to report images/s; 0 reports seconds.
        memory: peak memory in MB, by name.
    """
    memory = memory or {}
    values = {n: images / median(t) if images else median(t) for n, t in times.items()}
    return [
        Row(workload, name, "images/s" if images else "s", values[ours], values[name],
            *ratios(times[ours], times[name]), memory.get(ours), memory.get(name))
        for name in libraries if name != ours and name in times and ours in times
    ]  # fmt: skip


def utilization(
    workload: str, times: Times, product: str, flop: float, product_flop: float
) -> list[Utilization]:
    """What each library reached of the rate of the matrix product measured in the same repeats.

    Args:
        flop: operations of the workload in one measurement.
        product_flop: operations of the matrix products in one measurement.
    """
    rate = product_flop / median(times[product])
    return [
        Utilization(
            workload, name, *(flop / product_flop * r for r in ratios(own, times[product])), rate
        )
        for name, own in times.items() if name != product
    ]  # fmt: skip


def installed_libraries(
    names: list[str], known: Iterable[str] = (OURS, *LIBRARIES)
) -> tuple[list[str], list[str]]:
    """Splits names into those that can be measured and a note for each missing library.

    Raises: UserError, for a name that is not in `known`.
    """
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{unknown[0]!r} is none of {', '.join(known)}")
    missing = [name for name in names if name in LIBRARIES and not _version(name)]
    notes = [f"{name} is not installed and was skipped." for name in missing]
    return [name for name in names if name not in missing], notes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_hardware(device: str) -> str:
    """The GPU's name, or the CPU's with its instruction set and the number of threads."""
    found = machine.hardware()
    if device == "cuda":
        return found["gpu"]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{found['cpu']}, {capability}, threads: {found['threads']}"


def provenance() -> dict[str, Any]:
    """Command, time, commit, hardware and versions, including those of the other libraries."""
    found = runtime.provenance()
    found["versions"] |= {name: _version(name) for name in LIBRARIES}
    module = f"benchmarks.{constants.running.files[0].stem}".removesuffix(".__main__")
    return {**found, "command": shlex.join(["python", "-m", module, *sys.argv[1:]])}


def save(
    out: str,
    title: str,
    rows: list[Row] | None = None,
    fractions: list[Utilization] | None = None,
    notes: list[str] | None = None,
) -> None:
    """Prints a benchmark's table, and writes it and its record.

    Args:
        out: path of the table, ending in .md, in which {device} is filled in; the record is written
            next to it as .json. Empty: neither is written.
        title: what was measured and how.
        notes: sentences below the tables.
    """
    device = runtime.process_state().device.type
    record = {
        "title": title, **provenance(), "device": describe_hardware(device), "notes": notes or [],
        "rows": [asdict(row) for row in rows or []],
        "utilization": [asdict(fraction) for fraction in fractions or []],
    }  # fmt: skip
    text = render([record])
    print(text)
    if out:
        write(Path(out.format(device=device)), text, record)


def write(path: Path, text: str, record: dict[str, Any]) -> None:
    """Writes a table as Markdown and its record next to it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    checkpoints.write_json(path.with_suffix(".json"), record)


def render(records: list[dict[str, Any]], failures: Sequence[str] = ()) -> str:
    """The tables of one or more benchmarks in Markdown.

    Args:
        records: as `save` writes them, from the same machine.
        failures: a sentence for each benchmark that failed.
    """
    lines = []
    if records:
        first = records[0]
        versions = [f"{name} {v}" for name, v in first["versions"].items() if v]
        changes = " with uncommitted changes" if first["uncommitted_changes"] else ""
        lines += [
            f"{first['device']}.  ", f"Python {first['python']}, {', '.join(versions)}.  ",
            f"Commit {first['commit']}{changes}, {first['started']}.",
        ]  # fmt: skip
    rows = [Row(**row) for record in records for row in record["rows"]]
    if rows:
        lines += ["", "A ratio is the median over the repeats, with its range. Above 1, this "
                  "project is faster.", "", *_comparison_table(rows)]  # fmt: skip
    fractions = [Utilization(**row) for record in records for row in record["utilization"]]
    if fractions:
        lines += ["", "The fraction of the rate of a square matrix product, measured in alternation"
                  " with the libraries; torch counts the operations.", "",
                  *_utilization_table(fractions)]  # fmt: skip
    for record in records:
        lines += ["", f"{record['title']}  ", f"`{record['command']}`"]
        lines += ["", *(f"- {note}" for note in record["notes"])] if record["notes"] else []
    return "\n".join([*lines, *([""] if failures else []), *(f"- **{f}**" for f in failures)])


def to_markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _comparison_table(rows: list[Row]) -> list[str]:
    """One line per row; the fastest of several libraries on the same workload is marked."""
    rivals = defaultdict(list)
    for row in rows:
        rivals[row.workload].append(row)
    cells = []
    for row in rows:
        others = rivals[row.workload]
        best = max(others, key=lambda r: r.theirs if r.unit == "images/s" else -r.theirs)
        mark = " (fastest)" if len(others) > 1 and row is best else ""
        memory = [f"{mb:,}" if mb else "-" for mb in (row.ours_mb, row.theirs_mb)]
        values = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (row.ours, row.theirs)]
        cells.append([
            row.workload, row.library + mark, *(f"{value} {row.unit}" for value in values),
            f"**{row.ratio:.2f}** ({row.lowest:.2f} to {row.highest:.2f})", " / ".join(memory),
        ])  # fmt: skip
    heads = ["workload", "library", "ours", "theirs", "ratio (range)", "peak MB, ours / theirs"]
    return to_markdown(heads, cells)


def _utilization_table(fractions: list[Utilization]) -> list[str]:
    """One line per workload, one column per library."""
    names = list(dict.fromkeys(fraction.library for fraction in fractions))
    workloads: dict[str, dict[str, Utilization]] = defaultdict(dict)
    for f in fractions:
        workloads[f.workload][f.library] = f
    cells = []
    for workload, found in workloads.items():
        rate = next(iter(found.values())).product_rate
        cells.append([workload, f"{rate / 1e12:,.3g} TFLOP/s"])
        for name in names:
            f = found.get(name)
            shown = f"{f.fraction:.0%} ({f.lowest:.0%} to {f.highest:.0%})" if f else "-"
            cells[-1].append(shown)
    return to_markdown(["workload", "matrix product", *names], cells)
