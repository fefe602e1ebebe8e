"""Rows made from the times of turns, a part's record of them, and the one table of all records.

Every ratio is above 1 where ours is better. It is the median of the ratios turn by turn, not the
ratio of two medians: whatever else the machine did in a turn met both sides of it.
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from lab.core import checkpoints, runtime

OURS = "ours"
PEERS = ("timm", "transformers", "torchvision", "vit-pytorch")  # names of packages


@dataclass(frozen=True)
class Row:
    """Ours beside one peer in one kind of work."""

    what: str
    peer: str
    unit: str  # of the figures; seconds count as better the fewer they are
    ours: float  # median
    theirs: float
    ratio: float  # above 1: ours is better
    low: float  # the worst turn's
    high: float
    ours_mb: int | None = None  # peak memory, where it was measured
    theirs_mb: int | None = None


@dataclass(frozen=True)
class Share:
    """How much of the matrix product's rate a work reached (model FLOP utilisation)."""

    what: str
    name: str
    share: float  # median of the shares turn by turn; 1: all of it
    low: float
    high: float
    product: float  # the product's own rate, FLOP/s


Times = dict[str, list[float]]  # seconds of everybody's turns


def ratios(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """How many times as fast as `other` `one` is, turn by turn: median, least, most."""
    found = [o / s for s, o in zip(one, other, strict=True)]
    return median(found), min(found), max(found)


def compared(
    what: str,
    times: Times,
    ours: str,
    peers: list[str],
    images: float = 0,
    memory: dict[str, int] | None = None,
) -> list[Row]:
    """A row for each peer that took turns with `ours`.

    images: of a turn, for figures in images/s; 0 gives seconds.
    memory: peak of each, in MB.
    """
    unit, held = "images/s" if images else "s", memory or {}

    def figure(name: str) -> float:
        return images / median(times[name]) if images else median(times[name])

    return [
        Row(
            what, peer, unit, figure(ours), figure(peer), *ratios(times[ours], times[peer]),
            held.get(ours), held.get(peer),
        )
        for peer in peers if peer != ours and peer in times and ours in times
    ]  # fmt: skip


def shares(what: str, times: Times, product: str, flop: float, product_flop: float) -> list[Share]:
    """What everybody reached of the rate of `product`, which took its turn too.

    flop, product_flop: operations of a turn of everybody's, and of the product's.
    """
    rate = product_flop / median(times[product])
    return [
        Share(what, name, *(flop / product_flop * r for r in ratios(own, times[product])), rate)
        for name, own in times.items()
        if name != product
    ]


def present(asked: list[str], own: tuple[str, ...] = (OURS,)) -> tuple[list[str], list[str]]:
    """Those of a list that can take part: `own` names, and peers that are installed.

    Returns: their names, and a remark for each peer that is not installed.
    Raises: SystemExit, for a name that is nobody's.
    """
    for name in asked:
        if name not in (*own, *PEERS):
            raise SystemExit(f"{name!r} is none of {', '.join((*own, *PEERS))}")
    missing = [name for name in asked if name not in own and not installed(name)]
    remarks = [f"{name} is not installed: skipped." for name in missing]
    return [name for name in asked if name not in missing], remarks


def installed(package: str) -> str | None:
    """The version of a package; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(names: list[str]) -> str:
    """torch's version, and those of the peers among the names, in words."""
    return ", ".join(f"{n} {installed(n)}" for n in ("torch", *names) if n in ("torch", *PEERS))


def command(part: str) -> str:
    """How this was called; `part` is empty for all of them."""
    module = f"benchmarks.{part}" if part else "benchmarks"
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def keep(
    part: str,
    lines: list[str],
    path: str,
    rows: list[Row],
    notes: list[str],
    shares: list[Share] | None = None,
    limits: list[str] | None = None,
) -> None:
    """Prints a part's table, and writes it to `path` and its record beside it, as JSON.

    Args:
        part: the module's name.
        lines: of the table in full, in Markdown.
        path: ends in .md; empty: nothing is written.
        rows, shares: for the table of all parts.
        notes: sentences that belong to it.
        limits: what the machine can do, in words, for the head of that table.
    """
    print("\n".join(lines))
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "part": part, **whence(part), "limits": limits or [], "notes": notes,
        "rows": [asdict(row) for row in rows], "shares": [asdict(s) for s in shares or []],
    }  # fmt: skip
    checkpoints.write_json(Path(path).with_suffix(".json"), record)


