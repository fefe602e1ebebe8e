"""A dataset name or a folder in; three splits, class names and channel statistics out.

`load_data` is the function to read first. Data comes from this folder (mnist-5k), scikit-learn
(digits), torchvision's downloads, or a folder of the user's own images.

Validation is always a fixed stratified part of the training split; no seed of a run changes it. The
official test split is kept for the end. Nothing here is augmented: lab/data/augment.py does that
when batches are made.
"""

import difflib
import hashlib
import json
import os
import shlex
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from lab.core import UserError
from lab.data import cache
from lab.data.images import (
    CACHE_FOLDER,
    EXTENSIONS,
    Reading,
    abbreviate,
    find_images,
    open_image,
    printable,
    read_image,
)
from lab.data.preprocess import Preprocess

_NATIVE_SIZES = {"mnist-5k": 28, "digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32,
                 "cifar100": 32, "pets": None}  # fmt: skip
DATASETS = tuple(_NATIVE_SIZES)
MAX_SMALL_SIDE = (
    64  # pixels: images up to this size keep their own size; larger ones are photographs
)
OFFICIAL_PETS = {"trainval": 3680, "test": 3669}  # images in the official splits
_SPLIT_SEED = 2024  # of the validation split, and of the test split of data that has none
_MAX_CROPPED = 0.26  # warn if a center crop removes a larger fraction; 4:3 photos lose 0.25
_TEST_FRACTION = 0.2  # of data that has no test split
CHUNK_BYTES = 64 * 3 * 256**2  # pixels held at once when a whole split is read
_T = TypeVar("_T")


# --- Splits and datasets ---


@dataclass(frozen=True)
class Split:
    """Labeled images: `rows` selects them from a store, which may be larger and lie on disk.

    Args:
        store: uint8 (M, C, H, W).
        rows: int64 (N,), indices into the store.
        labels: int64 (N,).
        names: of the N images.
        read_ahead: for a store on disk, starts to read the given rows in the background.
        whole: for training photographs, the same images for random resized crops: larger, and
            resized to squares without keeping the aspect ratio, instead of center-cropped.
        aspect_ratios: width / height of the originals, (M,), if the store has whole images.
        unreadable: skipped files, with the reasons; after a split, both parts list all of them.
    """

    store: Tensor
    rows: Tensor
    labels: Tensor
    names: list[str]
    read_ahead: Callable[[list[int]], None] | None = None
    whole: "Split | None" = None
    aspect_ratios: Tensor | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | slice) -> Tensor:
        """Some images of the split, uint8 (n, C, H, W)."""
        self.prefetch(indices)
        return self.store[self.rows[indices]]

    def prefetch(self, indices: Tensor | slice) -> None:
        """Starts to read some images in the background if the store is on disk."""
        if self.read_ahead:
            self.read_ahead(self.rows[indices].reshape(-1).tolist())

    def select(self, keep: Tensor) -> "Split":
        """The split of some images, given by a mask (N,) or indices (n,); it shares the store."""
        names = [self.names[i] for i in torch.arange(len(self))[keep].tolist()]
        whole = self.whole and self.whole.select(keep)
        return replace(
            self, rows=self.rows[keep], labels=self.labels[keep], names=names, whole=whole
        )


def full_split(store: Tensor, labels: Tensor, names: list[str]) -> Split:
    """The split of all images of a store."""
    return Split(store, torch.arange(len(store)), labels, names)


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
            n = _chunk_size(split, 4096)  # the images may be on disk and exceed the memory
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


# --- From a name or a folder to a dataset ---


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
        size: pixels: photographs are stored as squares of this size; small images stay as they are.
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
    size = native_size(dataset) or size
    reading = Reading(size, interpolation, skip_unreadable=skip_unreadable)
    if dataset == "mnist-5k":
        source = load_mnist_5k()
    elif dataset == "digits":
        source = load_digits()
    elif dataset == "pets":
        source = _load_pets(data_dir, reading, crop_size)
    elif dataset in DATASETS:
        source = _load_torchvision(dataset, data_dir)
    else:
        crop_size = 0 if native_size(dataset) else crop_size
        source = _load_folder(_folder_of(dataset), reading, crop_size)

    classes, splits, remarks = source.classes, source.splits, source.remarks
    if missing := _missing_classes(splits["train"], classes):
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
        elif missing := _missing_classes(splits[split], classes):
            remarks.append(f"no {split} images of {abbreviate(missing)}: not evaluated there")
    mean, std = channel_statistics(splits["train"])
    name = dataset if dataset in DATASETS else printable(Path(dataset).resolve().name)
    return Dataset(name, classes, **splits, mean=mean, std=std, remarks=remarks)


