"""Decoded photographs on disk: each split is one uint8 array in a file next to its images.

An image takes 3 * size**2 bytes: 0.2 MB for the center crop of 256 pixels that evaluation uses.
With random resized crops, training images are also stored uncropped, in up to 0.6 MB each for
inputs of 224 pixels (`Augmentation.crop_size`), so that small crops are not enlarged. The 3,680
training photographs of Oxford Pets take 0.7 GB, plus 1.9 GB for crops from 30 % of the area.
"""

import errno
import hashlib
import json
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from lab.core import UserError
from lab.data.images import TINY, Reading, abbreviate, read_image

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows, where a file in use cannot be removed anyway
    flock = None

_VERSION = 3  # increase it whenever `read_image` returns different pixels
_LEFTOVER_SECONDS = 60  # older unfinished files are abandoned
QUEUE = 4096  # images queued for decoding; each costs about a kilobyte while it waits


@dataclass(frozen=True)
class Decoded:
    """Decoded images.

    Args:
        array: uint8 (N, 3, size, size), memory-mapped and read-only; unreadable images are black.
        sizes: width and height of the originals in pixels; (1, 1) for an unreadable image.
        failures: the reason for each unreadable image, by index.
        remarks: for the user.
    """

    array: np.memmap
    sizes: list[tuple[int, int]]
    failures: dict[int, str]
    remarks: list[str]


def decode(paths: Sequence[Path], reading: Reading, cache: Path) -> Decoded:
    """Decodes all images as squares, or returns them from the cache if no file has changed.

    Args:
        paths: the images, in order.
        reading: size and interpolation, and whether to skip unreadable images.
        cache: path of the cache without its suffix. If its folder is not writable, the user's
            cache folder is used instead.

    Raises: UserError that names the unreadable images, unless they are to be skipped.
    """
    # Names are relative because the whole folder may move. Permissions count as well: fixing them
    # makes an image readable.
    names = [os.path.relpath(path, cache.parent) for path in paths]
    stats = [path.stat() if path.exists() else None for path in paths]  # None: a dangling link
    stamps = [stat and (stat.st_size, stat.st_mtime_ns, stat.st_mode) for stat in stats]
    identity = (_VERSION, reading.size, reading.interpolation, reading.whole, names, stamps)
    key = hashlib.blake2b(repr(identity).encode()).hexdigest()
    shape = (len(paths), 3, reading.size, reading.size)
    candidates = [cache, _user_cache(cache)]
    for path in candidates:
        found = _read_cache(path, key, shape)
        if found and (reading.skip_unreadable or not found[1]["failures"]):
            break
    else:
        found = _write_cache(_first_writable(candidates), key, shape, paths, reading)
    array, record = found
    failures = dict(record["failures"])
    sizes = [(width, height) for width, height in record["sizes"]]
    tiny = [
        f"{path.name} ({width}x{height} pixels)"
        for i, (path, (width, height)) in enumerate(zip(paths, sizes, strict=True))
        if min(width, height) < TINY and i not in failures
    ]
    if failures and not reading.skip_unreadable:
        raise UserError(
            f"{len(failures)} of {len(paths)} images cannot be read:\n  "
            + abbreviate([f"{paths[i]}: {reason}" for i, reason in failures.items()], "\n  ")
            + "\nRepair or delete them, or skip them with --skip-unreadable"
        )
    remarks = []
    if failures:
        skipped = abbreviate([paths[i].name for i in failures])
        remarks.append(f"unreadable images skipped ({len(failures)}): {skipped}")
    if tiny:
        remarks.append(f"images under {TINY} pixels enlarged ({len(tiny)}): {abbreviate(tiny)}")
    return Decoded(array, sizes, failures, remarks)


def open_array(path: Path) -> np.memmap:
    """A memory-mapped array whose pages are read when they are needed.

    It is read-only because a writable mapping, even copy-on-write, counts in full against memory
    limits such as `ulimit -d` and against strict overcommit.
    """
    return np.load(path, mmap_mode="r")


