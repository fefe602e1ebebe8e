"""Folders of runs: their names, their creation, and the locks that give them to one process."""

import atexit
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab.core.checkpoints import PARTIAL, explain_write_errors, write_json
from lab.core.errors import UserError
from lab.core.identity import different_constants

_SHORT = {"LEARNING_RATE": "lr", "BATCH_SIZE": "b", "EPOCHS": "e", "WEIGHT_DECAY": "wd"}
_WINDOWS = os.name == "nt"
_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')  # on Linux, macOS or Windows
_STALE_SECONDS = 60  # a folder is created within milliseconds, so an older partial one is left over


def check_name(name: str) -> None:
    """Raises: UserError, for a name that is not a valid folder name."""
    if _FORBIDDEN.search(name) or not name.isprintable() or name[:1] in ("", ".", " "):
        raise UserError(
            f"NAME={name!r} is not a folder name: use letters, digits, - and _, as in my-run-1"
        )
    if len(name.encode()) > 200:
        raise UserError(f"NAME={name[:30] + '...'!r} is too long: use at most 200 characters")


def valid_name(name: str) -> str:
    """Turns a dataset's or model's name, which may contain anything, into a folder name."""
    name = "".join(c if c.isprintable() else "_" for c in _FORBIDDEN.sub("_", name)).lstrip(". ")
    return name.encode()[:150].decode(errors="ignore") or "run"


def free_folder(
    results_dir: Path,
    name: str,
    same_name_runs: dict[Path, dict[str, Any]],
    constants: dict[str, Any],
) -> Path:
    """A free folder: the name, with the differing constants or a number appended if needed."""
    first = results_dir / name
    if _is_free(first):
        return first
    if constants and first in same_name_runs:
        keys = different_constants(same_name_runs[first]["constants"], constants)
        short = all(re.fullmatch(r"[\w.+-]{1,15}", str(constants.get(key))) for key in keys)
        if 0 < len(keys) <= 3 and short and "SEED" not in keys:
            words = "-".join(_abbreviated(key, constants.get(key)) for key in keys)
            stem, seed = re.fullmatch(r"(.*?)(-s\d+)?", name).groups()
            first = results_dir / f"{stem}-{words}{seed or ''}"[:200]
            if _is_free(first):
                return first
    number = 2
    while not _is_free(folder := first.with_name(f"{first.name}-{number}")):
        number += 1
    return folder


def _abbreviated(name: str, value: Any) -> str:
    """A constant for a folder's name, such as `lr0.003`, `e20` or `no-flip`."""
    word = _SHORT.get(name) or name.lower().replace("_", "-")
    if isinstance(value, bool):
        return word if value else f"no-{word}"
    return word + (f"{value:g}" if isinstance(value, float) else str(value).lower())


def _is_free(folder: Path) -> bool:
    try:
        return not folder.exists() or not any(folder.iterdir())
    except OSError:  # a file, or not readable
        return False


def create(folder: Path, config: dict[str, Any], locked: bool) -> bool:
    """Creates a run's folder with its config.json in it, completely or not at all.

    Args:
        folder: free, see `free_folder`.
        config: the content of config.json.
        locked: lock the folder, so that no process can take it in between.

    Returns: False, if another process created the folder first.
    """
    with explain_write_errors(folder):
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=PARTIAL))
        scratch.chmod(0o755)  # mkdtemp's folders are private
        try:
            write_json(scratch / "config.json", config)
            if locked:
                lock(scratch)
            with suppress(OSError):
                folder.rmdir()  # empty, or os.rename fails on Windows
            if _WINDOWS:
                unlock(scratch)  # Windows does not rename a folder with an open file
            try:
                os.rename(scratch, folder)
            except OSError:
                if _is_free(folder):
                    raise
                return False
            if (descriptor := _locks.pop(scratch.resolve(), None)) is not None:
                _locks[folder.resolve()] = descriptor
            elif locked:
                lock(folder)
            return True
        finally:
            unlock(scratch)
            shutil.rmtree(scratch, ignore_errors=True)


def prepare_results_dir(results_dir: Path, clean: bool) -> None:
    """Creates the folder of a script's runs if it does not exist.

    Args:
        results_dir: `results/<script>`.
        clean: remove the partial folders of processes that were killed while they created a run.

    Raises: UserError, if it cannot be created.
    """
    parents = (results_dir, *results_dir.absolute().parents)
    if not (nearest := next(path for path in parents if path.exists())).is_dir():
        raise UserError(f"RESULTS_DIR={str(results_dir)!r}: {nearest} is a file, not a folder")
    with explain_write_errors(results_dir):
        results_dir.mkdir(parents=True, exist_ok=True)
    for path in results_dir.glob(f".*{PARTIAL}") if clean else ():
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(path)


# --- Locks: the operating system releases them when the process ends, however it ends ---

_locks: dict[Path, int] = {}  # file descriptors by run folder
_owner = os.getpid()  # a forked process has a copy of `_locks` but does not own the locks


def lock(folder: Path) -> None:
    """Claims a run's folder for this process.

    Raises: UserError, if another process has claimed it.
    """
    key = folder.resolve()
    if key in _locks:
        return
    path = folder / ".lock"
    with explain_write_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock_file(descriptor)
        if not _is_file(descriptor, path):  # its owner has just ended and removed it
            os.close(descriptor)
            return lock(folder)
    except (BlockingIOError, PermissionError):
        owner = os.pread(descriptor, 20, 0).decode() if hasattr(os, "pread") else ""
        os.close(descriptor)
        raise UserError(
            f"{folder} is being trained by another process{owner and f' (process id {owner})'}: "
            "wait until it ends or stop it, or start a separate run with --name"
        ) from None
    except OSError:  # the file system does not support locks
        os.close(descriptor)
        return
    with suppress(OSError):  # a full disk must not prevent the lock
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    _locks[key] = descriptor


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_file(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # after the process id, which stays readable
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(folder: Path) -> None:
    descriptor = _locks.pop(folder.resolve(), None)
    if descriptor is None:
        return
    if _WINDOWS:  # which does not delete an open file
        os.close(descriptor)
    (folder / ".lock").unlink(missing_ok=True)
    if not _WINDOWS:
        os.close(descriptor)


@atexit.register
def unlock_all() -> None:
    for folder in list(_locks) if os.getpid() == _owner else ():
        with suppress(OSError):
            unlock(folder)