def load_images(images: str, data_dir: str, preprocess: Preprocess) -> Dataset:
    """Loads image files without labels, or a dataset.

    Args:
        images: a dataset's name or folder, or image files and folders, separated by spaces; names
            that contain spaces are quoted.
        data_dir: where downloaded datasets are stored.
        preprocess: the model's preprocessing.

    Returns: a dataset. For image files all splits are the same, and there are no labels or classes.
    Raises: UserError for images that do not exist or cannot be read.
    """
    if images in DATASETS or (Path(images).expanduser() / "train").is_dir():
        size, interpolation = preprocess.resized, preprocess.interpolation
        return load_data(images, data_dir, size, interpolation=interpolation)
    sources = [images] if Path(images).expanduser().exists() else shlex.split(images)
    paths = [path for source in sources for path in _image_paths(Path(source).expanduser())]
    reading = Reading(preprocess.resized, preprocess.interpolation)
    pixels = np.ascontiguousarray([_read_or_explain(path, reading) for path in paths])
    names = [printable(path.name) for path in paths]
    split = full_split(torch.from_numpy(pixels), torch.full((len(paths),), -1), names)
    name = printable(Path(sources[0]).name) if len(sources) == 1 else f"{len(paths)}-images"
    return Dataset(name, [], split, split, split, mean=[], std=[], remarks=[])