def whence(part: str) -> dict[str, Any]:
    """Command, time, commit, hardware and versions, the peers' too."""
    found = runtime.provenance()
    found["versions"] |= {name: installed(name) for name in PEERS}
    return {**found, "command": command(part)}


def in_markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def number(value: float) -> str:
    """Three digits that count, or all of them in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def row_lines(rows: list[Row]) -> list[str]:
    """A table of rows; the fastest of several peers in the same work is marked."""
    peers: dict[str, list[float]] = {}
    for row in rows:
        peers.setdefault(row.what, []).append(row.theirs)
    cells = []
    for row in rows:
        others = peers[row.what]
        best = max(others) if row.unit == "images/s" else min(others)
        mark = " (the fastest)" if len(others) > 1 and row.theirs == best else ""
        held = [f"{mb:,}" if mb else "-" for mb in (row.ours_mb, row.theirs_mb)]
        cells.append([
            row.what, row.peer + mark, *(f"{number(v)} {row.unit}" for v in (row.ours, row.theirs)),
            f"**{row.ratio:.2f}** ({row.low:.2f} to {row.high:.2f})", " / ".join(held),
        ])  # fmt: skip
    heads = ["work", "peer", "ours", "the peer", "ratio (range)", "peak MB, ours / the peer"]
    return in_markdown(heads, cells)


def share_lines(shares: list[Share]) -> list[str]:
    """A row for each work, a column for each library."""
    names = list(dict.fromkeys(s.name for s in shares))
    found: dict[str, dict[str, Share]] = {}
    for share in shares:
        found.setdefault(share.what, {})[share.name] = share
    cells = []
    for what, by_name in found.items():
        rate = next(iter(by_name.values())).product
        cells.append([what, f"{rate / 1e12:,.3g} TFLOP/s"])
        for name in names:
            s = by_name.get(name)
            cells[-1].append(f"{s.share:.0%} ({s.low:.0%} to {s.high:.0%})" if s else "-")
    return in_markdown(["work", "the matrix product's rate", *names], cells)


def whole(records: list[dict[str, Any]], failed: list[str], machine: str) -> list[str]:
    """The table of all parts in Markdown.

    Args:
        records: of the parts, as `keep` writes them.
        failed: a sentence for each part that failed.
        machine: the processor in words.
    """
    rows = [Row(**row) for record in records for row in record["rows"]]
    parts = [Share(**share) for record in records for share in record["shares"]]
    lines = ["# Speed beside the field", "", f"{machine}.  "]
    if records:
        first = records[0]
        had = [f"{name} {at}" for name, at in first["versions"].items() if at]
        changed = ", with changes" if first["uncommitted_changes"] else ""
        lines.append(f"Python {first['python']}, {', '.join(had)}.  ")
        lines.append(f"Commit {first['commit']}{changed}, {first['started']}.  ")
    lines += [f"`{command('')}`", "", *(f"- {x}" for r in records for x in r["limits"])]
    if rows:
        lines += [
            "", "A ratio above 1 means that ours is better: the median over the repeats, in which "
            "both took turns, of the ratios turn by turn (and their range).", "", *row_lines(rows),
        ]  # fmt: skip
    if parts:
        lines += [
            "", "What the work reached of the rate of a product of square matrices of its dtype, "
            "which took its turn between the libraries; operations counted by torch.", "",
            *share_lines(parts),
        ]  # fmt: skip
    for record in records:
        lines += ["", f"`{record['command']}`", *(f"- {note}" for note in record["notes"])]
    return [*lines, *([""] if failed else []), *(f"- **{sentence}**" for sentence in failed)]
