"""Photographs on disk: found in their folders, and read, of whatever kind they are."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lab.core import UserError

# What Pillow reads without a plug-in. Anything else in a class folder is ignored, and named.
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm",
              ".pgm"}  # fmt: skip
TINY = 4  # pixels: an image with a shorter side is enlarged like the others, but named


def find_images(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The images of `root/<class>/**`, sorted; links are followed, but not in circles.

    Returns: class name -> paths (empty for an empty folder), and what is left out: hidden files
        and folders, files of other kinds, files beside the class folders.
    Raises: UserError for a folder that cannot be listed.
    """
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []

    def collect(folder: Path, found: list[Path], above: set[Path]) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                others.append(path)
            elif path.suffix.lower() in EXTENSIONS:  # reading fails, and names it, if it is none
                found.append(path)
            elif not path.is_dir():
                others.append(path)
            elif (real := path.resolve()) not in above:
                collect(path, found, above | {real})

    try:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                found = classes.setdefault(entry.name, [])
                collect(entry, found, {root.resolve(), entry.resolve()})
            else:
                others.append(entry)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error
    return classes, others


@dataclass(frozen=True)
class Reading:
    """How photographs are read."""

    size: int = 256  # side in pixels of the square that is kept
    interpolation: str = "bicubic"  # or bilinear
    skip_unreadable: bool = False  # go on without the images that cannot be read

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"IMG_SIZE={self.size} must be a number of pixels, such as 224")


def read_image(path: Path, reading: Reading) -> tuple[np.ndarray, str | None]:
    """One image as its central square, as torchvision's Resize(size) and CenterCrop do.

    EXIF rotation is applied; grayscale, palette and CMYK become RGB; transparency becomes white;
    16-bit and float images keep their range.

    Returns: uint8 (3, size, size), and a remark or None.
    Raises: whatever Pillow raises for a file that is no image, truncated or a bomb.
    """
    with Image.open(path) as image:
        image.load()  # decodes everything: a truncated file fails here
        remark = f"{image.width}x{image.height} pixels" if min(image.size) < TINY else None
        with suppress(Exception):  # a broken EXIF block says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
    image = square(image, reading.size, Image.Resampling[reading.interpolation.upper()])
    return np.asarray(image).transpose(2, 0, 1), remark


def square(image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    """The central square of an image with `size` pixels a side."""
    short = min(image.size)
    if max(image.size) > 100 * short:  # a 1-pixel strip must not become a wall of memory
        image = ImageOps.fit(image, (size, size), method)
    elif short != size:
        image = image.resize([size * side // short for side in image.size], method)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB. `convert` alone would clip 16 bits to white and drop transparency.

    Values above 255 count as 16 bits, floats up to 1 as shares of white; what fits neither, such
    as negative values, is stretched from its least to its largest value.
    """
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all():
            raise ValueError("holds values that are not finite")
        low, high = min(0, pixels.min()), pixels.max()
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((w for w in whites if low == 0 and high <= w), high)
        pixels = (pixels - low) * (255 / max(white - low, 1e-9))
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def abbreviate(items: Sequence[str], joint: str = ", ", most: int = 10) -> str:
    """The first few items, fit to print, and how many more there are."""
    rest = [f"... and {len(items) - most} more"] if len(items) > most else []
    return joint.join([*map(printable, items[:most]), *rest])


def printable(name: str) -> str:
    """A file's name with ? for what is not valid Unicode, which no terminal or file would take."""
    return name.encode("utf-8", "replace").decode()