def native_size(dataset: str) -> int | None:
    """The side in pixels of a dataset of small images; None for photographs of any size.

    A folder counts as small if the median shorter side of its images is at most MAX_SMALL_SIDE; the
    side is then rounded up to a multiple of 4, so that patches of 4 pixels fit.
    """
    if dataset in _NATIVE_SIZES:
        return _NATIVE_SIZES[dataset]
    found, _ = find_images(_train_folder(_folder_of(dataset)))
    sides = [min(size) for size in _sample_sizes(found)]
    side = int(np.median(sides)) if sides else MAX_SMALL_SIDE + 1
    return None if side > MAX_SMALL_SIDE else -(-side // 4) * 4


def _sample_sizes(found: dict[str, list[Path]]) -> list[tuple[int, int]]:
    """Width and height of up to 100 images, from all classes."""
    sizes = []
    for path in [path for paths in found.values() for path in paths[:3]][:100]:
        try:
            with open_image(path) as image:  # reads only the header
                sizes.append(image.size)
        except Exception:  # Pillow raises many exception types; loading reports the image
            continue
    return sizes


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


def canonical_name(dataset: str) -> str:
    """One name for every way to write a dataset, for a run's identity.

    A folder becomes its absolute path with symbolic links resolved, so `my pets`, `my pets/` and
    `../x/my pets` are the same dataset. Names of datasets, and what does not exist, stay as they
    are.
    """
    root = Path(dataset).expanduser()
    return str(root.resolve()) if dataset not in DATASETS and _is_folder(root) else dataset


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
    rng = np.random.default_rng(_SPLIT_SEED)
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


def stratified_split(split: Split, fraction: float, classes: list[str]) -> tuple[Split, Split]:
    """Moves a fixed random `fraction` of every class to a second split.

    Both splits contain at least one image of each class.

    Raises: UserError that names the classes with a single image.
    """
    rng = np.random.default_rng(_SPLIT_SEED)
    labels = split.labels.numpy()
    moved = np.zeros(len(labels), dtype=bool)
    too_small = []
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        moved[members[: min(max(1, count), len(members) - 1)]] = True
        too_small += [name] if len(members) == 1 else []
    if too_small:
        raise UserError(
            "these classes have only one training image left, so none can be used for validation "
            f"or test: {abbreviate(too_small)}. Each class needs 3 images, or 2 if there is a "
            "folder test/ or val/. Add some, or remove the class."
        )
    mask = torch.from_numpy(moved)
    return split.select(~mask), split.select(mask)


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], of up to 10,000 evenly spaced images."""
    sample = torch.arange(0, len(split), -(-len(split) // 10_000))
    counts = torch.zeros(split.store.shape[1], 256, dtype=torch.float64)  # histogram per channel
    for part in sample.split(_chunk_size(split, 64)):
        for channel, pixels in enumerate(split.images(part).transpose(0, 1)):
            counts[channel] += pixels.reshape(-1).bincount(minlength=256)
    weights, values = counts / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    square = (values - mean[:, None]).square()
    std = (weights * square).sum(1).clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()


def _chunk_size(split: Split, limit: int) -> int:
    """How many images of a split to hold at once: `limit`, or fewer if they are large."""
    return max(1, min(limit, CHUNK_BYTES // split.store[0].nbytes))


def _missing_classes(split: Split, classes: list[str]) -> list[str]:
    """The classes without images in a split."""
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


# --- Where the images come from ---


@dataclass
class Source:
    """Class names, some of the splits train, val and test, and remarks for the user."""

    classes: list[str]
    splits: dict[str, Split] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add_photographs(
        self,
        root: Path,
        split: str,
        labeled: list[tuple[Path, int]],
        reading: Reading,
        crop_size: int = 0,
    ) -> None:
        """Adds a split from paths below `root` and their labels, decoded or from the cache.

        With `crop_size`, the training split gets its `whole` images, too.
        """
        if not labeled:
            raise UserError(f"{root / split} contains no images: add some, or remove the folder")
        paths = [path for path, _ in labeled]
        labels = torch.tensor([label for _, label in labeled])
        kind = "whole" if reading.whole else reading.interpolation
        cache_path = root / CACHE_FOLDER / f"{split}-{reading.size}-{kind}"
        decoded = cache.decode(paths, reading, cache_path)
        all_names = [printable(path.relative_to(root).as_posix()) for path in paths]
        readable = [i for i in range(len(paths)) if i not in decoded.failures]
        rows = torch.tensor(readable, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only and never written
            store = torch.from_numpy(decoded.array)
        aspect_ratios = None
        if reading.whole:
            aspect_ratios = torch.tensor([width / height for width, height in decoded.sizes])
        whole = None
        if crop_size and split == "train":
            self.add_photographs(root, split, labeled, replace(reading, size=crop_size, whole=True))
            whole = self.splits[split]
        else:
            self.remarks += decoded.remarks
        self.splits[split] = Split(
            store,
            rows,
            labels[rows],
            [all_names[i] for i in readable],
            read_ahead=partial(cache.prefetch, decoded.array),
            whole=whole,
            aspect_ratios=aspect_ratios,
            unreadable={all_names[i]: reason for i, reason in decoded.failures.items()},
        )


def load_mnist_5k() -> Source:
    """5,000 MNIST images, 500 per digit, 28 x 28 pixels; no test split.

    The file is in the repository. Its source and license are in lab/data/make_mnist_5k.py.
    """
    with np.load(Path(__file__).with_name("mnist_5k.npz")) as arrays:
        store, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    names = [str(i) for i in range(len(store))]
    split = full_split(store[:, None], labels.long(), names)
    return Source([str(digit) for digit in range(10)], {"train": split})


def load_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels with 17 gray levels; no test split."""
    # `sklearn.datasets.load_digits` reads the same file, but importing it, with scipy and pandas,
    # takes longer than everything else before the first step. `find_spec` imports nothing.
    package = Path(find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # (N, 65)
    pixels, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1]
    store = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8))
    names = [str(i) for i in range(len(store))]
    split = full_split(store, torch.from_numpy(labels).long(), names)
    return Source([str(digit) for digit in range(10)], {"train": split})


def _load_torchvision(dataset: str, data_dir: str) -> Source:
    """(Fashion-)MNIST, CIFAR-10 or CIFAR-100 through torchvision, which verifies checksums."""
    from torchvision import datasets

    if dataset in ("mnist", "fashion-mnist"):
        kind = datasets.MNIST if dataset == "mnist" else datasets.FashionMNIST
        place = Path(data_dir, kind.__name__, "raw")
        urls = [f"{kind.mirrors[0]}{name}" for name, _ in kind.resources]
    else:
        kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100
        place, urls = Path(data_dir), [kind.url]
    splits = {}
    for split in ("train", "test"):
        data = _download(partial(kind, data_dir, split == "train", download=True), urls, place)
        store = torch.as_tensor(data.data)
        store = store[:, None] if store.ndim == 3 else store.permute(0, 3, 1, 2).contiguous()
        names = [f"{split}/{i}" for i in range(len(store))]
        splits[split] = full_split(store, torch.as_tensor(data.targets), names)
    # torchvision calls the classes of MNIST "0 - zero" and so on.
    return Source([c[0] if dataset == "mnist" else c for c in data.classes], splits)


