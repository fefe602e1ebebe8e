"""Small images inside the page, as data URIs: test images on this machine, and plots of a run.

Records may come from somebody else. Nothing is downloaded, and only regular files that lie in the
expected folder and have one of the listed formats are opened.
"""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lab.core import web_page
from lab.data import datasets

ATTRIBUTIONS = {  # by DATASET; the page shows them beside the images
    "digits": "Images: Optical Recognition of Handwritten Digits, UCI (CC BY 4.0).",
    "mnist-5k": "Images: MNIST, Y. LeCun and C. Cortes (CC BY-SA 3.0).",
    "mnist": "Images: MNIST, Y. LeCun and C. Cortes (CC BY-SA 3.0).",
    "fashion-mnist": "Images: Fashion-MNIST, Zalando SE (MIT license).",
    "cifar10": "Images: CIFAR-10, A. Krizhevsky (no license stated; do not publish them).",
    "cifar100": "Images: CIFAR-100, A. Krizhevsky (no license stated; do not publish them).",
    "pets": "Photos: Oxford-IIIT Pet (CC BY-SA 4.0).",
}
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # none of them runs a program
_MAX_SIDE = 96  # pixels of a test image
_MAX_WIDTH = 1000  # pixels of a plot
_LOSSLESS_SIDE = 64  # pixels: smaller test images are stored without loss
_UNREADABLE = (OSError, ValueError, IndexError, RuntimeError, Image.DecompressionBombError)


def thumbnail(dataset: str, name: str, data_dir: Path) -> str | None:
    """A test image as a data URI; None if it is not on this machine.

    Args:
        dataset: as the constant DATASET.
        name: of the image, as in predictions.csv.
        data_dir: the folder of downloaded datasets.
    """
    try:
        if dataset in ATTRIBUTIONS and dataset != "pets":
            pixels = _test_pixels(dataset, data_dir)[int(name.rpartition("/")[2])]
            image = Image.fromarray(pixels)
        else:
            pets = data_dir / "oxford-iiit-pet"
            image = _open(pets if dataset == "pets" else Path(dataset).expanduser(), name)
    except _UNREADABLE:
        return None
    kind = "PNG" if max(image.size) <= _LOSSLESS_SIDE else "JPEG"
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return _data_uri(image, kind)


def plot(folder: Path, name: str) -> str | None:
    """A plot in a run's folder as a data URI; None if there is none that can be read."""
    try:
        image = _open(folder, name)
    except _UNREADABLE:
        return None
    image.thumbnail((_MAX_WIDTH, 4 * _MAX_WIDTH))
    return _data_uri(image, "JPEG")


@cache
def _test_pixels(dataset: str, data_dir: Path) -> np.ndarray:
    """The images that predictions.csv numbers, (N, H, W) or (N, H, W, 3).

    Raises: RuntimeError if torchvision does not find a complete dataset.
    """
    if dataset in ("digits", "mnist-5k"):
        load = datasets.load_digits if dataset == "digits" else datasets.load_mnist_5k
        images = load().splits["train"].images(slice(None))
        return images[:, 0].numpy()
    import torchvision

    classes = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST",
               "mnist": "MNIST"}  # fmt: skip
    load = getattr(torchvision.datasets, classes[dataset])
    return np.asarray(load(data_dir, train=False, download=False).data)


def _open(folder: Path, name: str) -> Image.Image:
    """An RGB image below a folder. Raises: one of _UNREADABLE."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise FileNotFoundError(path)
    with Image.open(path, formats=_FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return web_page.data_uri(f"image/{kind.lower()}", buffer.getvalue())
