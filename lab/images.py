"""Photographs on disk become one uint8 array: found, checked, decoded once, cached next to them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from lab.errors import UserError

# What Pillow reads without a plug-in. Anything else in a class folder is ignored, and named.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
TINY = 4  # pixels: an image with a shorter side is enlarged like the others, but named


def find_images(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The images of `root/<class>/**`, sorted, and the files that are no images.

    Returns: class name -> paths (empty for an empty folder), and the files left out.
    """
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []
    for entry in sorted(root.iterdir()):
        if not entry.is_dir():
            others.append(entry)
        elif not entry.name.startswith("."):
            found = classes.setdefault(entry.name, [])
            for folder, folders, files in os.walk(entry, followlinks=True):
                folders.sort()
                for name in sorted(files):
                    image = Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
                    (found if image else others).append(Path(folder, name))
    return classes, others


def read_image(path: Path, size: int) -> tuple[np.ndarray, str | None]:
    """One image as its central square, as torchvision's Resize(size, bicubic) and CenterCrop do.

    EXIF rotation is applied; grayscale, palette and CMYK become RGB; transparency becomes white;
    16-bit and float images keep their range.

    Returns: uint8 (3, size, size), and a remark or None.
    Raises: whatever Pillow raises for a file that is no image, truncated or a bomb.
    """
    with Image.open(path) as image:
        image.load()  # decodes everything: a truncated file fails here
        remark = f"{image.width}x{image.height} pixels" if min(image.size) < TINY else None
        image = to_rgb(ImageOps.exif_transpose(image))
    short = min(image.size)
    if max(image.size) > 100 * short:  # a 1-pixel strip must not become a wall of memory
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif short != size:
        shape = [size * side // short for side in image.size]
        image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.transpose(2, 0, 1), remark


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB. `convert` alone would clip 16 bits to white and drop transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535 if pixels.max() > 255 else 255 if pixels.max() > 1 or image.mode != "F" else 1
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(
    paths: Sequence[Path], size: int, cache: Path, skip_unreadable: bool
) -> tuple[np.ndarray, list[int], list[str]]:
    """Every image at `size` pixels, from the cache where the files are still the same.

    Args:
        paths: the images, in the order wanted.
        size: side of the square in pixels.
        cache: where the array is kept, without ending; a folder that cannot be written is
            replaced by one among the user's caches.
        skip_unreadable: go on without the images that cannot be read.

    Returns: uint8 (N, 3, size, size), mapped from disk; the indices into `paths` of the images
        that it holds; remarks for the user.
    Raises: UserError that names the unreadable images, unless they are to be skipped.
    """
    stats = [(str(p), s.st_size, s.st_mtime_ns) for p in paths for s in [os.stat(p)]]
    key = hashlib.blake2b(repr((size, skip_unreadable, stats)).encode("utf-8", "replace"))
    cache = writable(cache)
    data, notes = cache.with_suffix(".npy"), cache.with_suffix(".json")
    if notes.exists() and data.exists():
        record = json.loads(notes.read_text(encoding="utf-8"))
        if record["key"] == key.hexdigest():
            return np.load(data, mmap_mode="c"), record["kept"], record["remarks"]
    notes.unlink(missing_ok=True)  # it vouches for the array, so it goes first and comes last

    with tempfile.NamedTemporaryFile(dir=data.parent, delete=False) as scratch:
        pass
    try:
        array = np.lib.format.open_memmap(
            scratch.name, mode="w+", dtype=np.uint8, shape=(len(paths), 3, size, size)
        )
        failures, tiny = fill(array, paths, size, cache.name)
        if failures and not skip_unreadable:
            raise UserError(
                f"{len(failures)} of {len(paths)} images cannot be read:\n  "
                + some([f"{paths[i]}: {why}" for i, why in failures.items()], "\n  ")
                + "\nRepair or delete them, or go on without them: --skip-unreadable"
            )
        kept = [i for i in range(len(paths)) if i not in failures]
        if failures:
            for new, old in enumerate(kept):  # one at a time: the array may not fit in memory
                array[new] = array[old]
            np.save(scratch.name + ".npy", array[: len(kept)])
            os.replace(scratch.name + ".npy", scratch.name)
        array.flush()
        os.replace(scratch.name, data)
    finally:
        Path(scratch.name).unlink(missing_ok=True)
    remarks = []
    if failures:
        names = some([paths[i].name for i in failures])
        remarks.append(f"{len(failures)} unreadable images left out: {names}")
    if tiny:
        names = some([f"{paths[i].name} ({what})" for i, what in tiny.items()])
        remarks.append(f"{len(tiny)} images under {TINY} pixels enlarged: {names}")
    record = {"key": key.hexdigest(), "kept": kept, "remarks": remarks}
    scratch_notes = notes.with_suffix(".json.part")
    scratch_notes.write_text(json.dumps(record), encoding="utf-8")
    os.replace(scratch_notes, notes)
    return np.load(data, mmap_mode="c"), kept, remarks


def fill(
    array: np.ndarray, paths: Sequence[Path], size: int, name: str
) -> tuple[dict[int, str], dict[int, str]]:
    """Decodes into `array` on all cores; returns failures and tiny images, index -> what."""
    failures: dict[int, str] = {}
    tiny: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            array[i], remark = read_image(paths[i], size)
        except Exception as error:  # Pillow raises many kinds; each is this image's failure
            failures[i] = str(error) or type(error).__name__
        else:
            if remark:
                tiny[i] = remark

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(paths), desc=f"decoding {name}", unit=" images", delay=2, disable=None)
        for _ in pool.map(one, range(len(paths))):
            bar.update()
        bar.close()
    return dict(sorted(failures.items())), dict(sorted(tiny.items()))


def writable(cache: Path) -> Path:
    """`cache`, or its stand-in in the user's cache folder where its own cannot be written."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        if os.access(cache.parent, os.W_OK):
            with tempfile.TemporaryFile(dir=cache.parent):
                return cache
    except OSError:
        pass
    place = hashlib.blake2b(str(cache.parent.resolve()).encode(), digest_size=6).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vit-lab", place)
    home.mkdir(parents=True, exist_ok=True)
    return home / cache.name


def some(items: Sequence[str], joint: str = ", ", most: int = 10) -> str:
    """The first few items and how many more there are."""
    rest = [f"... and {len(items) - most} more"] if len(items) > most else []
    return joint.join([*items[:most], *rest])