def _load_pets(data_dir: str, reading: Reading, crop_size: int) -> Source:
    """Oxford-IIIT Pet through torchvision: 37 breeds, 3,680 training and 3,669 test images."""
    from torchvision.datasets import OxfordIIITPet

    base = Path(data_dir, "oxford-iiit-pet")
    urls = [url for url, _ in OxfordIIITPet._RESOURCES]
    source = Source([])
    for split, official in (("train", "trainval"), ("test", "test")):
        data = _download(partial(OxfordIIITPet, data_dir, official, download=True), urls, base)
        if missing := [path.name for path in data._images if not path.exists()]:
            raise UserError(
                f"{len(missing)} images are missing from {base / 'images'}, probably because a "
                f"download was interrupted: {abbreviate(missing)}. Delete that folder and run "
                "again: the archive next to it is then unpacked again, or downloaded if there is "
                "none."
            )
        if len(data) != OFFICIAL_PETS[official]:
            source.remarks.append(
                f"not the official Pets: {len(data)} {official} images instead of "
                f"{OFFICIAL_PETS[official]}"
            )
        source.classes = source.classes or list(data.classes)
        if (last := max(data._labels, default=-1)) >= len(source.classes):
            raise UserError(
                f"{base / 'annotations' / official}.txt has breed {last + 1}, but trainval.txt "
                f"names only {len(source.classes)} breeds: number them from 1 without gaps"
            )
        labeled = list(zip(data._images, data._labels, strict=True))
        source.add_photographs(base, split, labeled, reading, crop_size)
    return source


def _download(construct: Callable[[], _T], urls: list[str], place: Path) -> _T:
    """Calls torchvision, which downloads and verifies; explains what to do by hand if it fails."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return construct()
    except Exception as error:  # no network, a wrong checksum or a truncated file, all different
        listed = "\n  ".join(urls)
        raise UserError(
            f"the data in {place} is missing or incomplete, and the download failed: "
            f"{str(error) or repr(error)}\nDownload these files yourself:\n  {listed}\n"
            f"Put them into {place.resolve()} without unpacking them, delete what has been "
            "unpacked there, and run again.\n"
            "This command needs no download: python train.py --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _folder_of(dataset: str) -> Path:
    """The folder that a dataset's name stands for. Raises: UserError if it does not exist."""
    root = Path(dataset).expanduser()
    if not _is_folder(root):
        close = difflib.get_close_matches(dataset.lower(), DATASETS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"DATASET={dataset!r} is neither a folder nor one of {', '.join(DATASETS)}{hint or '.'}"
            " A folder of images needs train/<class>/*.jpg, and may have val/ and test/ like it."
        )
    return root


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as a name that is too long
        return False


def _train_folder(root: Path) -> Path:
    """`root/train`, or `root` itself if it contains nothing but class folders.

    Raises: UserError that says how to arrange the images.
    """
    if (root / "train").is_dir():
        return root / "train"
    if wrong := _misnamed(root, "train"):
        raise UserError(f"{root} has a folder {wrong}/ but no train/: rename {wrong}/ to train/")
    found, others = find_images(root)
    arrange = (
        f"Put the images of each class into a folder of its own, {root / '<class>'}/*.jpg, or into "
        f"{root / 'train' / '<class>'}/*.jpg if there are folders val/ or test/ as well."
    )
    for split in ("val", "test"):
        if (root / split).is_dir() or _misnamed(root, split):
            raise UserError(
                f"{root} has no folder train/, only {abbreviate(list(found))}. Put the training "
                f"images into {root / 'train' / '<class>'}/*.jpg"
            )
    if any(found.values()):
        return root
    if loose := [path for path in others if path.suffix.lower() in EXTENSIONS]:
        raise UserError(
            f"{root} contains {len(loose)} images, but no folders that say which class they belong "
            f"to. {arrange} To look at images without classes: python attention_viz.py --images"
        )
    folders = abbreviate([f"{name}/" for name in found]) or "no folders"
    raise UserError(f"{root} contains no images ({folders}). {arrange}")


