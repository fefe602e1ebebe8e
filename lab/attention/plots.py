"""Figures of attention: maps over images, every head, attention distances, position embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lab.core import plots

COLORMAP = "inferno"  # perceptually uniform, and dark for low values
_VERDICTS = {True: "correct", False: "wrong"}
_SMALL = 64  # pixels: an image up to this size is drawn as a grid, without smoothing


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
    raw_name: str | None = None  # key in `maps` of the map that is already in `raw`

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
        _draw_image(row[0], example)
        verdict = _VERDICTS.get(example.correct)
        color = plots.ANSWERS[verdict].color if verdict else "black"
        text = f"{example.title}, {verdict}" if verdict else example.title
        row[0].set_title(plots.wrap(text, 34), fontsize=9, color=color)
        for axis, name in zip(row[1:], methods, strict=True):
            _draw_map(axis, example, example.maps[name])
            axis.set_title(name, fontsize=9)
        for axis in row:
            axis.set_axis_off()
    note = ("Bright: high attention, or strong evidence for the class. Each map has its own scale, "
            "from zero to its 99th percentile.")  # fmt: skip
    plots.set_title(figure, title, note)
    plots.save_figure(figure, path, 90)


def plot_example(path: Path, example: AttentionExample) -> None:
    """One image beside its first map, without text: the thumbnail in the report."""
    figure, axes = plots.plt.subplots(1, 2, figsize=(4, 2))
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    _draw_image(axes[0], example)
    _draw_map(axes[1], example, next(iter(example.maps.values())))
    for axis in axes:
        axis.set_axis_off()
    plots.save_figure(figure, path, 100)


def plot_heads(path: Path, example: AttentionExample, title: str) -> None:
    """All heads (columns) of all blocks (rows) for one image, each with its own scale."""
    rows, columns = len(example.raw), max(len(maps) for maps in example.raw)
    cell = 1.5 if columns <= 12 else 0.9  # inches
    size = (max(6, cell * columns + 1.2), cell * rows + 1.6)
    figure, axes = plots.plt.subplots(
        rows, columns, squeeze=False, layout="constrained", figsize=size
    )
    for i, maps in enumerate(example.raw):
        for j in range(columns):
            axis = axes[i, j]
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if j >= len(maps):  # the stages of a Swin have different numbers of heads
                axis.set_visible(False)
                continue
            _draw_map(axis, example, maps[j], 0.75)
            if i == 0 or j >= len(example.raw[i - 1]):
                axis.set_title(f"head {j + 1}", fontsize=8)
        axes[i, 0].set_ylabel(f"block {i + 1}", fontsize=8)
    shares = {(i, j): values.max() / values.sum() for i, maps in enumerate(example.raw, 1)
              for j, values in enumerate(maps, 1)}  # fmt: skip
    (block, head), share = max(shares.items(), key=lambda item: item[1])
    finding = (f"Head {head} of block {block} is the most focused: {100 * share:.0f} % of its "
               "attention to the patches falls on one patch")  # fmt: skip
    plots.set_title(figure, finding, f"{title}. Each map has its own scale.")
    plots.save_figure(figure, path, 90)


def plot_distances(
    path: Path, distances: list[list[float]], uniform: list[float], subject: str
) -> None:
    """Mean attention distance of each head by block (Dosovitskiy et al. 2021, fig. 7, right).

    Args:
        path: the image file.
        distances: pixels, for each head of each block.
        uniform: the distance of uniform attention to all patches, for each block.
        subject: the run and its images.
    """
    figure, axis = plots.plt.subplots(figsize=(8, 5.2), layout="constrained")
    blocks = range(1, len(distances) + 1)
    for block, values in zip(blocks, distances, strict=True):
        axis.plot([block] * len(values), values, "o", color=plots.METHODS["attention"].color,
                  ms=6, alpha=0.75, label="one head" if block == 1 else None)  # fmt: skip
    means = [float(np.mean(values)) for values in distances]
    axis.plot(blocks, means, color="black", lw=1.4, label="mean of the heads")
    highest = max(max(values) for values in distances)
    label = "uniform attention to all patches"
    if min(uniform) > 2 * highest:  # windows of a Swin: the line would leave no room for the data
        axis.plot([], [], color="gray", ls="--",
                  label=f"{label}: {np.mean(uniform):.0f} pixels, above this axis")  # fmt: skip
        axis.set_ylim(0, 1.15 * highest)
    else:
        axis.plot(blocks, uniform, color="gray", ls="--", lw=1.2, label=label)
        axis.set_ylim(0, 1.08 * max(highest, *uniform))
    axis.set(ylabel="mean attention distance (pixels)")
    _label_blocks(axis, [len(values) for values in distances])
    axis.grid(alpha=0.25)
    plots.legend_above(axis, 3)
    first, last = means[0], means[-1]
    verb = "rises" if last > 1.1 * first else "falls" if last < 0.9 * first else "stays similar"
    finding = (f"The mean attention distance {verb} from the first block ({first:.1f} pixels) to "
               f"the last ({last:.1f} pixels)")  # fmt: skip
    plots.set_title(figure, finding, subject)
    plots.save_figure(figure, path)


def _label_blocks(axis: plots.plt.Axes, heads: list[int]) -> None:
    """Labels blocks 1 to len(heads); those of a Swin as stage.block, because its stages, which have
    different numbers of heads, also have different patch sizes."""
    labels, stage, place = [], 1, 0
    for i, count in enumerate(heads):
        place += 1
        if i and count != heads[i - 1]:
            stage, place = stage + 1, 1
            axis.axvline(i + 0.5, color="lightgray", lw=1, zorder=0)
        labels.append(f"{stage}.{place}")
    blocks = range(1, len(heads) + 1)
    if stage == 1:
        labels = [str(block) for block in blocks]
    axis.set_xticks(blocks, labels)
    axis.set_xlabel("block" if stage == 1 else "stage and block")


def plot_positions(
    path: Path, pos_embed: torch.Tensor, grid_size: tuple[int, int], subject: str
) -> None:
    """Cosine similarity of position embeddings (Dosovitskiy et al. 2021, fig. 7, middle).

    Args:
        path: the image file.
        pos_embed: of the patches, without prefix tokens, (rows * columns, D).
        grid_size: rows and columns of patches.
        subject: the run.
    """
    normalized = F.normalize(pos_embed.float(), dim=-1)
    similarity = (normalized @ normalized.T).reshape(*grid_size, *grid_size).numpy()
    shown_rows, shown_columns = (
        np.unique(np.linspace(0, n - 1, min(n, 8)).round().astype(int)) for n in grid_size
    )
    size = (max(6.5, 0.95 * len(shown_columns) + 1.9), 0.95 * len(shown_rows) + 2)
    figure, axes = plots.plt.subplots(
        len(shown_rows), len(shown_columns), squeeze=False, layout="constrained", figsize=size
    )
    for i, row in enumerate(shown_rows):
        for j, column in enumerate(shown_columns):
            axis = axes[i, j]
            image = axis.imshow(similarity[row, column], cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == len(shown_rows) - 1:
                axis.set_xlabel(column + 1, fontsize=8)
        axes[i, 0].set_ylabel(row + 1, fontsize=8)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.7)
    figure.supylabel("patch row", fontsize=9)
    near, far = _mean_similarities(similarity)
    verb = "have more similar" if near > far + 0.1 else "do not have more similar"
    finding = (f"Neighboring patches {verb} position embeddings: mean cosine similarity "
               f"{near:.2f}, all other pairs {far:.2f}")  # fmt: skip
    note = "Each panel compares the embedding of one patch with all others; columns are labeled"
    plots.set_title(figure, finding, f"{subject}. {note} below, rows at the left.")
    plots.save_figure(figure, path)


def _mean_similarities(similarity: np.ndarray) -> tuple[float, float]:
    """The mean over pairs of patches that share an edge, and over all other pairs.

    Args:
        similarity: (rows, columns, rows, columns).
    """
    rows, columns = similarity.shape[:2]
    places = np.indices((rows, columns)).reshape(2, -1).T
    distance = np.abs(places[:, None] - places[None]).sum(-1)
    flat = similarity.reshape(rows * columns, -1)
    near, far = (flat[distance == 1], flat[distance > 1])
    return tuple(float(pairs.mean()) if pairs.size else 0.0 for pairs in (near, far))


def _draw_image(axis: plots.plt.Axes, example: AttentionExample) -> None:
    side = example.pixels.shape[0]
    axis.imshow(example.pixels, extent=(0, side, side, 0), interpolation="nearest")


def _draw_map(
    axis: plots.plt.Axes, example: AttentionExample, values: np.ndarray, alpha: float = 0.65
) -> None:
    """Draws a map over a photo. A small gray image, such as a digit, is only outlined on its map.

    The scale ends at the 99th percentile, because single patches can attract most of the attention
    and would leave the rest dark (Darcet et al. 2024, "Vision Transformers Need Registers").
    """
    side = example.pixels.shape[0]
    is_small = side <= _SMALL
    is_digit = is_small and not np.ptp(example.pixels, axis=-1).any()  # red, green and blue agree
    if not is_digit:
        _draw_image(axis, example)
    axis.imshow(values, extent=(0, side, side, 0), cmap=COLORMAP, alpha=1 if is_digit else alpha,
                vmin=0, vmax=np.quantile(values, 0.99) or 1,
                interpolation="nearest" if is_small else "bilinear")  # fmt: skip
    if is_digit and np.ptp(example.pixels):
        gray = example.pixels[..., 0].astype(float)
        centers = np.arange(side) + 0.5
        for color, width in (("black", 2.4), ("white", 1)):  # visible on dark and bright patches
            axis.contour(centers, centers, gray, [(gray.min() + gray.max()) / 2], colors=color,
                         linewidths=width)  # fmt: skip
    axis.set(xlim=(0, side), ylim=(side, 0))
