"""Photographs are decoded once: all of a split as one uint8 array, in a file next to the images."""

import hashlib
import json
import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from lab.core import UserError
from lab.data.images import TINY, Reading, abbreviate, read_image

CACHE_VERSION = 1  # of what `read_image` gives: raise it when that changes
QUEUE = 4096  # images in line for decoding; each costs a kilobyte while it waits


def decode(
    paths: Sequence[Path], reading: Reading, cache: Path
) -> tuple[np.memmap, list[int], list[str]]:
    """Every image as one square, from the cache where the files are still the same.

    Args:
        paths: the images, in the order wanted.
        reading: side of the square and interpolation; whether to go on without the images that
            cannot be read.
        cache: where the array is kept, without ending; a folder that cannot be written is
            replaced by one among the user's caches.

    Returns: uint8 (N, 3, size, size), mapped from disk to be read alone; the indices of the images
        that could be read (the others are black); remarks for the user.
    Raises: UserError that names the unreadable images, unless they are to be skipped.
    """
    # Relative names: the whole folder may move. Permissions too: mending them mends the image.
    names = [os.path.relpath(path, cache.parent) for path in paths]
    stats = [path.stat() if path.exists() else None for path in paths]  # None: a dangling link
    stamps = [stat and (stat.st_size, stat.st_mtime_ns, stat.st_mode) for stat in stats]
    made = (CACHE_VERSION, reading.size, reading.interpolation, names, stamps)
    key = hashlib.blake2b(repr(made).encode()).hexdigest()
    shape = (len(paths), 3, reading.size, reading.size)
    places = [cache, stand_in(cache)]
    for place in places:
        found = recall(place, key, shape)
        if found and (reading.skip_unreadable or not found[1]["failures"]):
            break
    else:
        found = fill_cache(writable(places), key, shape, paths, reading)
    array, record = found
    failures = {i: f"{paths[i]}: {why}" for i, why in record["failures"]}
    tiny = [f"{paths[i].name} ({what})" for i, what in record["tiny"]]
    if failures and not reading.skip_unreadable:
        raise UserError(
            f"{len(failures)} of {len(paths)} images cannot be read:\n  "
            + abbreviate(list(failures.values()), "\n  ")
            + "\nRepair or delete them, or go on without them: --skip-unreadable"
        )
    remarks = []
    if failures:
        left_out = abbreviate([paths[i].name for i in failures])
        remarks.append(f"{len(failures)} unreadable images left out: {left_out}")
    if tiny:
        remarks.append(f"{len(tiny)} images under {TINY} pixels enlarged: {abbreviate(tiny)}")
    return array, [i for i in range(len(paths)) if i not in failures], remarks


def recall(cache: Path, key: str, shape: tuple[int, ...]) -> tuple[np.memmap, dict] | None:
    """What `fill_cache` kept at `cache`; None unless it is whole and made from these very files."""
    try:
        record = json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))
        array = mapped(cache.with_suffix(".npy"))
        return (array, record) if record["key"] == key and array.shape == shape else None
    except (OSError, EOFError, ValueError, LookupError, TypeError):  # missing, cut short, not ours
        return None


def fill_cache(
    cache: Path, key: str, shape: tuple[int, ...], paths: Sequence[Path], reading: Reading
) -> tuple[np.memmap, dict]:
    """Decodes all images into `cache`; the array, and a record of failures and tiny images.

    Raises: UserError, if there is no room for them.
    """
    data, notes = cache.with_suffix(".npy"), cache.with_suffix(".json")
    notes.unlink(missing_ok=True)  # it vouches for the array, so it goes first and comes last
    scratch = data.with_name(f"{data.name}.{secrets.token_hex(4)}.part")
    try:
        array = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
            with open(scratch, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        failures, tiny = fill(array, paths, reading, cache.name)
        array.flush()
        del array  # Windows does not move a file that is mapped
        os.replace(scratch, data)
        record = {"key": key, "failures": failures, "tiny": tiny}
        scratch.write_text(json.dumps(record), encoding="utf-8")
        os.replace(scratch, notes)
    except OSError as error:
        raise UserError(
            f"cannot keep {np.prod(shape) / 1e9:.2f} GB of decoded images in {data.parent} "
            f"({error.strerror}): make room there, or lower IMG_SIZE"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return mapped(data), record


def mapped(path: Path) -> np.memmap:
    """An array on disk, whose pages come and go as they are read.

    Read only: a map that could be written, even if copies alone, counts in full against limits of
    memory such as `ulimit -d`, or a kernel that promises no more than it has.
    """
    return np.load(path, mmap_mode="r")


def prefetch(array: np.memmap, indices: Sequence[int]) -> None:
    """Has the system read some entries of a mapped array from disk, while the caller goes on.

    Without it each first touch of a page waits for the disk, and brings along what lies around it:
    of images in random order that do not fit into memory, many times what is wanted.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return
    size = array[0].nbytes
    for index in indices:
        start = array.offset + index * size
        page = start - start % mmap.PAGESIZE
        array.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def fill(
    array: np.ndarray, paths: Sequence[Path], reading: Reading, name: str
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Decodes into `array` on all cores; returns failures and tiny images, index and what."""
    failures: dict[int, str] = {}
    tiny: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            array[i], remark = read_image(paths[i], reading)
        except UnidentifiedImageError:
            failures[i] = "no image, whatever its name says"
        except Exception as error:  # Pillow raises many kinds; each is this image's failure
            failures[i] = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            if remark:
                tiny[i] = remark

    pool = ThreadPoolExecutor(os.cpu_count())
    what = {"desc": f"decoding {name}", "unit": " images", "delay": 2, "disable": None}
    try:
        numbers = range(len(paths))
        lines = (numbers[i : i + QUEUE] for i in numbers[::QUEUE])
        done = chain.from_iterable(pool.map(one, line) for line in lines)
        for _ in tqdm(done, total=len(paths), **what):
            pass
    finally:  # Ctrl-C does not wait for the images still in line
        pool.shutdown(cancel_futures=True)
    return sorted(failures.items()), sorted(tiny.items())


def stand_in(cache: Path) -> Path:
    """Where a cache is kept among the user's caches when its own folder cannot be written."""
    place = hashlib.blake2b(os.fsencode(cache.parent.resolve()), digest_size=6).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "vit-lab", place, cache.name)


def writable(places: Sequence[Path]) -> Path:
    """The first cache whose folder can be written."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                return place
        except OSError:
            continue
    raise UserError(
        f"nowhere to keep decoded images: {abbreviate([str(p.parent) for p in places])} cannot be "
        "written. Set XDG_CACHE_HOME to a folder that can."
    )