def _misnamed(root: Path, split: str) -> str | None:
    """The name of a folder that is probably meant to be `split`, such as `valid` for `val`."""
    names = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "dev"},
             "test": {"test", "testing"}}[split]  # fmt: skip
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name.lower() in names)
    return found[0] if found and split not in found else None


def _load_folder(root: Path, reading: Reading, crop_size: int) -> Source:
    """`root/{train,val,test}/<class>/**` with optional val and test, or `root/<class>/**`."""
    source = Source([])
    folders = {"train": _train_folder(root)}
    if folders["train"] == root:
        source.remarks.append(
            "no folder train/: each class is split into training, validation and test images, at "
            "random but always in the same way"
        )
    else:
        folders |= {split: root / split for split in ("val", "test")}
    for split, place in folders.items():
        if not place.is_dir():
            wrong = _misnamed(root, split)
            hint = f" (to use {wrong}/, rename it to {split}/)" if wrong else ""
            source.remarks.append(
                f"no folder {split}/: a fixed part of train/ is used instead{hint}"
            )
            continue
        found, others = find_images(place)
        if others:
            names = abbreviate([str(p.relative_to(root)) for p in others])
            source.remarks.append(
                f"files skipped ({len(others)}; not images, or outside of class folders): {names}"
            )
        if split == "train":
            source.classes = list(found)
            _check_classes(place, found)
            nested = {p.parent for name in found for p in found[name] if p.parent.parent != place}
            cropped = float(np.median([1 - min(s) / max(s) for s in _sample_sizes(found)] or [0]))
            if cropped > _MAX_CROPPED:
                source.remarks.append(
                    f"the center crop removes {cropped:.0%} of a typical image. If what matters "
                    "is near the edges, crop the images or pad them to squares first"
                )
            if nested:
                names = abbreviate(sorted(str(p.relative_to(place)) for p in nested))
                source.remarks.append(
                    f"folders inside of class folders ({len(nested)}): {names}. Their images "
                    "belong to the outer class"
                )
        if unknown := [name for name in found if found[name] and name not in source.classes]:
            raise UserError(
                f"{place} has classes that train/ does not have: {abbreviate(unknown)}. A model "
                "cannot learn them: add them to train/, or remove them."
            )
        labeled = [(p, i) for i, name in enumerate(source.classes) for p in found.get(name, [])]
        source.add_photographs(root, split, labeled, reading, crop_size)
    source.classes = [printable(name) for name in source.classes]
    return source


def _check_classes(train: Path, found: dict[str, list[Path]]) -> None:
    """Raises UserError if there are fewer than two classes, or if one of them is empty."""
    if len(found) < 2:
        has = f"only the class folder {abbreviate(list(found))}" if found else "no class folders"
        message = (
            f"{train} has {has}; a classifier needs at least two, {train / '<class>'}/*.jpg, each "
            "with its images"
        )
        for name in found:
            inside = sorted(p.name for p in (train / name).iterdir() if p.is_dir())
            if len(inside) > 1:
                message += (
                    f". If the folders in it ({abbreviate(inside)}) are the classes, use "
                    f"DATASET={str(train / name)!r} or move them up to {train}"
                )
        raise UserError(message)
    if empty := [name for name in found if not found[name]]:
        raise UserError(
            f"no images in {train} for the classes {abbreviate(empty)}: add some "
            f"({' '.join(sorted(EXTENSIONS))}) or remove the empty folders"
        )


def _image_paths(path: Path) -> list[Path]:
    """An image file itself, or the images below a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"IMAGES: {str(path)!r} is not a file, a folder or one of {', '.join(DATASETS)}"
        )
    inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not inside:
        raise UserError(
            f"IMAGES: the folder {path} contains no images ({abbreviate(sorted(EXTENSIONS))})"
        )
    return inside


def _read_or_explain(path: Path, reading: Reading) -> np.ndarray:
    """One image, uint8 (3, size, size). Raises: UserError that names it if it cannot be read."""
    try:
        return read_image(path, reading)[0]
    except UnidentifiedImageError as error:
        raise UserError(f"IMAGES: {path} is not an image, despite its file extension") from error
    except Exception as error:  # Pillow raises many exception types
        raise UserError(f"IMAGES: {path} cannot be read: {error}") from error
