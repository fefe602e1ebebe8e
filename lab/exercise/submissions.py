"""Reads the submissions of students: a file, a folder or a zip file each.

Only Python files and the JSON records of runs are read, up to a size limit, and nothing is
unpacked: what is in a submission cannot choose where it goes.
"""

import json
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lab.core import UserError

_UNREADABLE = (  # that students hand in by mistake
    ".7z", ".rar", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".ipynb",
)  # fmt: skip
_RECORDS = ("config.json", "hand_in.json", "report.json")  # the JSON files that are read
_MAX_FILE = 2_000_000  # bytes of a file that is read
_MAX_TOTAL = 20_000_000  # bytes that are read of one submission
_MAX_ZIP = 500_000_000  # bytes of a zip file, most of them images
_MAX_ENTRIES = 20_000  # files in a zip file


@dataclass
class HandIn:
    """The files of one student that matter: Python code, and the JSON records of runs."""

    student: str
    files: dict[str, bytes] = field(default_factory=dict)  # path: content
    problem: str = ""  # why there is nothing to grade
    skipped: list[str] = field(default_factory=list)  # files that were not read, and why
    zips: list[Path] = field(default_factory=list)  # inside of the submission, and not read

    def add(self, name: str, read: Callable[[int], bytes]) -> None:
        """Reads a file that matters, unless it is too large.

        Args:
            name: its path inside the submission.
            read: takes a number and returns at most that many bytes of the file.
        """
        path = PurePosixPath(name)
        if path.suffix != ".py" and path.name not in _RECORDS:
            return
        if any(part.startswith(".") or part == "__pycache__" for part in path.parts):
            return  # a virtual environment, for example
        left = _MAX_TOTAL - sum(map(len, self.files.values()))
        content = read(min(_MAX_FILE, left) + 1)
        if len(content) > min(_MAX_FILE, left):
            self.skipped.append(f"{name} is too large")
        elif name in self.files:
            self.skipped.append(f"{name} is there twice")
        else:
            self.files[name] = content

    def find(self, name: str) -> str | None:
        """The path of the file with this name, in the fewest folders if there are several."""
        paths = [path for path in self.files if PurePosixPath(path).name == name]
        return min(paths, key=lambda path: (path.count("/"), path), default=None)

    @property
    def model(self) -> str | None:
        """The path of the model: as report.py --hand-in says, or model.py, or the only file."""
        python = [path for path in self.files if path.endswith(".py")]
        only = python[0] if len(python) == 1 else None
        return self._named("model") or self.find("model.py") or only

    @property
    def steps(self) -> str | None:
        """The path of the training steps: as report.py --hand-in says, or steps.py."""
        return self._named("steps") or self.find("steps.py")

    def _named(self, what: str) -> str | None:
        """The path of a file that report.py --hand-in names."""
        manifest = self.find("hand_in.json")
        named = read_json(self.files[manifest]).get(what) if manifest else None
        path = str(PurePosixPath(manifest).parent / named) if isinstance(named, str) else None
        return path if path in self.files else None


