"""Images on disk: finding them in class folders, and reading files of many formats."""

import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lab.core import UserError

# Formats that Pillow reads without a plugin. Other files in a class folder are skipped and listed.
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm",
              ".pgm"}  # fmt: skip
# Only these formats are opened. Pillow guesses the format from a file's content: without a list, it
# would pass any file that starts with %!PS to Ghostscript, which runs the program inside.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
CACHE_FOLDER = "vit-lab-cache"  # decoded photographs, in the folder of a dataset
TINY = 4  # pixels: images whose shorter side is smaller are enlarged, with a warning


@contextmanager
def explain_listing_errors() -> Iterator[None]:
    """Raises UserError for a folder that cannot be listed."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from error


@explain_listing_errors()
def find_images(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The images of `root/<class>/**`, sorted; links are followed unless they form a cycle.

    Returns: class name -> paths (empty for an empty folder), and the skipped files: hidden files
        and folders, files of other formats, files next to the class folders.
    Raises: UserError for a folder that cannot be listed.
    """
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []
    for entry in sorted(root.iterdir()):
        if entry.name == CACHE_FOLDER:
            continue
        if entry.is_dir() and not entry.name.startswith("."):
            classes[entry.name], skipped = list_images(entry, frozenset({root.resolve()}))
            others += skipped
        else:
            others.append(entry)
    return classes, others


@explain_listing_errors()
def list_images(
    folder: Path, parents: frozenset[Path] = frozenset()
) -> tuple[list[Path], list[Path]]:
    """The images of `folder/**`, sorted, and the skipped files.

    Links are followed, except to `parents`, the resolved folders that contain this one, or to the
    folder itself.

    Raises: UserError for a folder that cannot be listed.
    """
    found: list[Path] = []
    others: list[Path] = []
    parents |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            others.append(path)
        elif path.suffix.lower() in EXTENSIONS:  # if it is not an image, reading reports it
            found.append(path)
        elif not path.is_dir():
            others.append(path)
        elif path.resolve() not in parents:
            inside, skipped = list_images(path, parents)
            found += inside
            others += skipped
    return found, others


@dataclass(frozen=True)
class Reading:
    """How photographs are read."""

    size: int = 256  # pixels: side of the square that is kept
    interpolation: str = "bicubic"  # or bilinear
    whole: bool = False  # resize without keeping the aspect ratio, instead of center-cropping
    skip_unreadable: bool = False  # skip images that cannot be read instead of stopping

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(
                f"IMG_SIZE={self.size} must be a positive number of pixels, such as 224"
            )


def open_image(path: Path) -> Image.Image:
    """Opens an image file like Pillow's `Image.open`, but safely.

    Raises: ValueError for what is not a regular file (a pipe would block forever) or has too many
        pixels, and what Pillow raises for files of other formats.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    try:
        return Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make the image smaller"
        ) from error


def read_image(path: Path, reading: Reading) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes and center-crops an image to a square, like torchvision's Resize and CenterCrop.

    With `reading.whole`, the whole image is resized to a square, ignoring its aspect ratio.

    EXIF rotation is applied; grayscale, palette and CMYK images become RGB; transparency becomes
    white; 16-bit and float images keep their range.

    Returns: uint8 (3, size, size), and width and height of the original in pixels.
    Raises: what `open_image` raises, and what Pillow raises for truncated files.
    """
    with open_image(path) as image:
        return image_to_array(image, reading)


def image_to_array(image: Image.Image, reading: Reading) -> tuple[np.ndarray, tuple[int, int]]:
    """Like `read_image`, for an image that is already open and need not come from a file.

    Returns: uint8 (3, size, size), and the width and height of the upright image.
    """
    image.load()  # decodes all pixels, so a truncated file fails here
    with suppress(Exception):  # a broken EXIF block does not affect the pixels
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it copies the image
            image = ImageOps.exif_transpose(image)
    image = _to_rgb(image)
    original, size = image.size, reading.size
    method = Image.Resampling[reading.interpolation.upper()]
    image = image.resize((size, size), method) if reading.whole else square(image, size, method)
    return np.asarray(image).transpose(2, 0, 1), original


def square(image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    """Resizes the shorter side to `size` pixels and crops the center to a square."""
    short = min(image.size)
    if max(image.size) > 100 * short:  # resizing a 1-pixel strip first would need gigabytes
        image = ImageOps.fit(image, (size, size), method)
    elif short != size:
        image = image.resize([size * side // short for side in image.size], method)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB; Pillow would clip 16 bits to white and drop transparency.

    16-bit images keep their range, however dark they are. The range of 32-bit images is guessed
    from their values: integers up to 255 are read as 8-bit, larger ones as 16-bit, and floats up to
    1 as [0, 1]. Any other range, such as one with negative values, is scaled from its minimum to
    its maximum.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) * (255 / 65535)).round().astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all():
            raise ValueError("contains NaN or infinite values")
        low, high = min(0, pixels.min()), pixels.max()
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((w for w in whites if low == 0 and high <= w), high)
        pixels = (pixels - low) * (255 / max(white - low, 1e-9))
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB


def abbreviate(items: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """The first few items, made printable, and the number of the others."""
    rest = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(printable, items[:limit]), *rest])


def printable(name: str) -> str:
    """A name in which "?" replaces characters that are not safe to print.

    These are bytes that are not valid Unicode, line breaks, and control and formatting characters,
    which could move the cursor or change the direction of text. Joiners are kept: Persian, Hindi
    and emoji need them.
    """
    unsafe = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        "?" if unicodedata.category(c) in unsafe and c not in "\u200c\u200d" else c for c in name
    )
