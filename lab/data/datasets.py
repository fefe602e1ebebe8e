"""A dataset name or a folder in; three splits, class names and channel statistics out.

`load_data` is the function to read first. `sources.py` finds the images, and `splits.py` divides
them. The official test split is kept for the end. Nothing here is augmented: `augment.py` does that
when batches are made.
"""

import glob
import hashlib
import json
import os
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lab.core import UserError
from lab.data import cache
from lab.data.images import EXTENSIONS, Reading, abbreviate, list_images, printable
from lab.data.preprocess import Preprocess, luma
from lab.data.sources import (
    DATASETS,
    Source,
    folder_of,
    largest_side,
    load_digits,
    load_folder,
    load_mnist_5k,
    load_pets,
    load_torchvision,
    native_size,
)
from lab.data.splits import (
    SPLIT_SEED,
    Split,
    channel_statistics,
    chunk_size,
    full_split,
    missing_classes,
    stratified_split,
)

_TEST_FRACTION = 0.2  # of data that has no test split


@dataclass(frozen=True)
class Dataset:
    """Three splits of one dataset. `mean` and `std` are per channel, for pixels in [0, 1]."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    mean: list[float]
    std: list[float]
    remarks: list[str]  # what the user should know: skipped files, unofficial sizes
    train_fraction: float = 1.0  # of the training images in use, see `subsample`

    @property
    def run_name(self) -> str:
        """The dataset's part of a run's name, with the fraction of the training images if not 1."""
        return self.name if self.train_fraction == 1 else f"{self.name}-of{self.train_fraction:g}"

    @property
    def channels(self) -> int:
        return self.train.store.shape[1]

    def describe(self) -> str:
        """Name, sizes and remarks, for the terminal."""
        sizes = f"{len(self.train)} training, {len(self.val)} validation, {len(self.test)} test"
        lines = [f"{self.name}: {sizes} images of {len(self.classes)} classes"]
        return "\n".join(lines + [f"  note: {remark}" for remark in self.remarks])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all pixels, labels and class names; it reads the whole dataset."""
        digest = hashlib.blake2b(json.dumps(self.classes).encode(), digest_size=8)
        for split in (self.train, self.val, self.test):
            digest.update(split.labels.numpy())
            n = chunk_size(split, 4096)  # the images may be on disk and exceed the memory
            for i in range(0, len(split), n):
                digest.update(split.images(slice(i, i + n)).numpy())
        return digest.hexdigest()

    def summary(self) -> dict:
        """Name, sizes and fingerprint, for a run's records."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {
            "name": self.name,
            **{name: len(split) for name, split in splits.items()},
            "train_images": len(self.train.rows.unique()),
            "train_fraction": self.train_fraction,
            "classes": self.classes,
            "pixels": list(self.train.store.shape[1:]),
            "mean": [round(m, 4) for m in self.mean],
            "std": [round(s, 4) for s in self.std],
            "fingerprint": self.fingerprint,
            "remarks": self.remarks,
        }


def load_data(
    dataset: str,
    data_dir: str = "data",
    size: int = 256,
    val_fraction: float = 0.1,
    skip_unreadable: bool = False,
    interpolation: str = "bicubic",
    crop_size: int = 0,
) -> Dataset:
    """Loads a dataset; downloads it the first time if necessary.

    Args:
        dataset: one of DATASETS, or the path of an image folder with `train/<class>/*` and,
            optionally, `val/` and `test/` with the same classes, or only with `<class>/*`.
        data_dir: where downloads are stored.
        size: pixels: photographs are stored as squares of this size; small images stay as they are,
            and a folder of small and larger images is stored at the size of the largest, up to
            this size.
        val_fraction: fraction of each class's training images used for validation.
        skip_unreadable: skip images that cannot be read, and list them.
        interpolation: bicubic or bilinear, for resizing photographs.
        crop_size: also store whole training photographs, as squares of this size, for random
            resized crops (see `Augmentation.crop_size`); 0: do not.

    Raises: UserError for data that is missing, damaged or too small.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"VAL_FRACTION={val_fraction} must be between 0 and 1, such as 0.1")
    data_dir = os.path.expanduser(data_dir)
    native = native_size(dataset)
    stored = native or size
    if native and native < (size or 0) and dataset not in DATASETS:
        # Larger images among the small ones keep the detail that the model can use.
        stored = max(native, min(size, largest_side(dataset)))
    reading = Reading(stored, interpolation, skip_unreadable=skip_unreadable)
    if dataset == "mnist-5k":
        source: Source = load_mnist_5k()
    elif dataset == "digits":
        source = load_digits()
    elif dataset == "pets":
        source = load_pets(data_dir, reading, crop_size)
    elif dataset in DATASETS:
        source = load_torchvision(dataset, data_dir)
    else:
        source = load_folder(folder_of(dataset), reading, 0 if native else crop_size)

    classes, splits, remarks = source.classes, source.splits, source.remarks
    if missing := missing_classes(splits["train"], classes):
        raise UserError(
            f"no training image of {abbreviate(missing)} could be read: repair the images or "
            "remove the class"
        )
    # Test first, so that it does not depend on the size of the validation split.
    for split, fraction in (("test", _TEST_FRACTION), ("val", val_fraction)):
        if split not in splits:
            splits["train"], splits[split] = stratified_split(splits["train"], fraction, classes)
        elif len(splits[split]) == 0:
            raise UserError(f"no {split} image of {dataset} could be read: repair the images")
        elif missing := missing_classes(splits[split], classes):
            names = abbreviate(missing)
            remarks.append(f"no {split} images of {names}, so these are not evaluated")
    mean, std = channel_statistics(splits["train"])
    name = dataset if dataset in DATASETS else printable(Path(dataset).resolve().name)
    return Dataset(name, classes, **splits, mean=mean, std=std, remarks=remarks)


