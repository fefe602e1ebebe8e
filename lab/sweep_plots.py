"""The pictures of a sweep: all trials as lines through their parameters, and a plot of each one."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import LogLocator, MaxNLocator

from lab.core.plots import TRAIN_COLOR, VAL_COLOR, save_figure
from lab.sweep_records import NOISE, Record, picture
from lab.sweep_space import Parameter, show

GREY = "#b0b0b0"  # of pruned trials


def draw_sweep(folder: Path, record: Record, space: list[Parameter]) -> Path:
    """Draws parallel.png and <parameter>.png into the folder, from sweep.json's content.

    Returns: the path of parallel.png.
    """
    for parameter in space:
        draw_parameter(folder / picture(parameter.name), parameter, record)
    path = folder / "parallel.png"
    draw_parallel(path, space, record)
    return path


def draw_parallel(path: Path, space: list[Parameter], record: Record) -> None:
    """One axis a parameter and one for the accuracy, one line a trial, coloured by accuracy."""
    done, pruned = by_state(record)
    accuracy = np.array([100 * t["val_accuracy"] for t in done])
    every = [100 * t["val_accuracy"] for t in done + pruned]
    low, high = min(every), max(every)
    last = Parameter("validation\naccuracy (%)", low=low, high=max(high, low + 0.1))
    floor = outlier_limit(accuracy)
    norm, colours = Normalize(floor, max(accuracy.max(), floor + 0.1)), plt.get_cmap("viridis_r")
    figure, axis = plt.subplots(figsize=(3.6 + 2 * len(space), 5), layout="constrained")
    for t in [*pruned, *sorted(done, key=lambda t: t["val_accuracy"])]:  # the best on top
        value = 100 * t["val_accuracy"]
        heights = [*(place(p, t["params"][p.name]) for p in space), place(last, value)]
        finished, width = t["state"] == "complete", 3.2 if t["number"] == record["best"] else 1.5
        axis.plot(
            heights, lw=width if finished else 0.7, zorder=3 if finished else 2,
            color=colours(norm(value)) if finished else GREY,
        )  # fmt: skip
    for at, parameter in enumerate([*space, last]):
        draw_axis(axis, at, parameter)
    names = [p.name.lower() + ("\n(logarithmic)" if p.log else "") for p in [*space, last]]
    axis.set_xticks(range(len(names)), names)
    axis.set(yticks=[], ylim=(-0.04, 1.04), xlim=(-0.25, len(space) + 0.35))
    axis.spines[:].set_visible(False)
    axis.tick_params(axis="x", length=0, pad=8)
    bar = plt.cm.ScalarMappable(norm, colours)
    figure.colorbar(bar, ax=axis, label="validation accuracy (%)", pad=0.02,
                    extend="min" if floor > accuracy.min() else "neither")  # fmt: skip
    title = f"{len(done)} finished trials, the best as a thick line"
    figure.suptitle(title + (f"; {len(pruned)} pruned, in grey" if pruned else ""))
    save_figure(figure, path)


def draw_parameter(path: Path, parameter: Parameter, record: Record) -> None:
    """Validation accuracy against one parameter, with the interval of the best."""
    done, pruned = by_state(record)
    figure, axis = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    low, high = (100 * share for share in record["val_accuracy_95"])
    axis.axhspan(low, high, color=VAL_COLOR, alpha=0.1, lw=0, label="95 % interval of the best")
    for trials, style in (
        (pruned, {"color": GREY, "marker": "x", "label": "pruned, best until then"}),
        (done, {"color": VAL_COLOR, "marker": "o", "alpha": 0.8, "label": "finished"}),
        ([t for t in done if t["number"] == record["best"]],
         {"color": TRAIN_COLOR, "marker": "*", "s": 160, "label": "chosen"}),
    ):  # fmt: skip
        if trials:
            values = [t["params"][parameter.name] for t in trials]
            if parameter.choices:  # side by side, where many trials share a value
                shift = [((t["number"] * 0.618) % 1 - 0.5) * 0.3 for t in trials]
                places = [parameter.choices.index(v) for v in values]
                values = [p + s for p, s in zip(places, shift, strict=True)]
            axis.scatter(values, [100 * t["val_accuracy"] for t in trials], **style)
    if parameter.choices:
        names = list(map(show, parameter.choices))
        slanted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(names)), names, **slanted if max(map(len, names)) > 8 else {})
        axis.set_xlim(-0.5, len(names) - 0.5)
    else:
        axis.set_xscale("log" if parameter.log else "linear")
        axis.set_xticks(ticks(parameter), [f"{v:.4g}" for v in ticks(parameter)])
        axis.minorticks_off()
    share = record["importance"].get(parameter.name)
    believed = share is not None and record["predicted"] >= NOISE
    told = f": {100 * share:.0f} % of the variance (fANOVA)" if believed else ""
    axis.set(xlabel=parameter.name.lower(), ylabel="validation accuracy (%)",
             title=f"{parameter.name.lower()}{told}")  # fmt: skip
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def by_state(record: Record) -> tuple[list[Record], list[Record]]:
    """Finished trials, and pruned ones that finished an epoch."""
    trials = [t for t in record["trials"] if t["val_accuracy"] is not None]
    return tuple([t for t in trials if t["state"] == s] for s in ("complete", "pruned"))


def outlier_limit(values: np.ndarray) -> float:
    """Where colours begin: at the lowest value that is no outlier by Tukey's rule."""
    first, third = np.percentile(values, [25, 75])
    return values[values >= first - 1.5 * (third - first)].min()


def place(parameter: Parameter, value: Any) -> float:
    """How high a value lies on its axis, from 0 to 1."""
    if parameter.choices:
        return parameter.choices.index(value) / (len(parameter.choices) - 1)
    scale = np.log if parameter.log else float
    low, high = scale(parameter.low), scale(parameter.high)
    return float((scale(value) - low) / (high - low))


def ticks(parameter: Parameter) -> list[Any]:
    """The values that an axis names: all choices, or round numbers and the ends of a range."""
    if parameter.choices:
        return list(parameter.choices)
    low, high = parameter.low, parameter.high
    subs = (1, 2, 5) if high <= 100 * low else (1,)
    locator = LogLocator(subs=subs) if parameter.log else MaxNLocator(6, integer=whole(low))
    round_ones = [float(f"{v:.6g}") for v in locator.tick_values(low, high)]
    inner = [v for v in round_ones if 0.04 < place(parameter, v) < 0.96 and low < v < high]
    return [low, *(int(v) if whole(low) else v for v in inner), high]


def whole(value: Any) -> bool:
    return isinstance(value, int)


def draw_axis(axis: plt.Axes, at: int, parameter: Parameter) -> None:
    """A vertical axis with its marks, at an x."""
    axis.plot([at, at], [0, 1], color="black", lw=1, zorder=4)
    for value in ticks(parameter):
        height = place(parameter, value)
        text = f"{value:.4g}" if isinstance(value, float) else show(value)
        axis.plot([at - 0.02, at + 0.02], [height] * 2, color="black", lw=1, zorder=4)
        axis.annotate(text, (at, height), (5, 0), textcoords="offset points", va="center",
                      fontsize=9, zorder=5,
                      bbox={"color": "white", "alpha": 0.7, "pad": 0.8, "lw": 0})  # fmt: skip
