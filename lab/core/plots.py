"""Colors and figures of a run: training curves, confusion matrix. Importing this loads matplotlib.

Each kind of category (split, model, method, ...) has one palette, which the figures and the
report's page share. The colors of a palette stay distinguishable with deuteranopia, protanopia and
tritanopia, on white and on dark paper; the marker is a second cue.
"""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from lab.core.checkpoints import write_atomically

matplotlib.use("agg")  # writes files; needs no display
import matplotlib.pyplot as plt


class Style(NamedTuple):
    """Color and marker of one category."""

    color: str
    marker: str


SPLITS = {
    "train": Style("#c8641e", "o"),
    "validation": Style("#3d74c9", "s"),
    "test": Style("#7e6467", "D"),
}
MODELS = {
    "ViT": Style("#8a4fd0", "o"),
    "CNN": Style("#25958a", "s"),
    "Swin": Style("#c4432b", "^"),
}
METHODS = {  # of attention maps
    "attention": Style("#1f8f9c", "o"),
    "rollout": Style("#cf4a1f", "s"),
    "gradient-rollout": Style("#8a4fd0", "^"),
    "grad-cam": Style("#8f5a62", "D"),
}
ANSWERS = {"correct": Style("#3d74c9", "o"), "wrong": Style("#c8641e", "X")}
_SERIES = (  # several runs in one chart
    Style("#1f8077", "o"), Style("#8a34ea", "s"), Style("#bf8410", "D"),
    Style("#f0308f", "^"), Style("#9a83d4", "v"), Style("#866a3c", "P"),
)  # fmt: skip
PALETTES = {
    "splits": SPLITS, "models": MODELS, "methods": METHODS, "answers": ANSWERS,
    "series": dict(enumerate(_SERIES)),
}  # fmt: skip
TRAIN_COLOR, VAL_COLOR = SPLITS["train"].color, SPLITS["validation"].color

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False})  # fmt: skip


def css_palette() -> str:
    """The palettes as CSS variables for web pages, such as --splits-train."""
    return "\n".join(
        f"  --{concept}-{name}: {style.color};".lower()
        for concept, styles in PALETTES.items()
        for name, style in styles.items()
    )


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