def load_images(
    images: str, data_dir: str, preprocess: Preprocess, is_dataset: bool = False
) -> Dataset:
    """Loads image files without labels, or a dataset.

    Args:
        images: a dataset's name or folder; or files, folders and patterns, see `image_files`.
        data_dir: where downloaded datasets are stored.
        preprocess: the model's preprocessing.
        is_dataset: `images` is a dataset even if it is a folder without train/.

    Returns: a dataset. For image files all splits are the same, and there are no labels or classes;
        color images are converted to grayscale for a grayscale model.
    Raises: UserError for image files that do not exist or cannot be read.
    """
    folder = Path(images).expanduser()
    if is_dataset or images in DATASETS or os.path.isdir(folder / "train"):
        return load_data(images, data_dir, preprocess.resized, skip_unreadable=True,
                         interpolation=preprocess.interpolation)  # fmt: skip
    paths = list(image_files(images))
    size = preprocess.resized
    pixels = np.empty((len(paths), 3, size, size), np.uint8)
    failures, _ = cache.decode_into(pixels, paths, preprocess.reading, "images")
    for number, reason in failures:
        raise UserError(f"IMAGES: {paths[number]} cannot be read: {reason}")
    names = [printable(path.name) for path in paths]
    store = torch.from_numpy(pixels)
    if len(preprocess.mean) == 1:
        store = torch.cat([luma(image).round().byte() for image in store.split(1)])
    split = full_split(store, torch.full((len(paths),), -1), names)
    name = folder.resolve().name if os.path.isdir(folder) else f"{len(paths)}-images"
    name = names[0] if len(paths) == 1 else printable(name)
    return Dataset(name, [], split, split, split, mean=[], std=[], remarks=[])


