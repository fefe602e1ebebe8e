"""Pictures of where a model looks: maps over images, every head, distances, positions."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from lab.core import plots

MAP = "inferno"
JUDGED = {True: ("#1a7431", ", right"), False: ("#b3261e", ", wrong"), None: ("black", "")}


@dataclass(frozen=True)
class AttentionExample:
    """One image, what the model said of it, and its maps."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    name: str
    label: str | None
    prediction: str | None
    confidence: float
    correct: bool | None  # None: the label is not known, or not to the model
    raw: list[np.ndarray]  # for each block (heads, rows, columns)
    maps: dict[str, np.ndarray]  # by method, (rows, columns)

    @property
    def title(self) -> str:
        """Label, prediction and confidence, as far as they are known."""
        said = f"{self.prediction} ({100 * self.confidence:.0f}\N{NO-BREAK SPACE}%)"
        if self.prediction is None:
            return self.label or self.name
        return f"{self.label or self.name}: predicted {said}"


def cover(
    axis: plt.Axes, looked: AttentionExample, values: np.ndarray, strength: float = 0.65
) -> None:
    """A map over its image, at the image's size, on a scale of its own.

    The largest hundredth of the values is as bright as it gets: single patches that draw most of
    the attention would leave the rest black (Darcet et al. 2024 describe them).
    """
    side = looked.pixels.shape[0]
    axis.imshow(looked.pixels, extent=(0, side, side, 0), interpolation="nearest")
    axis.imshow(values, extent=(0, side, side, 0), cmap=MAP, alpha=strength,
                vmin=0, vmax=np.quantile(values, 0.99) or 1,
                interpolation="bilinear" if side > 64 else "nearest")  # fmt: skip
    axis.set(xlim=(0, side), ylim=(side, 0))


def overview(path: Path, images: list[AttentionExample], title: str) -> None:
    """A row for each image: the image, then the map of each method over it."""
    methods = list(images[0].maps)
    rows, columns = len(images), 1 + len(methods)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(2.9 * columns, 2.95 * rows + 1.1))  # fmt: skip
    for row, looked in zip(axes, images, strict=True):
        side = looked.pixels.shape[0]
        row[0].imshow(looked.pixels, extent=(0, side, side, 0), interpolation="nearest")
        colour, word = JUDGED[looked.correct]
        row[0].set_title(wrapped(looked.title + word), fontsize=9, color=colour)
        for axis, name in zip(row[1:], methods, strict=True):
            cover(axis, looked, looked.maps[name])
            axis.set_title(name, fontsize=9)
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(wrapped(title, 36 * columns))
    note = ("Bright: much attention, or much weight for the class. Each map has a scale of its "
            "own, from zero to its 99 % quantile.")  # fmt: skip
    figure.supxlabel(wrapped(note, 45 * columns), fontsize=8, color="dimgray")
    plots.save_figure(figure, path, 90)


def wrapped(text: str, width: int = 34) -> str:
    """A title in lines, broken between words."""
    return "\n".join(textwrap.wrap(text, width)) or text


def heads(path: Path, looked: AttentionExample, title: str) -> None:
    """All heads (columns) of all blocks (rows) for one image, each with a scale of its own."""
    rows, columns = len(looked.raw), max(len(maps) for maps in looked.raw)
    cell = 1.5 if columns <= 12 else 0.9
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(cell * columns + 1.2, cell * rows + 1.4))  # fmt: skip
    for i, maps in enumerate(looked.raw):
        for j in range(columns):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            if j >= len(maps):  # blocks of a Swin have different numbers of heads
                axis.set_visible(False)
                continue
            cover(axis, looked, maps[j], 0.75)
            if i == 0 or len(maps) > len(looked.raw[i - 1]) <= j:
                axis.set_title(f"head {j + 1}", fontsize=8)
        axes[i, 0].set_ylabel(f"block {i + 1}", fontsize=8)
    figure.suptitle(wrapped(title, max(40, int(cell * columns * 9))), fontsize=11)
    plots.save_figure(figure, path, 90)


def distances(path: Path, found: np.ndarray, uniform: list[float], title: str) -> None:
    """Mean attention distance of each head by block (Dosovitskiy et al. 2021, fig. 7, right).

    Args:
        found: pixels, one array of heads for each block.
        uniform: what attention to all patches alike would give, in pixels, for each block.
    """
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for block, values in enumerate(found, 1):
        axis.plot([block] * len(values), values, "o", color=plots.VAL_COLOR, ms=6, alpha=0.75,
                  label="a head" if block == 1 else None)  # fmt: skip
    means = [np.mean(values) for values in found]
    numbers = range(1, len(means) + 1)
    axis.plot(numbers, means, color=plots.TRAIN_COLOR, lw=1.6, label="mean of the heads")
    axis.plot(numbers, uniform, color="gray", ls="--", lw=1.2,
              label="if all patches were attended to alike")  # fmt: skip
    axis.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
    axis.set_title(wrapped(title, 80), fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend()
    plots.save_figure(figure, path)


def positions(path: Path, embeddings: torch.Tensor, grid: tuple[int, int], title: str) -> None:
    """Cosine similarity of each patch's position with all others (the same figure, middle).

    Args:
        embeddings: of the patches alone, (rows * columns, D).
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    similar = (unit @ unit.T).reshape(*grid, *grid).numpy()
    down, right = (np.unique(np.linspace(0, n - 1, min(n, 8)).round().astype(int)) for n in grid)
    size = (0.95 * len(right) + 1.9, 0.95 * len(down) + 1.2)
    figure, axes = plt.subplots(
        len(down), len(right), squeeze=False, layout="constrained", figsize=size
    )
    for i, y in enumerate(down):
        for j, x in enumerate(right):
            axis = axes[i, j]
            drawn = axis.imshow(similar[y, x], cmap="viridis", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if i == len(down) - 1:
                axis.set_xlabel(x + 1, fontsize=8)
        axes[i, 0].set_ylabel(y + 1, fontsize=8)
    figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.7)
    figure.supxlabel("patch column", fontsize=9)
    figure.supylabel("patch row", fontsize=9)
    figure.suptitle(wrapped(title, 60), fontsize=11)
    plots.save_figure(figure, path)
