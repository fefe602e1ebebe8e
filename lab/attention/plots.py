"""Figures of attention: maps over images, every head, attention distances, position embeddings."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lab.core import plots

COLORMAP = "inferno"  # perceptually uniform, and dark where there is nothing to see
_VERDICTS = {True: ("#1a7431", ", correct"), False: ("#b3261e", ", wrong"), None: ("black", "")}


@dataclass(frozen=True)
class AttentionExample:
    """One image with the prediction of the model and its maps."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    name: str
    label: str | None
    prediction: str | None
    confidence: float
    correct: bool | None  # None: unknown, because the model and the data have different classes
    raw: list[np.ndarray]  # attention of each block, (heads, rows, columns)
    maps: dict[str, np.ndarray]  # by title of the map, (rows, columns)
    raw_name: str | None = None  # the title in `maps` of the one that repeats a block of `raw`

    @property
    def title(self) -> str:
        """Label, prediction and confidence, as far as they are known."""
        if self.prediction is None:
            return self.label or self.name
        confidence = f"{100 * self.confidence:.0f}\N{NO-BREAK SPACE}%"
        return f"{self.label or self.name}: predicted {self.prediction} ({confidence})"


def plot_overview(path: Path, examples: list[AttentionExample], title: str) -> None:
    """A row per image: the image, then the map of each method over it."""
    methods = list(examples[0].maps)
    rows, columns = len(examples), 1 + len(methods)
    figure, axes = plots.plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(2.9 * columns, 2.95 * rows + 1.1))  # fmt: skip
    for row, example in zip(axes, examples, strict=True):
        side = example.pixels.shape[0]
        row[0].imshow(example.pixels, extent=(0, side, side, 0), interpolation="nearest")
        color, verdict = _VERDICTS[example.correct]
        row[0].set_title(_wrap(example.title + verdict), fontsize=9, color=color)
        for axis, name in zip(row[1:], methods, strict=True):
            _draw_map(axis, example, example.maps[name])
            axis.set_title(name, fontsize=9)
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(_wrap(title, 36 * columns))
    note = ("Bright: much attention, or strong support for the class. Each map has its own scale, "
            "from zero to its 99th percentile.")  # fmt: skip
    figure.supxlabel(_wrap(note, 45 * columns), fontsize=8, color="dimgray")
    plots.save_figure(figure, path, 90)


def plot_heads(path: Path, example: AttentionExample, title: str) -> None:
    """All heads (columns) of all blocks (rows) for one image, each with its own scale."""
    rows, columns = len(example.raw), max(len(maps) for maps in example.raw)
    cell = 1.5 if columns <= 12 else 0.9  # inches
    figure, axes = plots.plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(cell * columns + 1.2, cell * rows + 1.4))  # fmt: skip
    for i, maps in enumerate(example.raw):
        for j in range(columns):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            if j >= len(maps):  # the stages of a Swin have different numbers of heads
                axis.set_visible(False)
                continue
            _draw_map(axis, example, maps[j], 0.75)
            if i == 0 or j >= len(example.raw[i - 1]):
                axis.set_title(f"head {j + 1}", fontsize=8)
        axes[i, 0].set_ylabel(f"block {i + 1}", fontsize=8)
    figure.suptitle(_wrap(title, max(40, int(cell * columns * 9))), fontsize=11)
    plots.save_figure(figure, path, 90)


def plot_distances(
    path: Path, distances: list[list[float]], uniform: list[float], title: str
) -> None:
    """Mean attention distance of each head by block (Dosovitskiy et al. 2021, fig. 7, right).

    Args:
        distances: pixels, for each head of each block.
        uniform: the distance of uniform attention to all patches, for each block.
    """
    figure, axis = plots.plt.subplots(figsize=(8, 5), layout="constrained")
    blocks = range(1, len(distances) + 1)
    for block, values in zip(blocks, distances, strict=True):
        axis.plot([block] * len(values), values, "o", color=plots.VAL_COLOR, ms=6, alpha=0.75,
                  label="one head" if block == 1 else None)  # fmt: skip
    means = [np.mean(values) for values in distances]
    axis.plot(blocks, means, color=plots.TRAIN_COLOR, lw=1.6, label="mean of heads")
    axis.plot(blocks, uniform, color="gray", ls="--", lw=1.2, label="uniform attention")
    axis.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
    axis.set_title(_wrap(title, 80), fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend()
    plots.save_figure(figure, path)


def plot_positions(
    path: Path, pos_embed: torch.Tensor, grid_size: tuple[int, int], title: str
) -> None:
    """Cosine similarity of position embeddings (Dosovitskiy et al. 2021, fig. 7, middle).

    Args:
        pos_embed: of the patches, without prefix tokens, (rows * columns, D).
    """
    normalized = F.normalize(pos_embed.float(), dim=-1)
    similarity = (normalized @ normalized.T).reshape(*grid_size, *grid_size).numpy()
    shown_rows, shown_columns = (
        np.unique(np.linspace(0, n - 1, min(n, 8)).round().astype(int)) for n in grid_size
    )
    size = (0.95 * len(shown_columns) + 1.9, 0.95 * len(shown_rows) + 1.2)
    figure, axes = plots.plt.subplots(
        len(shown_rows), len(shown_columns), squeeze=False, layout="constrained", figsize=size
    )
    for i, row in enumerate(shown_rows):
        for j, column in enumerate(shown_columns):
            axis = axes[i, j]
            image = axis.imshow(similarity[row, column], cmap="viridis", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if i == len(shown_rows) - 1:
                axis.set_xlabel(column + 1, fontsize=8)
        axes[i, 0].set_ylabel(row + 1, fontsize=8)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.7)
    figure.supxlabel("patch column", fontsize=9)
    figure.supylabel("patch row", fontsize=9)
    figure.suptitle(_wrap(title, 60), fontsize=11)
    plots.save_figure(figure, path)


def _draw_map(
    axis: plots.plt.Axes, example: AttentionExample, values: np.ndarray, alpha: float = 0.65
) -> None:
    """Draws a map over its image.

    The scale ends at the 99th percentile, because single patches can attract most of the attention
    and would leave the rest dark (Darcet et al. 2024, "Vision Transformers Need Registers").
    """
    side = example.pixels.shape[0]
    axis.imshow(example.pixels, extent=(0, side, side, 0), interpolation="nearest")
    axis.imshow(values, extent=(0, side, side, 0), cmap=COLORMAP, alpha=alpha,
                vmin=0, vmax=np.quantile(values, 0.99) or 1,
                interpolation="bilinear" if side > 64 else "nearest")  # fmt: skip
    axis.set(xlim=(0, side), ylim=(side, 0))


def _wrap(text: str, width: int = 34) -> str:
    """Breaks a title into lines between words."""
    return "\n".join(textwrap.wrap(text, width)) or text
