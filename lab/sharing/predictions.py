"""Predictions for any number of image files in bounded memory, or for a split of a dataset.

`UserImages` reads files while the model computes, `SplitImages` reads a dataset, and `predict`
writes predictions.csv and collects what the contact sheet and the terminal show.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from lab.core import UserError, checkpoints, runtime, stats
from lab.data import Dataset, datasets, images
from lab.models import Pretrained

_SHOWN = 24  # images on the contact sheet
_UNSUPPORTED = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".svg"}
MapsOf = Callable[[Tensor], Tensor]  # normalized images (B, C, S, S) to maps (B, rows, columns)


@dataclass(frozen=True)
class Batch:
    """Some images: their indices in the source, names, uint8 pixels (B, C, H, H) and labels.

    A label is the name of a class, or "" if it is unknown.
    """

    numbers: list[int]
    names: list[str]
    pixels: Tensor
    labels: list[str]


class UserImages:
    """Image files, read by several threads one batch ahead of the model.

    The label of a file is the name of the nearest folder that is a class of the model. Folders
    outside the one that the user named do not count.
    """

    def __init__(self, source: str, pretrained: Pretrained):
        self._folders = datasets.image_files(source)
        self._classes = set(pretrained.class_names)
        self.paths, self.reading = list(self._folders), pretrained.preprocess.reading
        folder = Path(source).expanduser()
        is_folder = os.path.isdir(folder)
        self.name = folder.resolve().name if is_folder else f"{len(self.paths)}-images"
        if len(self.paths) == 1:
            self.name = self.paths[0].stem
        self.unreadable: dict[str, str] = {}  # files left out so far, with the reasons
        others = images.list_images(folder)[1] if is_folder else []
        count = sum(path.suffix.lower() in _UNSUPPORTED for path in others if path.name[0] != ".")
        unsupported = f"{count} images are left out, because formats such as HEIC cannot be read"
        self.notes = [unsupported] if count else []  # for the user

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the files; it does not read them."""
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            stat = path.stat() if path.exists() else None
            facts = (str(path), stat and (stat.st_size, stat.st_mtime_ns, stat.st_mode))
            digest.update(repr(facts).encode(errors="backslashreplace"))
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[Batch]:
        """All readable images in order; the next batch is read while this one is predicted."""
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            following = pool.map(self._read, self.paths[:size])
            for start in range(0, len(self.paths), size):
                found = list(following)
                following = pool.map(self._read, self.paths[start + size : start + 2 * size])
                kept = []
                for number, pixels in enumerate(found, start):
                    if isinstance(pixels, str):
                        self.unreadable[str(self.paths[number])] = pixels
                    else:
                        kept.append((number, pixels))
                if kept:
                    yield self._batch(kept)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> np.ndarray | str:
        """The pixels of a file, or the reason why it cannot be read."""
        try:
            return images.read_image(path, self.reading)[0]
        except UnidentifiedImageError:
            return "not an image in a format that can be read"
        except Exception as error:  # Pillow raises many kinds for damaged files
            return getattr(error, "strerror", None) or runtime.first_line(error)

    def _batch(self, kept: list[tuple[int, np.ndarray]]) -> Batch:
        numbers = [number for number, _ in kept]
        paths = [self.paths[number] for number in numbers]
        pixels = torch.from_numpy(np.stack([array for _, array in kept]))
        return Batch(numbers, list(map(str, paths)), pixels, list(map(self._label, paths)))

    def _label(self, path: Path) -> str:
        """The class of a file, or "" if no folder names one."""
        outermost = self._folders[path].absolute()
        for folder in path.absolute().parents:
            name = images.printable(folder.name)
            if name in self._classes or folder == outermost:
                break
        return name if name in self._classes else ""


class SplitImages:
    """A split of a dataset, as training sees it."""

    def __init__(self, data: Dataset, split: str):
        self.name, self.data, self.split = f"{data.name}-{split}", data, getattr(data, split)
        others = (getattr(data, other) for other in ("train", "val", "test") if other != split)
        elsewhere = {name for other in others for name in other.unreadable}
        self.unreadable, unassigned = {}, {}  # a split that is drawn has only readable images
        for name, reason in self.split.unreadable.items():
            (unassigned if name in elsewhere else self.unreadable)[name] = reason
        in_no_split = f"{len(unassigned)} unreadable images are in no split: "
        self.notes = [in_no_split + _with_reasons(unassigned)] if unassigned else []

    def __len__(self) -> int:
        return len(self.split) + len(self.unreadable)

    def fingerprint(self) -> str:
        return self.data.fingerprint

    def batches(self, size: int) -> Iterator[Batch]:
        """All readable images in order."""
        for numbers in torch.arange(len(self.split)).split(size):
            labels = [self.data.classes[label] for label in self.split.labels[numbers].tolist()]
            names = [self.split.names[number] for number in numbers.tolist()]
            yield Batch(numbers.tolist(), names, self.split.images(numbers), labels)


