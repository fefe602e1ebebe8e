"""Where the images come from: this repository, scikit-learn, torchvision, the user's folders."""

import difflib
import os
import re
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from lab.core import UserError
from lab.data import cache
from lab.data.images import (
    CACHE_FOLDER,
    EXTENSIONS,
    Reading,
    abbreviate,
    explain_listing_errors,
    find_images,
    open_image,
    printable,
)
from lab.data.splits import Split, full_split

_NATIVE_SIZES = {"mnist-5k": 28, "digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32,
                 "cifar100": 32, "pets": None}  # fmt: skip
DATASETS = tuple(_NATIVE_SIZES)
_MAX_SMALL_SIDE = 64  # pixels: images up to this size keep their size; others are photographs
OFFICIAL_PETS = {"trainval": 3680, "test": 3669}  # images in the official splits
_MAX_CROPPED = 0.26  # warn if a center crop removes a larger fraction; 4:3 photos lose 0.25
_T = TypeVar("_T")


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
            loose = find_images(root / split)[1] if (root / split).is_dir() else []
            if loose := [path for path in loose if path.suffix.lower() in EXTENSIONS]:
                raise UserError(
                    f"{root / split} contains {len(loose):,} images, but no class folders, so "
                    "their classes are unknown. Rename it, for example to unlabeled/, and use "
                    "predict.py --images after training"
                )
            raise UserError(f"{root / split} contains no images: add some, or remove the folder")
        paths = [path for path, _ in labeled]
        labels = torch.tensor([label for _, label in labeled])
        kind = f"whole-{reading.interpolation}" if reading.whole else reading.interpolation
        cache_path = root / CACHE_FOLDER / f"{split}-{reading.size}-{kind}"
        decoded = cache.decode(paths, reading, cache_path)
        all_names = [printable(path.relative_to(root).as_posix()) for path in paths]
        readable = [i for i in range(len(paths)) if i not in decoded.failures]
        rows = torch.tensor(readable, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only and never written
            store = torch.from_numpy(decoded.array)
        whole = aspect_ratios = None
        if reading.whole:
            aspect_ratios = torch.tensor([width / height for width, height in decoded.sizes])
        if crop_size and split == "train":
            self.add_photographs(root, split, labeled, replace(reading, size=crop_size, whole=True))
            whole = self.splits[split]
        else:
            self.remarks += decoded.remarks
        self.splits[split] = Split(
            store, rows, labels[rows], [all_names[i] for i in readable],
            read_ahead=partial(cache.prefetch, decoded.array), whole=whole,
            aspect_ratios=aspect_ratios,
            unreadable={all_names[i]: reason for i, reason in decoded.failures.items()},
        )  # fmt: skip


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


def load_torchvision(dataset: str, data_dir: str) -> Source:
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


def load_pets(data_dir: str, reading: Reading, crop_size: int) -> Source:
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


def load_folder(root: Path, reading: Reading, crop_size: int) -> Source:
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
            sizes = _image_sizes(_first_images(found))
            if (brightest := _brightest_16_bit(_first_images(found))) < 65536 // 8:
                source.remarks.append(
                    f"the 16-bit images use only values up to {brightest:,} of 65,535, so they are "
                    "almost black: scale them first"
                )
            cropped = float(np.median([1 - min(s) / max(s) for s in sizes] or [0]))
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


def folder_of(dataset: str) -> Path:
    """The folder that a dataset's name stands for. Raises: UserError if it does not exist."""
    root = Path(dataset).expanduser()
    if not os.path.isdir(root):  # False also for a name that is too long, unlike Path.is_dir
        close = difflib.get_close_matches(dataset.lower(), DATASETS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"DATASET={dataset!r} is neither a folder nor one of {', '.join(DATASETS)}{hint or '.'}"
            " A folder of images needs train/<class>/*.jpg, and may have val/ and test/ in the "
            "same form."
        )
    return root


@explain_listing_errors()
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
            f"to. {arrange} To look at unlabeled images: python attention_viz.py --images FOLDER"
        )
    if kinds := sorted({path.suffix.lower() for path in others if not path.name.startswith(".")}):
        raise UserError(
            f"{root} contains only files of the types {abbreviate(kinds)}, which cannot be read: "
            f"convert them to one of {' '.join(sorted(EXTENSIONS))}"
        )
    folders = abbreviate([f"{name}/" for name in found]) or "no folders"
    raise UserError(f"{root} contains no images ({folders}). {arrange}")


@explain_listing_errors()
def _misnamed(root: Path, split: str) -> str | None:
    """The name of a folder that is probably meant to be `split`, such as `valid` for `val`."""
    names = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "dev"},
             "test": {"test", "testing"}}[split]  # fmt: skip

    def is_meant(path: Path) -> bool:
        """Also `seg_train` or `test_set`, but then it must contain folders, as a split does."""
        if not path.is_dir() or path.name.lower() in names:
            return path.is_dir()
        words = set(re.split(r"[\W_]+", path.name.lower()))
        folders = (p for p in path.iterdir() if p.is_dir() and p.name[0] not in ".@_")
        return bool(words & names) and any(folders)

    found = sorted(path.name for path in root.iterdir() if is_meant(path))
    return found[0] if found and split not in found else None


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


def native_size(dataset: str) -> int | None:
    """The side in pixels of a dataset of small images; None for photographs of any size.

    A folder counts as small if the median shorter side of its images is at most 64 pixels; the side
    is then rounded up to a multiple of 4, so that patches of 4 pixels fit.
    """
    if dataset in _NATIVE_SIZES:
        return _NATIVE_SIZES[dataset]
    found, _ = find_images(_train_folder(folder_of(dataset)))
    sides = [min(size) for size in _image_sizes(_first_images(found))]
    side = int(np.median(sides)) if sides else _MAX_SMALL_SIDE + 1
    return None if side > _MAX_SMALL_SIDE else -(-side // 4) * 4


def largest_side(dataset: str) -> int:
    """The largest shorter side in pixels of up to 1,000 images of a folder; 0 without images."""
    found, _ = find_images(_train_folder(folder_of(dataset)))
    paths = [path for paths in found.values() for path in paths]
    return max((min(size) for size in _image_sizes(paths[:: -(-len(paths) // 1000)])), default=0)


def _brightest_16_bit(paths: list[Path]) -> int:
    """The largest value in those of the images that have 16 bits; 65,535 if none has."""
    values = []
    for path in paths:
        with suppress(Exception), open_image(path) as image:  # loading reports the image
            if image.mode.startswith("I;16"):
                values.append(int(np.asarray(image).max()))
    return max(values, default=65535)


def _first_images(found: dict[str, list[Path]]) -> list[Path]:
    """The first three images of each class, at most 100 in all."""
    return [path for paths in found.values() for path in paths[:3]][:100]


def _image_sizes(paths: list[Path]) -> list[tuple[int, int]]:
    """Width and height of the images that can be read."""
    sizes = []
    for path in paths:
        try:
            with open_image(path) as image:  # reads only the header
                sizes.append(image.size)
        except Exception:  # Pillow raises many exception types; loading reports the image
            continue
    return sizes