def read_submissions(folder: Path, not_these: Collection[str]) -> tuple[list[HandIn], list[str]]:
    """Reads the files of all students into memory.

    Args:
        folder: with one file, folder or zip file per student.
        not_these: names of files in the folder that are not submissions, such as grades.csv.

    Returns: the submissions, and the names of other files that are not submissions.
    Raises: UserError, if there are no submissions.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; --grade needs one with a submission per student"
        )
    found, ignored = [], []
    for path in sorted(folder.iterdir()):
        if path.name in not_these or path.name.startswith("."):
            continue
        name = path.name if path.is_dir() else path.stem
        hand_in = HandIn("".join(char if char.isprintable() else "?" for char in name))
        kind = path.suffix.lower()
        if path.is_symlink():
            hand_in.problem = "it is a symbolic link; links are not read"
        elif path.is_dir():
            _read_folder(path, hand_in)
        elif kind == ".zip":
            _read_zip(path, hand_in)
        elif kind == ".py":
            _read_file(path, "model.py", hand_in)
        elif kind in _UNREADABLE:
            hand_in.problem = f"{kind} files are not read: hand in a .py file, a folder or a .zip"
        else:
            ignored.append(path.name)
            continue
        if not hand_in.problem and hand_in.model is None:
            inside = f", but {hand_in.zips[0].name} is inside: unpack it" if hand_in.zips else ""
            hand_in.problem = f"there is no model.py{inside}"
        if not hand_in.problem:
            hand_in.skipped += [f"{path.name} was not read" for path in hand_in.zips]
        found.append(hand_in)
    names = Counter(hand_in.student for hand_in in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{folder} has several submissions of {', '.join(twice)}: keep one of each")
    if not found:
        raise UserError(f"there are no submissions in {folder}: put one .py file, folder or .zip "
                        "there for each student")  # fmt: skip
    return found, ignored


def _read_folder(folder: Path, hand_in: HandIn) -> None:
    for file in sorted(folder.rglob("*"), key=lambda path: (len(path.parts), path)):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            hand_in.skipped.append(f"{name} is a symbolic link")
        elif file.is_file():
            _read_file(file, name, hand_in)
            if _is_zip(name):
                hand_in.zips.append(file)
    if len(hand_in.zips) == 1 and hand_in.find("hand_in.json") is None:
        _read_inner_zip(hand_in.zips[0], hand_in)


def _read_inner_zip(path: Path, hand_in: HandIn) -> None:
    """Adds the files of a zip to those of the folder that it is in.

    Learning platforms store a zip in a folder. If there is a model beside it, only a zip of
    report.py --hand-in is read, and its files replace those with the same name.
    """
    zipped, beside = HandIn(hand_in.student), hand_in.model
    _read_zip(path, zipped)
    if beside and (zipped.problem or zipped.model is None or not zipped.find("hand_in.json")):
        return
    if beside and hand_in.files[beside] != zipped.files[zipped.model]:
        hand_in.skipped.append(
            f"{beside} is not graded, because it differs from {zipped.model} in {path.name}"
        )
    hand_in.files |= zipped.files
    hand_in.problem, hand_in.zips = zipped.problem, zipped.zips
    hand_in.skipped += zipped.skipped


def _is_zip(name: str) -> bool:
    """Whether a file inside a submission may be the real one; macOS adds files of its own."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() == ".zip" and not hidden


def _read_file(path: Path, name: str, hand_in: HandIn) -> None:
    try:
        with path.open("rb") as file:
            hand_in.add(name, file.read)
    except OSError as error:
        hand_in.skipped.append(f"{name} cannot be read ({error.strerror})")


def _read_zip(path: Path, hand_in: HandIn) -> None:
    """Reads files from a zip without unpacking it: nothing in it can choose where it goes."""
    try:
        if path.stat().st_size > _MAX_ZIP:
            raise OSError(f"larger than {_MAX_ZIP // 10**6} MB")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES:
                raise OSError(f"more than {_MAX_ENTRIES:,} files")
            for entry in sorted(entries, key=lambda entry: entry.filename.count("/")):
                name = entry.filename.replace("\\", "/")  # as some Windows programs write it
                if reason := _unsafe(entry, PurePosixPath(name)):
                    hand_in.skipped.append(f"{entry.filename} {reason}")
                elif not entry.is_dir():
                    with archive.open(entry) as file:
                        hand_in.add(name, file.read)
                    if _is_zip(name):
                        hand_in.zips.append(Path(name))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError,
            ValueError) as error:  # fmt: skip
        hand_in.problem = f"the zip file cannot be read ({error})"


def _unsafe(entry: zipfile.ZipInfo, path: PurePosixPath) -> str:
    """Why a file in a zip is not read; "" if it can be."""
    if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
        return "leaves the folder of the submission"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a symbolic link"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "uses an unsupported compression method"
    return ""


def read_json(content: bytes) -> dict[str, Any]:
    """A JSON object; {} if it is damaged or something else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