Images = UserImages | SplitImages


def find_images(
    source: str,
    split: str,
    data_dir: str,
    pretrained: Pretrained,
    is_dataset: bool = False,
    val_fraction: float = 0.1,
) -> Images:
    """The images that IMAGES refers to.

    Args:
        source: a dataset's name, or a folder with train/; or files, folders and patterns, see
            `datasets.image_files`.
        split: which part of a dataset: "train", "val" or "test".
        data_dir: where downloaded datasets are stored.
        pretrained: the model.
        is_dataset: the source is a dataset even if it is a folder without train/.
        val_fraction: of the training, if the source has no validation split of its own.

    Raises: UserError, for images that do not exist.
    """
    if source not in datasets.DATASETS:
        folder = Path(source).expanduser()
        has_train = os.path.isdir(folder / "train")
        # Not train/, because validation or test images may have been taken from it.
        if has_train and split != "train" and os.path.isdir(folder / split):
            return UserImages(str(folder / split), pretrained)
        if not is_dataset and not has_train:
            return UserImages(source, pretrained)
    preprocess = pretrained.preprocess
    data = datasets.load_data(
        source, data_dir, preprocess.resized, val_fraction, skip_unreadable=True,
        interpolation=preprocess.interpolation,
    )  # fmt: skip
    return SplitImages(data, split)


# --- Predicting ---


@dataclass(frozen=True)
class Example:
    """One image of the contact sheet."""

    name: str
    label: str  # "": not a class of the model
    top: list[tuple[str, float]]  # the k most probable classes and their probabilities
    pixels: Tensor  # (1 or 3, S, S) in [0, 1], cropped as for the model
    map: np.ndarray | None  # (rows, columns)


@dataclass
class Summary:
    """Results of `predict` besides predictions.csv."""

    images: int = 0
    labeled: int = 0  # images whose label is a class of the model
    correct: int = 0  # of them
    examples: list[Example] = field(default_factory=list)

    def metrics(self) -> dict[str, Any]:
        """For metrics.json: the number of images, and the accuracy if labels are known."""
        found: dict[str, Any] = {"images": self.images}
        if self.labeled:
            low, high = stats.wilson_interval(self.correct, self.labeled)
            found["labeled_images"] = self.labeled
            found["accuracy"] = round(self.correct / self.labeled, 6)
            found["accuracy_95"] = [round(low, 4), round(high, 4)]
        return found


