"""Where images come from: scikit-learn, torchvision's downloads, or a folder of the user's own."""

import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab import cache, images
from lab.errors import UserError
from lab.images import Reading

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


def whole(store: Tensor, labels: Tensor, names: list[str]) -> Split:
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
        ask = partial(cache.ask_for, array)
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


def kind_of(dataset: str) -> Literal["digits", "small", "photographs"]:
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
        found = images.some(sorted(f"{p.name}/" for p in root.iterdir() if p.is_dir())) or "nothing"
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
    split = whole(store, torch.from_numpy(bunch.target).long(), names)
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
        splits[split] = whole(store, torch.as_tensor(data.targets), names)
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
                f"download: {images.some(lost)}. Delete that folder and run again: the archive "
                "beside it is unpacked again, or downloaded if there is none."
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
            names = images.some([str(p.relative_to(root)) for p in others])
            source.remarks.append(
                f"{len(others)} files left out (no images, or outside the class folders): {names}"
            )
        if split == "train":
            source.classes = list(found)
            if len(found) < 2:
                raise UserError(
                    f"{root / split} has {len(found)} class folders ({images.some(list(found))}); "
                    "a classifier needs two or more, each with its images"
                )
            if empty := [name for name in found if not found[name]]:
                raise UserError(
                    f"no images in {root / split} for the classes {images.some(empty)}: add some "
                    f"({' '.join(sorted(images.EXTENSIONS))}) or remove the empty folders"
                )
        if strange := [name for name in found if found[name] and name not in source.classes]:
            raise UserError(
                f"{root / split} has classes that train/ has not: {images.some(strange)}. A model "
                "can't learn them: add them to train/ or take them away."
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
