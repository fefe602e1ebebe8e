"""Exponents of growth: the table and the figure of growth.py."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.table import to_markdown
from lab.core import plots


@dataclass
class Growth:
    """One cost, measured for the values of one quantity, and the expected cost."""

    quantity: str  # such as "depth (blocks)"
    what: str  # such as "a step", or a stage
    unit: str
    values: list[int]
    measured: list[list[float]]  # the repeats of each value
    expected: list[float]  # proportional to the expected cost
    order: float  # the exponent for large values: 1 is linear

    @property
    def medians(self) -> list[float]:
        return [median(repeats) for repeats in self.measured]

    def summary(self) -> dict:
        """Everything for the record, including the exponents."""
        return {
            **vars(self),
            "medians": self.medians,
            "exponent": exponent(self.values, self.medians),
            "expected_exponent": exponent(self.values, self.expected),
            "lowest_exponent": exponent(self.values, [min(m) for m in self.measured]),
        }


def exponent(values: list[float], costs: list[float]) -> float | None:
    """The slope of log cost against log value by least squares; None with fewer than two points.

    Costs that are not positive, such as memory below the resolution, are left out.
    """
    kept = [(v, c) for v, c in zip(values, costs, strict=True) if c > 0]
    if len({v for v, _ in kept}) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(kept, dtype=float)).T, 1)[0])


def growth_table(growths: list[Growth]) -> list[str]:
    """The lines of a Markdown table."""
    cells = []
    for growth in growths:
        s, medians = growth.summary(), growth.medians
        names = ("exponent", "expected_exponent", "lowest_exponent")
        fitted, wanted, lowest = ("-" if s[n] is None else f"{s[n]:.2f}" for n in names)
        cells.append([
            growth.quantity, f"{growth.what}: {growth.unit}",
            f"{growth.values[0]:,} to {growth.values[-1]:,}",
            f"{medians[0]:.3g} to {medians[-1]:,.4g}", f"**{fitted}** ({wanted})", lowest,
        ])  # fmt: skip
    heads = ["quantity", "cost", "values", "measured, first to last",
             "exponent of the medians (expected)", "of the lowest"]  # fmt: skip
    return to_markdown(heads, cells)


def plot(path: Path, growths: list[Growth], title: str) -> None:
    """One panel per quantity and unit."""
    panels: dict[tuple[str, str], list[Growth]] = {}
    for growth in growths:
        panels.setdefault((growth.quantity, growth.unit), []).append(growth)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.9 * rows + 0.8)
    with plt.rc_context({"font.size": 12}):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, found in zip(axes.flat, panels.values(), strict=False):
            _draw_panel(axis, found)
        figure.suptitle(title, fontsize=14)
        plots.save_figure(figure, path, dpi=90)


def _draw_panel(axis: plt.Axes, growths: list[Growth]) -> None:
    """Medians with their range; the expected cost, if there is one curve; the order as a line."""
    for growth in growths:
        middle = np.array(growth.medians)
        ends = np.array([[min(m), max(m)] for m in growth.measured]).T
        shown = middle > 0
        slope = growth.summary()["exponent"]
        label = growth.what if len(growths) > 1 else "measured"
        axis.errorbar(
            np.array(growth.values)[shown], middle[shown], np.abs(ends - middle)[:, shown],
            marker="o", ms=5, lw=1, capsize=3,
            label=label if slope is None else f"{label}: {slope:.2f}",
        )  # fmt: skip
    first = growths[0]
    if len(growths) == 1:
        scale = first.medians[-1] / first.expected[-1]
        axis.plot(first.values, [scale * e for e in first.expected], "--", label="expected")
    top = max(1e-9, *(growth.medians[-1] for growth in growths))
    x = np.array(first.values, dtype=float)
    line = top * (x / x[-1]) ** first.order
    axis.plot(x, line, ":", color="gray", label=f"slope {first.order:g}")
    axis.set(xscale="log", yscale="log", xlabel=first.quantity)
    axis.set_ylabel(f"{first.what if len(growths) == 1 else 'a stage'},\n{first.unit}")
    axis.set_xticks(first.values)
    axis.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    many = len(growths) > 2
    axis.legend(fontsize=7 if many else 10, loc="lower right" if many else "upper left")
