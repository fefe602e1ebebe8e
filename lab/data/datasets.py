"""Where images come from: scikit-learn, torchvision's downloads, or a folder of the user's own.

A dataset: a name or a folder in; three splits, class names and channel statistics out.

Validation is always carved out of training, stratified, with a seed of its own that no run
changes; the official test split is kept for the end. Nothing here is augmented: that is
lab/data/augment.py, when batches are made.
"""

import hashlib
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab.core import UserError
from lab.data import cache, images
from lab.data.images import Reading, abbreviate, printable

NATIVE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "pets": None}
DATASETS = tuple(NATIVE_SIZES)
SMALL = 64  # pixels: up to here images are kept at their own size, above they are photographs
OFFICIAL_PETS = {"trainval": 3680, "test": 3669}
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Images with labels; `rows` picks them from a store that may be larger and lie on disk.

    store: uint8 (M, C, H, W); rows: int64 (N,), indices into it; labels: int64 (N,); names: N.
    ask: of a store on disk: has its images of some indices read in advance.
    """

    store: Tensor
    rows: Tensor
    labels: Tensor
    names: list[str]
    ask: Callable[[list[int]], None] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | slice) -> Tensor:
        """Some images of the split, uint8 (n, C, H, W)."""
        rows = self.ahead(indices)
        return self.store[rows]

    def ahead(self, indices: Tensor | slice) -> Tensor:
        """The rows of some images, which a store on disk begins to read."""
        rows = self.rows[indices]
        if self.ask:
            self.ask(rows.reshape(-1).tolist())
        return rows

    def take(self, keep: Tensor) -> "Split":
        """The split of some images, a mask (N,) or indices (n,); it shares the store."""
        names = [self.names[i] for i in torch.arange(len(self))[keep].tolist()]
        return replace(self, rows=self.rows[keep], labels=self.labels[keep], names=names)


def full_split(store: Tensor, labels: Tensor, names: list[str]) -> Split:
    return Split(store, torch.arange(len(store)), labels, names)


@dataclass
class Source:
    """What a source gives: class names, some of the splits train, val and test, and remarks."""

    classes: list[str]
    splits: dict[str, Split] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add_photographs(
        self, root: Path, split: str, labelled: list[tuple[Path, int]], reading: Reading
    ) -> None:
        """Adds a split of paths below `root` and their labels, decoded, or mapped from a cache."""
        if not labelled:
            raise UserError(f"{split} of {root} holds no images: fill it, or remove its folder")
        paths = [path for path, _ in labelled]
        labels = torch.tensor([label for _, label in labelled])
        place = root / "vit-lab-cache" / f"{split}-{reading.size}-{reading.interpolation}"
        array, kept, remarks = cache.decode(paths, reading, place)
        names = [images.printable(paths[i].relative_to(root).as_posix()) for i in kept]
        rows = torch.tensor(kept, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a map to read alone: nobody writes here
            store = torch.from_numpy(array)
        ask = partial(cache.prefetch, array)
        self.splits[split] = Split(store, rows, labels[rows], names, ask)
        self.remarks += remarks


def native_size(dataset: str) -> int | None:
    """The side in pixels of a dataset of small images; None for photographs of any size.

    A folder counts as small when the typical shorter side of its images is at most SMALL; the
    side is then rounded up to a multiple of 4, for patches of 4.
    """
    if dataset in NATIVE_SIZES:
        return NATIVE_SIZES[dataset]
    found, _ = images.find_images(folder_of(dataset) / "train")
    sides = []
    for path in [path for paths in found.values() for path in paths[:3]][:100]:
        try:
            with Image.open(path) as image:  # reads the header alone
                sides.append(min(image.size))
        except Exception:  # Pillow raises many kinds; loading names it
            continue
    side = int(np.median(sides)) if sides else SMALL + 1
    return None if side > SMALL else -(-side // 4) * 4


def dataset_kind(dataset: str) -> Literal["digits", "small", "photographs"]:
    """What sort of images a dataset has, for recipes."""
    if dataset == "digits":
        return "digits"
    return "small" if native_size(dataset) else "photographs"


def folder_of(dataset: str) -> Path:
    """The folder that a dataset's name stands for.

    Raises: UserError, if there is none or it has no `train/`.
    """
    root = Path(dataset).expanduser()
    if not root.is_dir():
        raise UserError(
            f"DATASET={dataset!r} is neither a folder nor one of {', '.join(DATASETS)}. A folder "
            "of images needs train/<class>/*.jpg, and may have val/ and test/ like it."
        )
    if not (root / "train").is_dir():
        found = (
            images.abbreviate(sorted(f"{p.name}/" for p in root.iterdir() if p.is_dir()))
            or "nothing"
        )
        raise UserError(
            f"{root} has no folder train/ (it holds {found}). Put the images at "
            f"{root / 'train'}/<class>/*.jpg, one folder a class."
        )
    return root


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in 17 grays; they have no splits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    store = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    names = [str(i) for i in range(len(store))]
    split = full_split(store, torch.from_numpy(bunch.target).long(), names)
    return Source([str(c) for c in bunch.target_names], {"train": split})


def downloaded(dataset: str, data_dir: str) -> Source:
    """CIFAR-10, CIFAR-100 or Fashion-MNIST by torchvision, checksums verified."""
    from torchvision import datasets

    if dataset == "fashion-mnist":
        kind = datasets.FashionMNIST
        place = Path(data_dir, "FashionMNIST", "raw")
        urls = [f"{kind.mirrors[0]}{name}" for name, _ in kind.resources]
    else:
        kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100
        place, urls = Path(data_dir), [kind.url]
    splits = {}
    for split in ("train", "test"):
        data = download(partial(kind, data_dir, split == "train", download=True), urls, place)
        store = torch.as_tensor(data.data)
        store = store[:, None] if store.ndim == 3 else store.permute(0, 3, 1, 2).contiguous()
        names = [f"{split}/{i}" for i in range(len(store))]
        splits[split] = full_split(store, torch.as_tensor(data.targets), names)
    return Source(list(data.classes), splits)


def pets(data_dir: str, reading: Reading) -> Source:
    """Oxford-IIIT Pet by torchvision, official split: 37 breeds, 3,680 to train, 3,669 to test."""
    from torchvision.datasets import OxfordIIITPet

    base = Path(data_dir, "oxford-iiit-pet")
    urls = [url for url, _ in OxfordIIITPet._RESOURCES]
    source = Source([])
    for split, theirs in (("train", "trainval"), ("test", "test")):
        data = download(partial(OxfordIIITPet, data_dir, theirs, download=True), urls, base)
        if lost := [path.name for path in data._images if not path.exists()]:
            raise UserError(
                f"{len(lost)} images are missing from {base / 'images'}, as after an interrupted "
                f"download: {images.abbreviate(lost)}. Delete that folder and run again: the "
                "archive beside it is unpacked again, or downloaded if there is none."
            )
        if len(data) != OFFICIAL_PETS[theirs]:
            source.remarks.append(
                f"not the official Pets: {len(data)} {theirs} images, not {OFFICIAL_PETS[theirs]}"
            )
        source.classes = source.classes or list(data.classes)
        if (last := max(data._labels, default=-1)) >= len(source.classes):
            raise UserError(
                f"{base / 'annotations' / theirs}.txt has a breed {last + 1}, but trainval.txt "
                f"names {len(source.classes)}: number them from 1, without gaps"
            )
        labelled = list(zip(data._images, data._labels, strict=True))
        source.add_photographs(base, split, labelled, reading)
    return source


def folder(root: Path, reading: Reading) -> Source:
    """`root/{train,val,test}/<class>/**`; val and test are optional, classes are those of train."""
    source = Source([])
    for split in ("train", "val", "test"):
        if not (root / split).is_dir():
            source.remarks.append(f"no folder {split}/: a fixed share of train/ takes its place")
            continue
        found, others = images.find_images(root / split)
        if others:
            names = images.abbreviate([str(p.relative_to(root)) for p in others])
            source.remarks.append(
                f"{len(others)} files left out (no images, or outside the class folders): {names}"
            )
        if split == "train":
            source.classes = list(found)
            if len(found) < 2:
                raise UserError(
                    f"{root / split} has {len(found)} class folders "
                    f"({images.abbreviate(list(found))})"
                    "; a classifier needs two or more, each with its images"
                )
            if empty := [name for name in found if not found[name]]:
                raise UserError(
                    f"no images in {root / split} for the classes {images.abbreviate(empty)}: add "
                    f"some ({' '.join(sorted(images.EXTENSIONS))}) or remove the empty folders"
                )
        if strange := [name for name in found if found[name] and name not in source.classes]:
            raise UserError(
                f"{root / split} has classes that train/ has not: {images.abbreviate(strange)}. A "
                "model can't learn them: add them to train/ or take them away."
            )
        labelled = [(p, i) for i, name in enumerate(source.classes) for p in found.get(name, [])]
        source.add_photographs(root, split, labelled, reading)
    source.classes = [images.printable(name) for name in source.classes]
    return source


def download(construct: Callable[[], T], urls: list[str], place: Path) -> T:
    """Calls torchvision, which downloads and verifies; says what to do by hand if it cannot."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return construct()
    except Exception as error:  # no network, a bad checksum, a file cut short: each its own kind
        listed = "\n  ".join(urls)
        raise UserError(
            f"the data in {place} is missing or incomplete, and downloading failed: "
            f"{str(error) or repr(error)}\nFetch by hand:\n  {listed}\n"
            f"put that into {place.resolve()}, packed as it is, delete what is unpacked there, "
            "and run again.\nA run that needs no download: python train.py --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


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
    train_fraction: float = 1.0  # share of the training images that is used, see `subsample`

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
            n = chunk_size(split, 4096)  # the images may lie on disk, and be more than memory holds
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
    size = native_size(dataset) or size
    reading = Reading(size, interpolation, skip_unreadable)
    if dataset == "digits":
        source = digits()
    elif dataset == "pets":
        source = pets(data_dir, reading)
    elif dataset in DATASETS:
        source = downloaded(dataset, data_dir)
    else:
        source = folder(folder_of(dataset), reading)

    classes, splits, remarks = source.classes, source.splits, source.remarks
    if lost := missing_classes(splits["train"], classes):
        raise UserError(
            f"no training image of {abbreviate(lost)} could be read: mend them, or remove the class"
        )
    # Test first: what it holds must not depend on the share that validation takes.
    for split, share in (("test", TEST_FRACTION), ("val", val_fraction)):
        if split not in splits:
            splits["train"], splits[split] = stratified_split(splits["train"], share, classes)
        elif len(splits[split]) == 0:
            raise UserError(f"no {split} image of {dataset} could be read: mend them")
        elif lost := missing_classes(splits[split], classes):
            remarks.append(f"no {split} images of {abbreviate(lost)}: not scored there")
    mean, std = channel_statistics(splits["train"])
    name = dataset if dataset in DATASETS else printable(Path(dataset).resolve().name)
    return Dataset(name, classes, **splits, mean=mean, std=std, remarks=remarks)


def subsample(data: Dataset, share: float) -> Dataset:
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


def missing_classes(split: Split, classes: list[str]) -> list[str]:
    """The classes of which a split has no image."""
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def stratified_split(split: Split, share: float, classes: list[str]) -> tuple[Split, Split]:
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
            f"one training image left of {abbreviate(lone)}: too few to set one aside for "
            "validation or test. Each class needs 3 images, or 2 where test/ or val/ is given. "
            "Add some, or remove the class."
        )
    mask = torch.from_numpy(away)
    return split.take(~mask), split.take(mask)


def chunk_size(split: Split, most: int) -> int:
    """How many images of a split to hold at once: `most`, or fewer where they are large."""
    return max(1, min(most, PIECE // split.store[0].nbytes))


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel in [0, 1], over up to 10,000 images evenly spread."""
    sample = torch.arange(0, len(split), -(-len(split) // 10_000))
    counts = torch.zeros(split.store.shape[1], 256, dtype=torch.float64)  # of each byte's value
    for part in sample.split(chunk_size(split, 64)):
        for channel, pixels in enumerate(split.images(part).transpose(0, 1)):
            counts[channel] += pixels.reshape(-1).bincount(minlength=256)
    shares, values = counts / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    square = (values - mean[:, None]).square()
    std = (shares * square).sum(1).clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()
