"""A dataset: a name or a folder in; three splits, class names and channel statistics out.

Validation is always carved out of training, stratified, with a seed of its own that no run
changes; the official test split is kept for the end. Nothing here is augmented: that is
lab/augment.py, when batches are made.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lab import sources
from lab.errors import UserError
from lab.images import Reading, printable, some
from lab.sources import Split

SPLIT_SEED = 2024  # of the validation split, and of the test split of data that has none
TEST_FRACTION = 0.2  # of data that has no test split
PIECE = 64 * 3 * 256**2  # bytes of pixels that are held at once where all are gone through


@dataclass(frozen=True)
class Dataset:
    """Three splits of one dataset. `mean` and `std`: of each channel, pixels counted in [0, 1]."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    mean: list[float]
    std: list[float]
    remarks: list[str]  # what a user should know: files left out, sizes that are not official
    train_fraction: float = 1.0  # share of the training images that is used, see `thin`

    @property
    def label(self) -> str:
        """The name in a run's: with the share of the training images, unless that is all."""
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
        """Of all pixels and labels, which it takes a while to read."""
        digest = hashlib.blake2b(digest_size=8)
        for split in (self.train, self.val, self.test):
            digest.update(split.labels.numpy())
            n = piece(split, 4096)  # the images may lie on disk, and be more than memory holds
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
) -> Dataset:
    """Loads a dataset, from the network once if it has to.

    Args:
        dataset: digits, cifar10, cifar100, fashion-mnist, pets, or the path of an image folder
            with `train/<class>/*`, and `val/` and `test/` like it or carved out of it.
        data_dir: where downloads go.
        size: side in pixels that photographs are kept at; small images stay as they are.
        val_fraction: share of each class's training images that becomes validation.
        skip_unreadable: go on without images that cannot be read, saying which.
        interpolation: bicubic or bilinear, for photographs brought to `size`.

    Raises: UserError, for data that is missing, broken, or smaller than it looks.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"VAL_FRACTION={val_fraction} must lie between 0 and 1, such as 0.1")
    data_dir = os.path.expanduser(data_dir)
    size = sources.native_size(dataset) or size
    reading = Reading(size, interpolation, skip_unreadable)
    if dataset == "digits":
        source = sources.digits()
    elif dataset == "pets":
        source = sources.pets(data_dir, reading)
    elif dataset in sources.DATASETS:
        source = sources.downloaded(dataset, data_dir)
    else:
        source = sources.folder(sources.folder_of(dataset), reading)

    classes, splits, remarks = source.classes, source.splits, source.remarks
    if lost := absent(splits["train"], classes):
        raise UserError(
            f"no training image of {some(lost)} could be read: mend them, or remove the class"
        )
    # Test first: what it holds must not depend on the share that validation takes.
    for split, share in (("test", TEST_FRACTION), ("val", val_fraction)):
        if split not in splits:
            splits["train"], splits[split] = carve(splits["train"], share, classes)
        elif len(splits[split]) == 0:
            raise UserError(f"no {split} image of {dataset} could be read: mend them")
        elif lost := absent(splits[split], classes):
            remarks.append(f"no {split} images of {some(lost)}: not scored there")
    mean, std = channel_statistics(splits["train"])
    name = dataset if dataset in sources.DATASETS else printable(Path(dataset).resolve().name)
    return Dataset(name, classes, **splits, mean=mean, std=std, remarks=remarks)


def thin(data: Dataset, share: float) -> Dataset:
    """The dataset with a share of each class's training images, at least one; a fixed choice.

    A larger share holds the images of a smaller one. They are repeated up to the old number, so
    that an epoch keeps its steps: runs on different shares then differ in their images, not in how
    long they were trained. Validation and test stay whole.

    Raises: UserError, for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"TRAIN_FRACTION={share} must lie above 0 and be at most 1, such as 0.1")
    if share == 1:
        return data
    rng = np.random.default_rng(SPLIT_SEED)
    labels = data.train.labels.numpy()
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(len(data.classes)):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(share * len(members)))]] = True
    few = rng.permutation(np.flatnonzero(chosen))  # in disorder: the last repetition is cut short
    mean, std = channel_statistics(data.train.take(torch.from_numpy(few)))
    train = data.train.take(torch.from_numpy(np.resize(few, len(labels))))
    remark = f"{len(few):,} of {len(labels):,} training images, repeated to as many an epoch"
    return replace(data, train=train, mean=mean, std=std, remarks=[*data.remarks, remark],
                   train_fraction=share)  # fmt: skip


def absent(split: Split, classes: list[str]) -> list[str]:
    """The classes of which a split has no image."""
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def carve(split: Split, share: float, classes: list[str]) -> tuple[Split, Split]:
    """Splits off a fixed random `share` of every class; both parts get at least one image of each.

    Raises: UserError, naming the classes that have a single image.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    labels = split.labels.numpy()
    away = np.zeros(len(labels), dtype=bool)
    lone = []
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(share * len(members))
        away[members[: min(max(1, count), len(members) - 1)]] = True
        lone += [name] if len(members) == 1 else []
    if lone:
        raise UserError(
            f"one training image left of {some(lone)}: too few to set one aside for validation or "
            "test. Each class needs 3 images, or 2 where test/ or val/ is given. Add some, or "
            "remove the class."
        )
    mask = torch.from_numpy(away)
    return split.take(~mask), split.take(mask)


def piece(split: Split, most: int) -> int:
    """How many images of a split to hold at once: `most`, or fewer where they are large."""
    return max(1, min(most, PIECE // split.store[0].nbytes))


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel in [0, 1], over up to 10,000 images evenly spread."""
    sample = torch.arange(0, len(split), -(-len(split) // 10_000))
    counts = torch.zeros(split.store.shape[1], 256, dtype=torch.float64)  # of each byte's value
    for part in sample.split(piece(split, 64)):
        for channel, pixels in enumerate(split.images(part).transpose(0, 1)):
            counts[channel] += pixels.reshape(-1).bincount(minlength=256)
    shares, values = counts / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    square = (values - mean[:, None]).square()
    std = (shares * square).sum(1).clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()
