"""A run's folder: its configuration, its history, and its result.

    results/<script>/<run>/config.json  history.csv  metrics.json  predictions.csv  *.png
                           best.safetensors  last.pt  (these two are not committed)

The constants, the data and the code that determines the result identify a run. The same command
finds its folder again; with other constants or other code it gets a new folder, so that nothing is
overwritten unless the user asks for it.
"""

import atexit
import csv
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lab.core.checkpoints import (
    PARTIAL,
    explain_write_errors,
    read_json,
    write_atomically,
    write_json,
    write_rows,
)
from lab.core.errors import UserError
from lab.core.runtime import (
    RUN_FOLDERS_VARIABLE,
    SCHEMA,
    code_hashes,
    process_state,
    provenance,
)

_SHORT = {"LEARNING_RATE": "lr", "BATCH_SIZE": "b", "EPOCHS": "e", "WEIGHT_DECAY": "wd"}
_STALE_SECONDS = 60  # a folder is created within milliseconds, so an older partial one is left over


@dataclass(frozen=True)
class Run:
    """The folder of one run and the records in it."""

    folder: Path
    SCHEMA: ClassVar[int] = SCHEMA
    NOT_IDENTITY: ClassVar[tuple[str, ...]] = (  # constants that do not change the result
        "NAME", "OVERWRITE", "DATA_DIR", "RESULTS_DIR", "NUM_SEEDS", "TENSORBOARD", "SNAPSHOTS",
        "RESUME_CHANGED_CODE",
    )  # fmt: skip
    FOLDERS_VARIABLE: ClassVar[str] = RUN_FOLDERS_VARIABLE  # `open` writes to the file it names

    @classmethod
    def open(
        cls,
        results_dir: Path,
        name: str,
        constants: dict[str, Any],
        metadata: dict[str, Any],
        overwrite: bool,
        resume_changed_code: bool = False,
        shared: bool = False,
        scripts: tuple[Path, ...] = (),
    ) -> "Run":
        """Finds the folder of this run, or creates it, and locks it for this process.

        Args:
            results_dir: `results/<script>`.
            name: the run's name, unless another run already has it.
            constants: every constant, as resolved.
            metadata: further entries of config.json, such as the model and the dataset, whose
                fingerprint is part of the identity.
            overwrite: start over, replacing the records of the same run.
            resume_changed_code: a stopped run resumes although the code has changed since; its
                config.json keeps the hashes of the earlier code.
            shared: several processes may work in the folder, so it is not locked.
            scripts: further scripts that determine the result, besides the running one.

        Raises: UserError, for an invalid folder name, a run that another process is training right
            now, or a folder that cannot be written.
        """
        main = process_state().is_main_process
        identifying = {k: v for k, v in constants.items() if k not in cls.NOT_IDENTITY}
        identity = {
            "constants": identifying,
            "data": metadata["dataset"]["fingerprint"],
            "code": code_hashes() | (code_hashes(*scripts) if scripts else {}),
        }
        has_user_name = constants.get("NAME") is not None
        if has_user_name:
            _check_name(name)
        else:
            name = _valid_name(name)
        parents = (results_dir, *results_dir.absolute().parents)
        if not (nearest := next(path for path in parents if path.exists())).is_dir():
            raise UserError(f"RESULTS_DIR={str(results_dir)!r}: {nearest} is a file, not a folder")
        with explain_write_errors(results_dir):
            results_dir.mkdir(parents=True, exist_ok=True)
        if main:
            _remove_leftovers(results_dir)
        while True:
            same_name_runs = _runs_named(results_dir, name)
            matching = (f for f, config in same_name_runs.items() if _equal(config, identity))
            existing = next(matching, None)
            if not existing and not overwrite and resume_changed_code:
                existing = _stopped_with_other_code(same_name_runs, identity)
                if existing and main:
                    _lock(existing)
                    _adopt_code(existing, same_name_runs[existing], identity)
            if existing and not (overwrite and main):
                if main and not shared and not (existing / "metrics.json").exists():
                    _lock(existing)
                    for leftover in existing.rglob(f"*{PARTIAL}"):
                        leftover.unlink(missing_ok=True)
                break
            if existing:
                if not shared and not (existing / "metrics.json").exists():
                    _lock(existing)  # no other process may be training it
                print(f"{existing}: starting over and replacing the earlier records")
                _unlock(existing)
                with explain_write_errors(existing):
                    shutil.rmtree(existing)
            # A name that the user did not choose shows how the run differs.
            distinguishing = {} if has_user_name else identifying
            folder = existing or _free_folder(results_dir, name, same_name_runs, distinguishing)
            content = {"name": name, **identity, **metadata, **provenance()}
            if _create(folder, content, main and not shared):
                if main and same_name_runs and not existing:
                    print(_explain_new_folder(same_name_runs, identity, folder))
                existing = folder
                break  # else another process has just taken the folder
            overwrite = False
        if main:
            cls.announce(existing)
        return cls(existing)

    @classmethod
    def announce(cls, folder: Path) -> None:
        """Tells the program that started this script, if there is one, where its results are."""
        if report := os.environ.get(cls.FOLDERS_VARIABLE):
            with explain_write_errors(Path(report)), open(report, "a", encoding="utf-8") as file:
                file.write(f"{folder}\n")

    @classmethod
    def newest(cls, results_dir: Path, advice: str) -> Path:
        """The folder below `results_dir` of the run that finished last.

        Args:
            results_dir: `results/<script>`.
            advice: the command that makes such a run.

        Raises: UserError, if no run has finished there.
        """
        found = list(results_dir.glob("*/metrics.json"))
        if not found:
            raise UserError(
                f"there is no finished run in {results_dir}: make one with {advice}, or name a "
                "model, such as --model weights/vit_128x6_cifar10.safetensors"
            )
        return max(found, key=lambda path: path.stat().st_mtime).parent

    @staticmethod
    def describe_differences(one: dict[str, Any], other: dict[str, Any]) -> str:
        """What distinguishes two identities: constants, data and code.

        Args:
            one: the recorded identity: "constants", "data" and, in newer records, "code".
            other: the identity of this run.
        """
        a, b = one["constants"], other["constants"]
        keys = _different(a, b)
        found = [f"{k}: {a.get(k)} there, {b.get(k)} in this run" for k in keys[:3]]
        if len(keys) > 3:
            found.append(f"and {len(keys) - 3} more")
        if one.get("data") != other.get("data"):
            found.append("different data")
        if one.get("code") != other.get("code"):
            found.append(f"{_changed_files(one, other)} changed")
        return "; ".join(found)

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json. Raises: UserError, if it cannot be read."""
        return read_json(self.folder / "metrics.json")

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises: UserError, if it cannot be read."""
        return read_json(self.folder / "config.json")

    def history(self) -> list[dict[str, Any]]:
        """The rows of history.csv, with numbers as numbers.

        Raises: UserError, if the file cannot be read.
        """
        path = self.folder / "history.csv"
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return [
                    {k: json.loads(v or "null") for k, v in row.items()}
                    for row in csv.DictReader(file)
                ]
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}; --overwrite repeats the run"
            ) from error
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} is damaged; --overwrite repeats the run") from error

    def summary(self) -> str:
        """The result in two lines; the second is the path of the curves."""
        m = self.metrics()
        try:
            low, high = (100 * share for share in m["test_accuracy_95"])
            if not 0 <= m["test_accuracy"] <= 1:
                raise ValueError(m["test_accuracy"])
            return (
                f"test accuracy {100 * m['test_accuracy']:.2f} % (95 % interval {low:.1f} to "
                f"{high:.1f}, {m['test_images']} images), epoch {m['best_epoch']} of "
                f"{m['epochs']}, {m['training_seconds']:.0f} s of training\n"
                f"{self.folder / 'curves.png'}"
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            path = self.folder / "metrics.json"
            raise UserError(f"{path} is damaged; --overwrite repeats the run") from error

    def say_finished(self) -> None:
        """Prints the result of a run that need not be trained again."""
        if process_state().is_main_process:
            print(f"{self.summary()}\nthis run is finished; --overwrite repeats it")

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Replaces history.csv, as when a resumed run repeats an epoch."""
        write_atomically(self.folder / "history.csv", lambda scratch: write_rows(scratch, rows))

    def append_history(self, row: dict[str, Any]) -> None:
        """Appends an epoch's row; other programs can read the file during training."""
        path = self.folder / "history.csv"
        with (
            explain_write_errors(path),
            open(path, "a", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


# --- Identity ---


def _runs_named(results_dir: Path, name: str) -> dict[Path, dict[str, Any]]:
    """The configs of all runs with this name, by folder: first `name`, then `name-2`, ..."""
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    found = {}
    for path in results_dir.glob("*/config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.get("name") == name or numbered.fullmatch(path.parent.name):
                _ = config["constants"].items(), config["data"]
                found[path.parent] = config
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not a run, or damaged; the folder name counts as taken
    return dict(sorted(found.items(), key=lambda item: (len(item[0].name), item[0].name)))


def _equal(recorded: dict[str, Any], identity: dict[str, Any]) -> bool:
    return (
        recorded["data"] == identity["data"]
        and recorded.get("code") == identity["code"]
        and not _different(recorded["constants"], identity["constants"])
    )


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The constants that differ; `pets`, `pets/` and `./pets` are one folder."""

    def plain(value: Any) -> Any:
        if isinstance(value, str) and value and "\0" not in value and os.path.exists(value):
            return os.path.realpath(value)
        return list(value) if isinstance(value, tuple) else value  # as JSON stores it

    return [k for k in {**one, **other} if plain(one.get(k)) != plain(other.get(k))]


def _differing_files(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The files whose code differs, model.py and the script first."""
    a, b = ((x["code"] if isinstance(x.get("code"), dict) else {}) for x in (one, other))
    files = (file for file in {**b, **a} if a.get(file) != b.get(file))
    return sorted(files, key=lambda file: (file.count("/"), file))


def _changed_files(one: dict[str, Any], other: dict[str, Any]) -> str:
    a, b = one.get("code"), other.get("code")
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "the code (which that run did not record) may have"
    files = _differing_files(one, other)
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    have = "has" if len(files) == 1 else "have"
    return f"{', '.join(files[:3])}{more} {have}"


def _stopped_with_other_code(
    same_name_runs: dict[Path, dict[str, Any]], identity: dict[str, Any]
) -> Path | None:
    """The newest unfinished run that differs from an identity only in its code."""
    for folder, recorded in reversed(same_name_runs.items()):
        is_finished = (folder / "metrics.json").exists()
        if not is_finished and _equal({**recorded, "code": identity["code"]}, identity):
            return folder
    return None


def _adopt_code(folder: Path, config: dict[str, Any], identity: dict[str, Any]) -> None:
    """Records in config.json that a run continues with other code."""
    print(f"{folder} resumes although {_changed_files(config, identity)} changed; recorded")
    entry = {"code": config.get("code"), "until": provenance()["started"]}
    earlier = [*config.get("earlier_code", []), entry]
    content = {**config, "code": identity["code"], "earlier_code": earlier}
    write_json(folder / "config.json", content)


def _explain_new_folder(
    same_name_runs: dict[Path, dict[str, Any]], identity: dict[str, Any], folder: Path
) -> str:
    """One line that says why a run gets a new folder, by comparison with the most similar run."""

    def distance(item: tuple[Path, dict[str, Any]]) -> tuple[int, int]:
        recorded = item[1]
        inputs = len(_different(recorded["constants"], identity["constants"]))
        inputs += recorded["data"] != identity["data"]
        return inputs, len(_differing_files(recorded, identity))

    # The newest of equally close ones.
    closest, recorded = min(reversed(same_name_runs.items()), key=distance)
    new = f"starting a new run, {folder}"
    if distance((closest, recorded))[0]:
        differences = Run.describe_differences(recorded, identity)
        if len(same_name_runs) > 1:
            more = f"{closest} and {len(same_name_runs) - 1} other runs have different settings"
            return f"{more} ({closest.name}: {differences}): {new}"
        return f"{closest} has different settings ({differences}): {new}"
    since = f" since {recorded['started']}" if recorded.get("started") else ""
    line = f"{_changed_files(recorded, identity)} changed{since}: {new}"
    if not (closest / "metrics.json").exists():
        line += (
            f" ({closest} was stopped: undo the change to resume it, or resume it with the changed "
            "code by adding --resume-changed-code)"
        )
    return line


# --- Folders ---


_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')  # on Linux, macOS or Windows


def _check_name(name: str) -> None:
    """Raises: UserError, for a name that is not a valid folder name."""
    if _FORBIDDEN.search(name) or not name.isprintable() or name[:1] in ("", ".", " "):
        raise UserError(
            f"NAME={name!r} is not a folder name: use letters, digits, - and _, as in my-run-1"
        )
    if len(name.encode()) > 200:
        raise UserError(f"NAME={name[:30] + '...'!r} is too long: use at most 200 characters")


def _valid_name(name: str) -> str:
    """Turns a dataset's or model's name, which may contain anything, into a folder name."""
    name = "".join(c if c.isprintable() else "_" for c in _FORBIDDEN.sub("_", name)).lstrip(". ")
    return name.encode()[:150].decode(errors="ignore") or "run"


def _free_folder(
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
        keys = _different(same_name_runs[first]["constants"], constants)
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


def _create(folder: Path, config: dict[str, Any], lock: bool) -> bool:
    """Creates a run's folder with its config.json in it, completely or not at all.

    Returns: False, if another process created the folder first.
    """
    with explain_write_errors(folder):
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=PARTIAL))
        scratch.chmod(0o755)  # mkdtemp's folders are private
        try:
            write_json(scratch / "config.json", config)
            if lock:
                _lock(scratch)
            with suppress(OSError):
                folder.rmdir()  # empty, or os.rename fails on Windows
            try:
                os.rename(scratch, folder)
            except OSError:
                if _is_free(folder):
                    raise
                return False
            if lock:
                _locks[folder.resolve()] = _locks.pop(scratch.resolve())
            return True
        finally:
            _unlock(scratch)
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(results_dir: Path) -> None:
    """Removes the partial folders of processes that were killed while they created a run."""
    for path in results_dir.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(path)


# --- Locks: the operating system releases them when the process ends, however it ends ---

_locks: dict[Path, int] = {}  # file descriptors by run folder
_owner = os.getpid()  # a forked process has a copy of `_locks` but does not own the locks


def _lock(folder: Path) -> None:
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
            return _lock(folder)
    except (BlockingIOError, PermissionError):
        owner = os.pread(descriptor, 20, 0).decode() if hasattr(os, "pread") else ""
        os.close(descriptor)
        raise UserError(
            f"{folder} is being trained by another process{owner and f' (process id {owner})'}: "
            "wait until it ends or stop it, or give this run a --name of its own"
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


def _unlock(folder: Path) -> None:
    descriptor = _locks.pop(folder.resolve(), None)
    if descriptor is not None:
        (folder / ".lock").unlink(missing_ok=True)
        os.close(descriptor)


@atexit.register
def _unlock_all() -> None:
    for folder in list(_locks) if os.getpid() == _owner else ():
        with suppress(OSError):
            _unlock(folder)
