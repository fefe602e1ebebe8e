"""Figures of a run: training curves and confusion matrix. Importing this loads matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lab.core.checkpoints import write_atomically

matplotlib.use("agg")  # writes files; needs no display
import matplotlib.pyplot as plt

TRAIN_COLOR, VAL_COLOR = "#c2571a", "#1f5fa8"  # distinct in grayscale and to color-blind readers


def save_figure(figure: plt.Figure, path: Path, dpi: int = 130) -> None:
    """Writes a figure in the format of its suffix and closes it.

    Args:
        figure: what to write.
        path: .png for plots, .jpg for photographs, which would be large as .png.
        dpi: pixels per inch.

    Raises: UserError, if the file cannot be written.
    """
    options = {"format": path.suffix[1:], "dpi": dpi}
    try:
        write_atomically(path, lambda scratch: figure.savefig(scratch, **options))
    finally:
        plt.close(figure)


def plot_curves(
    path: Path, rows: list[dict[str, Any]], title: str, best_epoch: int, small: dict[str, int]
) -> None:
    """Plots training and validation loss and accuracy over the epochs.

    Args:
        path: the image file.
        rows: as in history.csv.
        title: of the figure.
        best_epoch: the epoch that validation selected.
        small: the first `epochs` epochs were trained on images of `img_size` pixels.
    """
    epochs = [row["epoch"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key, label, scale in (
        (axes[0], "loss", "cross-entropy loss", 1),
        (axes[1], "accuracy", "accuracy (%)", 100),
    ):
        for part, color, name in (
            ("train", TRAIN_COLOR, "training"),
            ("val", VAL_COLOR, "validation"),
        ):
            values = [scale * row[f"{part}_{key}"] for row in rows]
            axis.plot(epochs, values, color=color, label=name, marker="o", ms=2.5, lw=1.6)
        axis.axvline(best_epoch, color="gray", ls=":", lw=1.2, label=f"best epoch ({best_epoch})")
        if small["epochs"]:
            note = f"trained on {small['img_size']} pixels"
            axis.axvspan(0.5, small["epochs"] + 0.5, color="gray", alpha=0.12, lw=0, label=note)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend()
    figure.suptitle(title)
    figure.supxlabel(
        "Training values are averages over the epoch, on augmented images and with the optimized "
        "loss. Validation values are measured after the epoch on images without augmentation.",
        fontsize=8,
        color="dimgray",
    )
    save_figure(figure, path)


def plot_confusion(path: Path, matrix: np.ndarray, classes: list[str], title: str) -> None:
    """Plots a confusion matrix; the color is the fraction of the row.

    Args:
        path: the image file.
        matrix: numbers of test images, true classes in rows, predicted classes in columns, (C, C).
        classes: their names.
        title: of the figure.
    """
    n = len(classes)
    side = min(4.5 + 0.32 * n, 24)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    share = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    drawn = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, label="fraction of the true class", shrink=0.8)
    size = 10 if n <= 20 else 8 if n <= 40 else 5
    axis.set_xticks(range(n), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axis.set_yticks(range(n), classes)
    axis.tick_params(labelsize=size)
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if n <= 40:
        for i, j in zip(*matrix.nonzero(), strict=True):
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, matrix[i, j], ha="center", va="center", color=color, fontsize=size - 1)
    save_figure(figure, path)