def prefetch(array: np.memmap, indices: Sequence[int]) -> None:
    """Makes the system read entries of a memory-mapped array from disk in the background.

    Without it, the first access to each page waits for the disk, and the system also reads ahead.
    If the images do not fit in memory and are read in random order, this reads many times more data
    than needed.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return
    size = array[0].nbytes
    for index in indices:
        start = array.offset + index * size
        page = start - start % mmap.PAGESIZE
        array.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def _read_cache(cache: Path, key: str, shape: tuple[int, ...]) -> tuple[np.memmap, dict] | None:
    """What `_write_cache` stored; None unless it is complete and made from exactly these files."""
    try:
        record = json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))
        array = open_array(cache.with_suffix(".npy"))
        if record["key"] != key or array.shape != shape or len(record["sizes"]) != len(array):
            return None
        return array, record
    except (OSError, EOFError, ValueError, LookupError, TypeError):  # missing, damaged, not ours
        return None


def _write_cache(
    cache: Path, key: str, shape: tuple[int, ...], paths: Sequence[Path], reading: Reading
) -> tuple[np.memmap, dict]:
    """Decodes all images into the cache; returns the array and a record of failures.

    Raises: UserError, if the disk is full.
    """
    data, notes = cache.with_suffix(".npy"), cache.with_suffix(".json")
    notes.unlink(missing_ok=True)  # marks the array as valid: removed first, written last
    _remove_leftovers(cache.parent)
    scratch = data.with_name(f"{data.name}.{secrets.token_hex(4)}.part")
    try:
        array = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=shape)
        with open(scratch, "r+b") as file:
            if flock:  # see _remove_leftovers
                with suppress(OSError):  # some network file systems have no locks
                    flock(file, LOCK_EX)
            if hasattr(os, "posix_fallocate"):  # a full disk would kill the process later
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
            failures, sizes = decode_into(array, paths, reading, cache.name)
        array.flush()
        del array  # Windows cannot rename a memory-mapped file
        os.replace(scratch, data)
        record = {"key": key, "failures": failures, "sizes": sizes}
        scratch.write_text(json.dumps(record), encoding="utf-8")
        os.replace(scratch, notes)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write {np.prod(shape) / 1e9:.2f} GB of decoded images to {data.parent} "
            f"({error.strerror})"
            + (": free some space there, or lower IMG_SIZE" if is_full else "")
        ) from error
    finally:
        with suppress(OSError):  # on Windows, after Ctrl-C: the file is still memory-mapped
            scratch.unlink(missing_ok=True)
    return open_array(data), record


def _remove_leftovers(folder: Path) -> None:
    """Removes unfinished files of processes that were killed.

    Whoever writes such a file holds a lock on it, which the system releases when the process ends.
    New files are kept: their lock may be about to be taken.
    """
    for path in folder.glob("*.part"):
        with suppress(OSError):
            with open(path, "rb") as file:
                if flock:
                    flock(file, LOCK_EX | LOCK_NB)  # fails while another process writes the file
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


def decode_into(
    array: np.ndarray, paths: Sequence[Path], reading: Reading, name: str
) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Decodes into `array` on all cores; returns failures with their indices, and all sizes."""
    failures: dict[int, str] = {}
    sizes = [(1, 1)] * len(paths)

    def read(i: int) -> None:
        try:
            array[i], sizes[i] = read_image(paths[i], reading)
        except UnidentifiedImageError:
            failures[i] = "not an image in a format that can be read, despite its file extension"
        except Exception as error:  # Pillow raises many exception types
            failures[i] = getattr(error, "strerror", None) or str(error) or type(error).__name__

    pool = ThreadPoolExecutor(os.cpu_count())
    bar = {"desc": f"decoding {name}", "unit": " images", "delay": 2, "disable": None}
    try:
        numbers = range(len(paths))
        queues = (numbers[i : i + QUEUE] for i in numbers[::QUEUE])
        done = chain.from_iterable(pool.map(read, queue) for queue in queues)
        for _ in tqdm(done, total=len(paths), **bar):
            pass
    finally:  # Ctrl-C does not wait for the images in the queue
        pool.shutdown(cancel_futures=True)
    return sorted(failures.items()), sizes


def _user_cache(cache: Path) -> Path:
    """Where a cache is stored in the user's cache folder if its own folder is not writable."""
    folder_hash = hashlib.blake2b(os.fsencode(cache.parent.resolve()), digest_size=6).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "vit-lab", folder_hash, cache.name)


def _first_writable(candidates: Sequence[Path]) -> Path:
    for path in candidates:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                return path
        except OSError:
            continue
    raise UserError(
        f"cannot write decoded images to any of {abbreviate([str(p.parent) for p in candidates])}. "
        "Set XDG_CACHE_HOME to a writable folder."
    )