def image_files(source: str) -> dict[Path, Path]:
    """The image files that a list of files, folders and patterns names, in order.

    Hidden files, and files in hidden folders, are left out unless they are named themselves.

    Args:
        source: such as "cat.jpg photos holiday/*.jpg"; names that contain spaces are quoted.

    Returns: the path of each file -> the folder that was named, or else the file's own folder.
    Raises: UserError, for files that do not exist and folders without images.
    """
    try:
        places = [source] if _matches(source) else _split_words(source)
    except ValueError as error:  # an odd number of quotes
        raise UserError(f"IMAGES={source!r}: {error}; quote names that contain spaces") from error
    if not places:
        raise UserError("IMAGES is empty: name files, folders or patterns such as photos/*.jpg")
    found: dict[Path, Path] = {}
    for place in places:
        matches = _matches(place)
        if not matches and not glob.has_magic(place):
            raise UserError(
                f"IMAGES: {place!r} is not a file, a folder or a dataset "
                f"({', '.join(DATASETS)}); quote names that contain spaces"
            )
        files = {
            file: path if path.is_dir() else path.parent
            for path in matches
            for file in (list_images(path)[0] if path.is_dir() else [path])
        }
        if not files:
            kinds = " ".join(sorted(EXTENSIONS))
            raise UserError(f"IMAGES: there are no images ({kinds}) in {place!r}")
        found |= {file: folder for file, folder in files.items() if file not in found}
    return found


def _split_words(text: str, windows: bool = os.name == "nt") -> list[str]:
    """Like shlex.split, but on Windows a backslash separates folders."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    if windows:
        words.escape = ""
    return list(words)


def _matches(place: str) -> list[Path]:
    """The file or folder of this name if there is one, or else all that match the pattern.

    A list of many files is too long for a name; `Path.exists` would then raise OSError.
    """
    path = Path(place).expanduser()
    if os.path.exists(path):
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]


def dataset_kind(dataset: str) -> Literal["mnist-5k", "digits", "small", "photographs"]:
    """The kind of images in a dataset, which selects a recipe.

    `mnist` is the full version of `mnist-5k`. Handwritten digits have their own kinds, because
    flips and strong augmentation would change their class.
    """
    if dataset in ("mnist-5k", "mnist"):
        return "mnist-5k"
    if dataset == "digits":
        return "digits"
    return "small" if native_size(dataset) else "photographs"


def same_dataset(one: str, other: str | None) -> bool:
    """Whether two names of datasets or folders, if any, mean the same data."""
    return other is not None and canonical_name(one) == canonical_name(other)


def canonical_name(dataset: str) -> str:
    """One name for every way to write a dataset, for a run's identity.

    A folder becomes its absolute path with symbolic links resolved, so `my pets`, `my pets/` and
    `../x/my pets` are the same dataset. Names of datasets, and what does not exist, stay as they
    are.
    """
    root = Path(dataset).expanduser()
    return str(root.resolve()) if dataset not in DATASETS and os.path.isdir(root) else dataset


def subsample(data: Dataset, fraction: float) -> Dataset:
    """The dataset with a fixed fraction of each class's training images, at least one per class.

    Larger fractions contain the images of smaller ones. The images are repeated up to the original
    number, so an epoch keeps its number of steps: runs with different fractions then differ in
    their images, not in how long they are trained. Validation and test images stay the same.

    Raises: UserError for a fraction that is not greater than 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"TRAIN_FRACTION={fraction} must be greater than 0 and at most 1, such as 0.1"
        )
    if fraction == 1:
        return data
    rng = np.random.default_rng(SPLIT_SEED)
    labels = data.train.labels.numpy()
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(len(data.classes)):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(fraction * len(members)))]] = True
    few = rng.permutation(np.flatnonzero(chosen))  # shuffled: the last repetition may be cut short
    mean, std = channel_statistics(data.train.select(torch.from_numpy(few)))
    train = data.train.select(torch.from_numpy(np.resize(few, len(labels))))
    remark = f"{len(few):,} of {len(labels):,} training images, repeated to fill an epoch"
    return replace(data, train=train, mean=mean, std=std, remarks=[*data.remarks, remark],
                   train_fraction=fraction)  # fmt: skip
