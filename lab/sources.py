"""Where images come from: scikit-learn, torchvision's downloads, or a folder of the user's own."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab import images
from lab.errors import UserError

NATIVE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "pets": None}
DATASETS = tuple(NATIVE_SIZES)
SMALL = 64  # pixels: up to here images are kept at their own size, above they are photographs
OFFICIAL_PETS = {"trainval": 3680, "test": 3669}
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Images with labels; `rows` picks them from a store that may be larger and lie on disk.

    store: uint8 (M, C, H, W); rows: int64 (N,), indices into it; labels: int64 (N,); names: N.
    """

    store: Tensor
    rows: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | slice) -> Tensor:
        """Some images of the split, uint8 (n, C, H, W)."""
        return self.store[self.rows[indices]]

    def take(self, keep: Tensor) -> "Split":
        """The split of the images where the mask (N,) is true; it shares the store."""
        names = [name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept]
        return Split(self.store, self.rows[keep], self.labels[keep], names)


def whole(store: Tensor, labels: Tensor, names: list[str]) -> Split:
    return Split(store, torch.arange(len(store)), labels, names)


@dataclass
class Source:
    """What a source gives: class names, some of the splits train, val and test, and remarks."""

    classes: list[str]
    splits: dict[str, Split] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


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
        except OSError:
            continue  # loading names it
    side = int(np.median(sides)) if sides else SMALL + 1
    return None if side > SMALL else -(-side // 4) * 4


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
        files = [f"{kind.mirrors[0]}{name}" for name, _ in kind.resources]
    else:
        kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100
        place, files = Path(data_dir), [kind.url]
    splits = {}
    for split in ("train", "test"):
        data = download(lambda train: kind(data_dir, train, download=True), split == "train",
                        files, place)  # fmt: skip
        store = torch.as_tensor(data.data)
        store = store[:, None] if store.ndim == 3 else store.permute(0, 3, 1, 2).contiguous()
        names = [f"{split}/{i}" for i in range(len(store))]
        splits[split] = whole(store, torch.as_tensor(data.targets), names)
    return Source(list(data.classes), splits)


def pets(data_dir: str, size: int, skip_unreadable: bool) -> Source:
    """Oxford-IIIT Pet by torchvision, official split: 37 breeds, 3,680 to train, 3,669 to test."""
    from torchvision.datasets import OxfordIIITPet

    base = Path(data_dir, "oxford-iiit-pet")
    files = [url for url, _ in OxfordIIITPet._RESOURCES]
    source = Source([])
    for split, theirs in (("train", "trainval"), ("test", "test")):
        data = download(lambda s: OxfordIIITPet(data_dir, s, download=True), theirs, files, base)
        if lost := [str(p) for p in data._images if not Path(p).exists()]:
            raise UserError(
                f"{len(lost)} images of {base} are missing, as after an interrupted download: "
                f"{images.some(lost)}. Delete that folder and run again."
            )
        if len(data) != OFFICIAL_PETS[theirs]:
            source.remarks.append(
                f"not the official Pets: {len(data)} {theirs} images, not {OFFICIAL_PETS[theirs]}"
            )
        source.classes = list(data.classes)
        cache = base / "vit-lab-cache" / f"{split}-{size}"
        add_photographs(source, split, data._images, data._labels, size, cache, skip_unreadable)
    return source


def folder(root: Path, size: int, skip_unreadable: bool) -> Source:
    """`root/{train,val,test}/<class>/**`; val and test are optional, classes are those of train."""
    source = Source([])
    for split in ("train", "val", "test"):
        if not (root / split).is_dir():
            source.remarks.append(f"no folder {split}/: a fixed share of train/ takes its place")
            continue
        found, others = images.find_images(root / split)
        if others:
            names = images.some([p.name for p in others])
            source.remarks.append(
                f"{len(others)} files of {split}/ are no images, left out: {names}"
            )
        if split == "train":
            source.classes = list(found)
            if empty := [name for name in found if not found[name]]:
                raise UserError(
                    f"no images in {root / split} for the classes {images.some(empty)}: add some "
                    "or remove the empty folders"
                )
        if strange := [name for name in found if found[name] and name not in source.classes]:
            raise UserError(
                f"{root / split} has classes that train/ has not: {images.some(strange)}. A model "
                "can't learn them: add them to train/ or take them away."
            )
        paths = [path for name in source.classes for path in found.get(name, [])]
        labels = [i for i, name in enumerate(source.classes) for _ in found.get(name, [])]
        if not paths:
            raise UserError(f"{root / split} holds no images: fill it or remove it")
        cache = root / "vit-lab-cache" / f"{split}-{size}"
        add_photographs(source, split, paths, labels, size, cache, skip_unreadable)
    return source


def add_photographs(
    source: Source, split: str, paths: list, labels: list[int], size: int, cache: Path, skip: bool
) -> None:
    """Decodes photographs, or maps them from their cache, into `source.splits[split]`."""
    paths = [Path(p) for p in paths]
    array, kept, remarks = images.decode(paths, size, cache, skip)
    names = ["/".join(paths[i].parts[-2:]) for i in kept]
    source.splits[split] = whole(torch.from_numpy(array), torch.tensor(labels)[kept], names)
    source.remarks += remarks


def download(construct: Callable[..., T], which: object, files: list[str], place: Path) -> T:
    """Calls torchvision, which downloads and verifies; says what to do by hand if it cannot."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return construct(which)
    except (OSError, RuntimeError) as error:  # no network: URLError; a bad checksum: RuntimeError
        listed = "\n  ".join(files)
        raise UserError(
            f"the data is not in {place} and cannot be downloaded ({error}). Fetch by hand:\n  "
            f"{listed}\nand put what you fetched into {place.resolve()}: the next run checks and "
            "unpacks it.\nA run that needs no download: python train.py --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
