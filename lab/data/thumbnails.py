"""Small pictures inside a page: of test images that lie on this machine, and of a run's plots."""

import io
from base64 import b64encode
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from lab.core import UserError
from lab.data import datasets

SIDE = 96  # pixels of a test image at most
WIDTH = 1000  # pixels of a plot at most
TORCHVISION = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python",
               "fashion-mnist": "FashionMNIST/raw"}  # fmt: skip


def thumbnail(dataset: str, name: str, data_dir: Path) -> str | None:
    """A test image as a data URI; None where it is not on this machine. Nothing is downloaded.

    Args:
        dataset: as the constant DATASET.
        name: of the image, as in predictions.csv.
        data_dir: where downloads are.
    """
    try:
        image = opened(dataset, name, data_dir)
    except (OSError, ValueError, IndexError, UserError, Image.DecompressionBombError):
        return None
    if image is None:
        return None
    small = max(image.size) <= datasets.SMALL
    image.thumbnail((SIDE, SIDE))
    return data_uri(image, "PNG" if small else "JPEG")


def opened(dataset: str, name: str, data_dir: Path) -> Image.Image | None:
    if dataset == "digits" or dataset in TORCHVISION:
        store = small_images(dataset, data_dir)
        if store is None:
            return None
        pixels = store[int(name.rpartition("/")[2])].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    root = data_dir / "oxford-iiit-pet" if dataset == "pets" else Path(dataset).expanduser()
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        return None  # a record may come from anybody: it opens nothing outside its dataset
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


@cache
def small_images(dataset: str, data_dir: Path):
    """The test images (N, C, H, W) of a dataset that is here whole; digits: all images."""
    if dataset == "digits":
        return datasets.digits().splits["train"].store
    if not (data_dir / TORCHVISION[dataset]).is_dir():
        return None
    return datasets.downloaded(dataset, str(data_dir)).splits["test"].store


def plot(path: Path) -> str:
    """A picture of a run as a data URI, no wider than WIDTH. Raises: OSError."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((WIDTH, 4 * WIDTH))
    return data_uri(picture, "JPEG")


def data_uri(image: Image.Image, kind: str) -> str:
    held = io.BytesIO()
    image.save(held, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{b64encode(held.getvalue()).decode()}"