@torch.no_grad()
def predict(
    pretrained: Pretrained,
    source: Images,
    path: Path,
    top_k: int,
    batch_size: int,
    device: torch.device,
    maps_of: MapsOf | None = None,
) -> Summary:
    """Writes a row for each readable image: name, label, and the k most probable classes.

    Args:
        pretrained: the model, on `device`.
        source: the images; its `unreadable` is complete afterwards.
        path: predictions.csv. It is complete or not written.
        top_k: classes per image.
        batch_size: images per forward pass.
        device: where the model is.
        maps_of: draws maps of the images on the contact sheet.

    Raises: UserError, if no image can be read.
    """
    classes, preprocess = pretrained.class_names, pretrained.preprocess
    wanted = np.linspace(0, len(source) - 1, min(_SHOWN, len(source))).round()  # as examples
    summary = Summary()
    columns = [f"{name}_{i}" for i in range(1, top_k + 1) for name in ("class", "probability")]

    def write(scratch: Path) -> None:
        with (
            open(scratch, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
            tqdm(total=len(source), unit=" images", leave=False, disable=None) as bar,
        ):
            writer = csv.writer(file)
            writer.writerow(["image", "label", *columns])
            for batch in source.batches(batch_size):
                inputs = preprocess.normalize(batch.pixels.to(device))
                logits = pretrained.model(inputs).cpu().double()  # MPS has no float64
                found = logits.softmax(1).topk(top_k)
                for i, (name, label) in enumerate(zip(batch.names, batch.labels, strict=True)):
                    label = label if label in classes else ""
                    indices, values = found.indices[i].tolist(), found.values[i].tolist()
                    top = [(classes[j], p) for j, p in zip(indices, values, strict=True)]
                    summary.images += 1
                    summary.labeled += label != ""
                    summary.correct += label == top[0][0]
                    cells = [cell for guess, p in top for cell in (guess, f"{p:.4f}")]
                    writer.writerow([name, label, *cells])
                    # If a wanted image is unreadable, a later one replaces it.
                    left = wanted[len(summary.examples) :]
                    if len(left) and batch.numbers[i] >= left[0]:
                        drawn = maps_of(inputs[i : i + 1])[0] if maps_of else None
                        pixels = preprocess.center_crop(batch.pixels[i : i + 1])[0]
                        drawn = None if drawn is None else drawn.float().cpu().numpy()
                        summary.examples.append(Example(name, label, top, pixels, drawn))
                bar.update(len(batch.names))
        if not summary.images:
            raise UserError(
                f"none of the images could be read ({len(source)}): {describe_unreadable(source)}"
            )

    checkpoints.write_atomically(path, write)
    return summary


def describe_unreadable(source: Images) -> str:
    """The files that could not be read, with the reasons."""
    return _with_reasons(source.unreadable)


def _with_reasons(unreadable: dict[str, str]) -> str:
    return images.abbreviate([f"{name} ({why})" for name, why in unreadable.items()], "; ")


def table(summary: Summary, most: int = 8) -> str:
    """The first predictions as text, a line per image."""
    rows = []
    for x in summary.examples[:most]:
        guesses = ", ".join(f"{name} ({100 * p:.1f} %)" for name, p in x.top[:3])
        rows.append((images.printable(Path(x.name).name), images.printable(guesses)))
    width = min(40, max(len(name) for name, _ in rows))
    lines = [f"{name:<{width}}  {guesses}" for name, guesses in rows]
    more = summary.images - len(rows)
    return "\n".join(lines + ([f"... and {more:,} more in predictions.csv"] if more else []))


def plot_contact_sheet(path: Path, summary: Summary, title: str, map_name: str | None) -> None:
    """Draws the examples with their most probable classes, and the map next to each image.

    `map_name` says what the maps are; None: there are none.
    """
    from lab.core import plots  # loads matplotlib

    per_image = 2 if map_name else 1
    columns = min(len(summary.examples), 3 if map_name else 6)
    rows = -(-len(summary.examples) // columns)
    figure, axes = plots.plt.subplots(
        rows, columns * per_image, squeeze=False, layout="constrained",
        figsize=(max(5, 2.1 * columns * per_image), 3 * rows + 0.8),
    )  # fmt: skip
    bottom = 0.5 / figure.get_figheight()
    figure.get_layout_engine().set(hspace=0.07, rect=(0, bottom, 1, 1 - bottom))  # for the captions
    for axis in axes.flat:
        axis.set_axis_off()
    for number, example in enumerate(summary.examples):
        row, column = divmod(number, columns)
        side = example.pixels.shape[-1]
        extent = (0, side, side, 0)
        for axis in axes[row, per_image * column :][:per_image]:
            pixels = example.pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
            axis.imshow(pixels, extent=extent, interpolation="nearest")
        if map_name:
            axis = axes[row, per_image * column + 1]
            axis.imshow(example.map, extent=extent, cmap="inferno", alpha=0.65, vmin=0,
                        vmax=np.quantile(example.map, 0.99) or 1,
                        interpolation="bilinear" if side > 64 else "nearest")  # fmt: skip
        _caption(axes[row, per_image * column], example)
    notes = [f"Right of each image: {map_name}."] if map_name else []
    if summary.labeled:
        notes.append("Blue: correct. Orange: wrong.")
    width = 14 * columns * per_image
    text = "\n".join([_fit(title, width), *(plots.wrap(note, width) for note in notes)])
    figure.suptitle(text, fontsize=11)
    plots.save_figure(figure, path, 110)


def _caption(axis: Any, example: Example) -> None:
    """The label, or else the name, above an image; predictions below it."""
    from lab.core import plots

    name = plots.literal(images.printable(example.label or Path(example.name).name))
    color = "black"
    if example.label:
        is_correct = example.label == example.top[0][0]
        color = plots.ANSWERS["correct" if is_correct else "wrong"].color
    axis.set_title(_fit(name, 26), fontsize=8, color="dimgray")
    for line, (guess, p) in enumerate(example.top[:3]):
        text = f"{_fit(guess, 20)} ({100 * p:.0f} %)"
        axis.text(0.5, -0.03 - 0.11 * line, plots.literal(text), transform=axis.transAxes,
                  ha="center", va="top", fontsize=9 if line == 0 else 7.5,
                  color=color if line == 0 else "dimgray",
                  weight="bold" if line == 0 else "normal")  # fmt: skip


def _fit(text: str, width: int) -> str:
    """Text of at most `width` characters; an ellipsis replaces its middle if it is longer."""
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[-(width - 1 - left) :]}"
