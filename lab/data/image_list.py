"""Images to look at: the test images of a dataset, or any pictures on disk."""

import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError

from lab.core.errors import UserError
from lab.data.datasets import DATASETS, Dataset, full_split, load_data
from lab.data.images import EXTENSIONS, Reading, abbreviate, printable, read_image
from lab.data.preprocess import Preprocess


def load_images(images: str, data_dir: str, preprocess: Preprocess) -> Dataset:
    """What IMAGES stands for.

    Args:
        images: a dataset's name or folder (its test images count), else pictures: files or
            folders, separated by blanks, in quotes where their names have some.
        data_dir: where downloaded datasets lie.

    Returns: a dataset; of pictures all splits are the same, and nothing is labelled: no classes.
    Raises: UserError, for what is not there, or cannot be read.
    """
    if images in DATASETS or (Path(images).expanduser() / "train").is_dir():
        return load_data(images, data_dir, preprocess.resized,
                         interpolation=preprocess.interpolation)  # fmt: skip
    whole_path = Path(images).expanduser()
    words = [images] if whole_path.exists() else shlex.split(images)
    paths = [path for word in words for path in found_at(Path(word).expanduser())]
    reading = Reading(preprocess.resized, preprocess.interpolation)
    pixels = np.ascontiguousarray([read(path, reading) for path in paths])
    names = [printable(path.name) for path in paths]
    split = full_split(torch.from_numpy(pixels), torch.full((len(paths),), -1), names)
    name = printable(Path(words[0]).name) if len(words) == 1 else f"{len(paths)}-pictures"
    return Dataset(name, [], split, split, split, mean=[], std=[], remarks=[])


def found_at(path: Path) -> list[Path]:
    """A picture itself, or the pictures below a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"IMAGES: {str(path)!r} is no file, no folder and none of "
                        f"{', '.join(DATASETS)}")  # fmt: skip
    inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not inside:
        raise UserError(
            f"IMAGES: the folder {path} holds no pictures ({abbreviate(sorted(EXTENSIONS))})"
        )
    return inside


def read(path: Path, reading: Reading) -> np.ndarray:
    """One picture, uint8 (3, size, size).

    Raises: UserError that names it, if it cannot be read.
    """
    try:
        return read_image(path, reading)[0]
    except UnidentifiedImageError as error:
        raise UserError(f"IMAGES: {path} is no image, whatever its name says") from error
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"IMAGES: {path} cannot be read: {error}") from error