def literal(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign starts no formula."""
    return text.replace("$", r"\$")


def set_title(figure: plt.Figure, finding: str, note: str = "") -> None:
    """Writes a finding above a figure and a note below it, both wrapped to the figure's width.

    The figure needs a constrained layout.
    """
    inches = figure.get_figwidth()
    figure.suptitle(wrap(literal(finding), int(9.5 * inches)), fontsize=12, fontweight="bold")
    if note:
        figure.supxlabel(wrap(literal(note), int(14 * inches)), fontsize=8, color="dimgray")


def legend_above(axis: plt.Axes, columns: int, **handles: Any) -> None:
    """Puts the legend between the title and the axis, where it covers no data."""
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, fontsize=9,
                columnspacing=1.4, handletextpad=0.5, **handles)  # fmt: skip


def wrap(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` characters, between words."""
    return "\n".join(textwrap.wrap(text, max(width, 12))) or text


def plot_curves(
    path: Path,
    rows: list[dict[str, Any]],
    subject: str,
    best_epoch: int,
    resize_phase: dict[str, int],
    floor: float = 0,
) -> None:
    """Plots training and validation loss and accuracy over the epochs.

    Args:
        path: the image file.
        rows: as in history.csv.
        subject: the run and its dataset.
        best_epoch: the epoch that validation selected.
        resize_phase: the first `epochs` epochs were trained on images of `img_size` pixels.
        floor: the minimum training loss with label smoothing; 0: no line is drawn.
    """
    epochs = [row["epoch"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for axis, key, label, scale in (
        (axes[0], "loss", "cross-entropy loss", 1),
        (axes[1], "accuracy", "accuracy (%)", 100),
    ):
        for part, name in (("train", "training"), ("val", "validation")):
            style = SPLITS["train" if part == "train" else "validation"]
            values = [scale * row[f"{part}_{key}"] for row in rows]
            axis.plot(epochs, values, color=style.color, label=name, marker=style.marker,
                      ms=3.5, lw=1.6, markevery=max(1, len(rows) // 15))  # fmt: skip
        axis.axvline(best_epoch, color="gray", ls=":", lw=1.2, label=f"best epoch ({best_epoch})")
        if last := resize_phase["epochs"]:
            note = f"trained on images of {resize_phase['img_size']} pixels"
            axis.axvspan(0.5, last + 0.5, color="gray", alpha=0.12, lw=0, label=note)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if floor:
        label = f"minimum loss with label smoothing ({floor:.2f})"
        axes[0].axhline(floor, color=TRAIN_COLOR, ls="--", lw=1.2, label=label)
        axes[0].set_ylim(bottom=min(0, axes[0].get_ylim()[0]))
    for axis in axes:
        axis.grid(alpha=0.25)
    legend_above(axes[0], 2)
    legend_above(axes[1], 3)
    accuracy = 100 * next(row for row in rows if row["epoch"] == best_epoch)["val_accuracy"]
    when = f"epoch {best_epoch} of {len(rows)}"
    if best_epoch == epochs[-1]:
        when = f"the last epoch ({best_epoch}) and may still be rising"
    set_title(
        figure,
        f"Validation accuracy is highest ({accuracy:.1f} %) in {when}",
        f"{subject}. Training values are averages over the epoch, on augmented images and with the "
        "optimized loss. Validation values are measured after the epoch, without augmentation.",
    )
    save_figure(figure, path)


def plot_confusion(path: Path, matrix: np.ndarray, classes: list[str], subject: str) -> None:
    """Plots a confusion matrix; darker cells contain a larger fraction of their row.

    Args:
        path: the image file.
        matrix: numbers of test images, true classes in rows, predicted classes in columns, (C, C).
        classes: their names.
        subject: the run and its dataset.
    """
    n = len(classes)
    side = min(5 + 0.3 * n, 24)
    figure, axis = plt.subplots(figsize=(side, side + 0.4), layout="constrained")
    share = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    is_correct = np.eye(n, dtype=bool)
    for name, shown in (("correct", is_correct), ("wrong", ~is_correct & (matrix > 0))):
        tint = LinearSegmentedColormap.from_list(name, ["#f4f4f2", ANSWERS[name].color])
        axis.imshow(np.ma.array(share**0.5, mask=~shown), cmap=tint, vmin=0, vmax=1)
    size = 10 if n <= 20 else 8 if n <= 40 else 5
    names = list(map(literal, classes))
    axis.set_xticks(range(n), names, rotation=90 if max(map(len, classes)) > 2 else 0)
    axis.set_yticks(range(n), names)
    axis.tick_params(labelsize=size, length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="predicted class", ylabel="true class")
    if n <= 40:
        for i, j in zip(*matrix.nonzero(), strict=True):
            color = "white" if share[i, j] > 0.4 else "black"
            axis.text(j, i, matrix[i, j], ha="center", va="center", color=color, fontsize=size - 1)
    errors = np.where(is_correct, 0, matrix)
    truth, predicted = np.unravel_index(errors.argmax(), errors.shape)
    accuracy = 100 * matrix.trace() / matrix.sum()
    finding = f"{accuracy:.1f} % of {matrix.sum():,} test images are classified correctly"
    if count := errors[truth, predicted]:
        finding += (f"; the most frequent error: {classes[truth]} predicted as "
                    f"{classes[predicted]} ({count:,} of {matrix[truth].sum():,})")  # fmt: skip
    note = (
        "Blue: correct. Orange: errors. Darker cells contain a larger fraction of the true class."
    )
    set_title(figure, finding, f"{subject}. {note}")
    save_figure(figure, path)
