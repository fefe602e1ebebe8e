"""Growth in numbers and in a picture: exponents, the table, the panels; see growth.py."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.table import in_markdown
from lab.core import plots

COLOURS = (
    plots.VAL_COLOR,
    plots.TRAIN_COLOR,
    "#2a7f3f",
    "#7a3f98",
    "#8a6d1a",
    "#4a4a4a",
    "#b02a5b",
)


@dataclass
class Growth:
    """One cost, measured over the values of one quantity, beside what was expected."""

    quantity: str  # such as "depth (blocks)"
    what: str  # such as "a training step"
    unit: str  # of the cost
    values: list[int]
    measured: list[list[float]]  # for each value, one figure a repeat
    expected: list[float]  # proportional to the cost, or absolute
    slope: float  # of the plain order: 1 is linear
    absolute: bool = False  # `expected` is in `unit`: it is not scaled to what was measured
    part: str = ""  # of the work, where several stages share a panel

    @property
    def medians(self) -> list[float]:
        return [median(figures) for figures in self.measured]

    @property
    def line(self) -> list[float]:
        """What was expected, through the last point where it is only an order."""
        scale = 1 if self.absolute else self.medians[-1] / self.expected[-1]
        return [scale * value for value in self.expected]

    def summary(self) -> dict:
        """Everything for the record, exponents included."""
        last = slice(-2, None)
        return {
            **vars(self),
            "medians": self.medians,
            "exponent": exponent(self.values, self.medians),
            "expected_exponent": exponent(self.values, self.expected),
            "least_exponent": exponent(self.values, [min(m) for m in self.measured]),
            "last_exponent": exponent(self.values[last], self.medians[last]),
            "expected_last_exponent": exponent(self.values[last], self.expected[last]),
        }


def exponent(values: list[float], costs: list[float]) -> float | None:
    """The slope of log cost against log value by least squares; None with fewer than two points.

    A cost of 0 or less, such as memory too little to be told from none, has no logarithm and is
    left out.
    """
    kept = [(v, c) for v, c in zip(values, costs, strict=True) if c > 0]
    if len({v for v, _ in kept}) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(kept, dtype=float)).T, 1)[0])


def table(growths: list[Growth]) -> list[str]:
    """The lines of a Markdown table."""

    def told(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    cells = []
    for growth in growths:
        s, figures = growth.summary(), growth.medians
        cells.append([
            growth.quantity, f"{growth.part or growth.what}: {growth.unit}",
            f"{growth.values[0]:,} to {growth.values[-1]:,}",
            f"{figures[0]:.3g} to {figures[-1]:,.4g}",
            f"**{told(s['exponent'])}** ({told(s['expected_exponent'])})",
            told(s["least_exponent"]),
            f"{told(s['last_exponent'])} ({told(s['expected_last_exponent'])})",
        ])  # fmt: skip
    heads = ["quantity", "cost", "values", "measured, first to last",
             "exponent of the medians (expected)", "of the least",
             "of the last two (expected)"]  # fmt: skip
    return in_markdown(heads, cells)


def plot(path: Path, growths: list[Growth], title: str) -> None:
    """Panels by quantity and cost: points with their range, the expected line, the plain order."""
    panels: dict[tuple[str, str], list[Growth]] = {}
    for growth in growths:
        panels.setdefault((growth.quantity, growth.unit), []).append(growth)
    columns = 4 if len(panels) > 2 else len(panels)
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.9 * rows + 0.8)
    with plt.rc_context({"font.size": 12}):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        free = list(axes.flat[len(panels) :])
        for axis in free:
            axis.axis("off")
        for axis, ((quantity, unit), inside) in zip(axes.flat, panels.items(), strict=False):
            panel(axis, inside)
            if len(inside) > 2 and free:  # too long a legend for its panel
                handles, labels = axis.get_legend_handles_labels()
                axis.get_legend().remove()
                free.pop(0).legend(handles, labels, title=quantity, loc="center", fontsize=11)
            axis.set(xlabel=quantity, ylabel=f"{inside[0].what},\n{unit}")
        figure.suptitle(title, fontsize=14)
        plots.save_figure(figure, path, dpi=90)


def panel(axis: plt.Axes, inside: list[Growth]) -> None:
    alone = len(inside) == 1
    for growth, colour in zip(inside, COLOURS, strict=False):
        middle = np.array(growth.medians)
        ends = np.array([[min(f), max(f)] for f in growth.measured]).T
        shown = middle > 0
        x = np.array(growth.values)[shown]
        bars = np.abs(ends - middle)[:, shown]
        label = growth.part or "measured"
        slope = growth.summary()["exponent"]
        label += "" if slope is None else f": {slope:.2f}"
        axis.errorbar(x, middle[shown], bars, color=colour, marker="o", ms=5, lw=1.2 - alone,
                      elinewidth=1.2, capsize=3, label=label)  # fmt: skip
        if alone:
            want = growth.summary()["expected_exponent"]
            told = f"expected: {want:.2f}" if want is not None else "expected"
            axis.plot(
                growth.values, growth.line, color=plots.TRAIN_COLOR, ls="--", lw=1.6, label=told
            )
    first = inside[0]
    x, top = np.array(first.values, dtype=float), max(1e-9, *(g.medians[-1] for g in inside))
    plain = top * (x / x[-1]) ** first.slope
    axis.plot(x, plain, color="gray", ls=":", lw=1.4, label=f"slope {first.slope:g}")
    axis.set(xscale="log", yscale="log")
    lowest = min([m for g in inside for m in g.medians if m > 0], default=1)
    axis.set_ylim(bottom=max(lowest / 3, axis.get_ylim()[0]), top=max(top, lowest) * 2.5)
    axis.set_xticks(first.values, [short(v) for v in first.values])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9 if len(inside) > 2 else 10, loc="upper left" if alone else "best")


def short(value: int) -> str:
    """1000 as 1k, 1000000 as 1M."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if value >= size and value % size == 0:
            return f"{value // size}{letter}"
    return str(value)
