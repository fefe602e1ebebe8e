"""Small images inside a page, as data URIs: test images on this machine, and plots of a run."""

import io
from base64 import b64encode
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from lab.core import UserError
from lab.data import datasets
from lab.data.images import open_image

_SIDE = 96  # pixels: largest side of a test image
_WIDTH = 1000  # pixels: largest width of a plot
_OFFLINE = {"mnist-5k": datasets.load_mnist_5k, "digits": datasets.load_digits}
_FOLDERS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python",
            "fashion-mnist": "FashionMNIST/raw"}  # fmt: skip


def thumbnail(dataset: str, name: str, data_dir: Path) -> str | None:
    """A test image as a data URI; None if it is not on this machine. Downloads nothing.

    Args:
        dataset: as the constant DATASET.
        name: of the image, as in predictions.csv.
        data_dir: where downloads are.
    """
    try:
        image = _test_image(dataset, name, data_dir)
    except (OSError, ValueError, IndexError, RuntimeError, UserError):  # RuntimeError: a link loop
        return None
    if image is None:
        return None
    small = max(image.size) <= datasets.SMALL
    image.thumbnail((_SIDE, _SIDE))
    return _data_uri(image, "PNG" if small else "JPEG")


def plot(path: Path) -> str:
    """A plot of a run as a data URI, at most 1000 pixels wide. Raises: OSError, ValueError."""
    with open_image(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_WIDTH, 4 * _WIDTH))
    return _data_uri(image, "JPEG")


def _test_image(dataset: str, name: str, data_dir: Path) -> Image.Image | None:
    if dataset in _OFFLINE or dataset in _FOLDERS:
        store = _small_images(dataset, data_dir)
        if store is None:
            return None
        pixels = store[int(name.rpartition("/")[2])].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    root = data_dir / "oxford-iiit-pet" if dataset == "pets" else Path(dataset).expanduser()
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        return None  # a record from someone else must not open files outside of its dataset
    return ImageOps.exif_transpose(open_image(path)).convert("RGB")


@cache
def _small_images(dataset: str, data_dir: Path) -> Tensor | None:
    """The test images (N, C, H, W) of a dataset that is on this machine, or all its images."""
    if dataset in _OFFLINE:
        return _OFFLINE[dataset]().splits["train"].store
    if not (data_dir / _FOLDERS[dataset]).is_dir():
        return None
    return datasets.load_torchvision(dataset, str(data_dir)).splits["test"].store


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"
