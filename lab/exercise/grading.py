"""Grades a folder of submissions: grades.csv and summary.md.

Each student has a file (alice.py), a folder (bob/) or a zip file of report.py --hand-in. All files
are read before the first submission runs, and each one runs on a copy, so a submission that writes
elsewhere cannot change what the others get.
"""

import csv
import hashlib
import json
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.core import UserError
from lab.exercise.checks import Result
from lab.exercise.processes import Job, run_checks

Points = dict[str, dict[str, float]]  # part: check: points
WRITTEN = ("grades.csv", "summary.md")
MAX_SIZE = 2_000_000  # bytes of a file that is read


@dataclass
class HandIn:
    """The files of one student that matter: Python code and the config.json of runs."""

    student: str
    files: dict[str, bytes] = field(default_factory=dict)  # path: content
    problem: str = ""  # why there is nothing to grade

    def find(self, name: str) -> str | None:
        """The path of the file with this name that lies least deep."""
        paths = [path for path in self.files if Path(path).name == name]
        return min(paths, key=lambda path: (path.count("/"), path), default=None)

    @property
    def model(self) -> str | None:
        python = [path for path in self.files if path.endswith(".py")]
        return self.find("model.py") or (python[0] if len(python) == 1 else None)


def grade(folder: Path, points: Points, job: Job, on_student: Callable[[str, float], None]) -> Path:
    """Grades all submissions in a folder.

    Args:
        folder: with one file, folder or zip file per student.
        points: for every check of every part.
        job: seed and limits; its files are replaced by each student's.
        on_student: called with name and points when a student is done.

    Returns: the path of the summary; grades.csv lies beside it.
    Raises: UserError if there are no submissions.
    """
    hand_ins = _read_submissions(folder)
    rows: list[dict[str, Any]] = []
    for hand_in in hand_ins:
        before = _snapshot(folder)
        results = [] if hand_in.problem else _run_submission(hand_in, job)
        changed = sorted(path for path, _ in before.items() ^ _snapshot(folder).items())
        graded = _rows_of(hand_in, results, points, changed)
        rows += graded
        _write_grades(folder / "grades.csv", rows)  # after each one, so that a crash loses little
        on_student(hand_in.student, sum(row["points"] for row in graded))
    path = folder / "summary.md"
    path.write_text(_summary(rows, points, job.seed), encoding="utf-8")
    return path


def _read_submissions(folder: Path) -> list[HandIn]:
    """Reads the files of all students into memory. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; --grade needs one with a submission per student"
        )
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in WRITTEN or path.name.startswith("."):
            continue
        hand_in = HandIn(path.stem if path.is_file() else path.name)
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if _wanted(file.name) and file.is_file() and file.stat().st_size <= MAX_SIZE:
                    hand_in.files[file.relative_to(path).as_posix()] = file.read_bytes()
        elif path.suffix == ".zip":
            _read_zip(path, hand_in)
        elif path.suffix == ".py":
            hand_in.files["model.py"] = path.read_bytes()
        else:
            continue
        if not hand_in.problem and hand_in.model is None:
            hand_in.problem = "there is no model.py"
        found.append(hand_in)
    if not found:
        raise UserError(f"there are no submissions in {folder}: put one .py file, folder or .zip "
                        "there for each student")  # fmt: skip
    return found


def _wanted(name: str) -> bool:
    return name.endswith(".py") or name == "config.json"


def _read_zip(path: Path, hand_in: HandIn) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                parts = Path(entry.filename).parts
                safe = ".." not in parts and not Path(entry.filename).is_absolute()
                if safe and _wanted(parts[-1]) and entry.file_size <= MAX_SIZE:
                    hand_in.files["/".join(parts)] = archive.read(entry)
    except (zipfile.BadZipFile, OSError, RuntimeError, IndexError) as error:
        hand_in.problem = f"the zip file cannot be read ({error})"


def _run_submission(hand_in: HandIn, job: Job) -> list[Result]:
    """Checks a copy of a student's files."""
    with tempfile.TemporaryDirectory(prefix="vit-grade-") as scratch:
        for name, content in hand_in.files.items():
            copy = Path(scratch, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        steps = hand_in.find("steps.py")
        own = replace(
            job,
            model_file=Path(scratch, hand_in.model),
            steps_file=Path(scratch, steps) if steps else None,
        )
        return run_checks(own)[0]


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file, to notice a submission that writes there."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in WRITTEN)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _rows_of(
    hand_in: HandIn, results: list[Result], points: Points, changed: list[str]
) -> list[dict[str, Any]]:
    """The rows of grades.csv for one student."""
    rows = []
    by_part = {result.part: result for result in results}
    for part in points:
        result = by_part.get(part, Result(part, failed="", says=hand_in.problem))
        earned = sum(points[part][check] for check in result.passed)
        says = result.says
        if changed:
            earned = 0.0
            says = f"the submission changed files of other submissions: {', '.join(changed)}"
        rows.append({
            "student": hand_in.student, "part": part, "points": round(earned, 4),
            "diagnosis": says, "mistakes": tuple(result.mistakes),
        })  # fmt: skip
    model = hand_in.files.get(hand_in.model or "", b"")
    for path, content in hand_in.files.items():
        if path.endswith("config.json") and (says := check_run(content, model)):
            name = Path(path).parent.as_posix()
            rows.append({"student": hand_in.student, "part": f"run {name}", "points": 0.0,
                         "diagnosis": says, "mistakes": ()})  # fmt: skip
    return rows


def check_run(config: bytes, model: bytes) -> str:
    """Whether a run belongs to the submitted model.py; "" if it does."""
    try:
        recorded = recorded_model_hash(json.loads(config))
    except ValueError:
        return "config.json cannot be read"
    if recorded is None:
        return "the run does not record which model.py it used, so this cannot be verified"
    if recorded != hashlib.sha256(model).hexdigest():
        return "the run was made with another model.py than the submitted one"
    return ""


def recorded_model_hash(config: Any) -> str | None:
    """The SHA-256 of the model.py that a run used, from its config.json.

    The seam to the identity of runs: the only place that knows where config.json keeps the hash.
    """
    code = config.get("code") if isinstance(config, dict) else None
    found = code.get("model.py") if isinstance(code, dict) else None
    return found if isinstance(found, str) else None


def _write_grades(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("student", "part", "points", "diagnosis"))
        for row in rows:
            writer.writerow([_cell(row[key]) for key in ("student", "part", "points", "diagnosis")])


def _cell(value: Any) -> Any:
    """A spreadsheet must not read text from a submission as a formula."""
    return (
        f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
    )


def _summary(rows: list[dict[str, Any]], points: Points, seed: int) -> str:
    """A page with points by student and part, and the mistakes by frequency."""
    students = list(dict.fromkeys(row["student"] for row in rows))
    total = sum(sum(checks.values()) for checks in points.values())
    earned = {(row["student"], row["part"]): row["points"] for row in rows}
    lines = [
        "# Grades",
        "",
        f"{len(students)} submissions, {total:g} points each at most.",
        "",
        f"| student | {' | '.join(points)} | total |",
        f"|---|{'---|' * (len(points) + 1)}",
    ]
    for student in students:
        cells = [earned[student, part] for part in points]
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {_markdown(student)} | {shown} | **{sum(cells):.2f}** |")
    counts = Counter(
        (row["part"], " + ".join(row["mistakes"][:1])) for row in rows if row["mistakes"]
    )
    lines += ["", "## Mistakes by frequency", "", "| part | mistake | students |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {n} |" for (part, name), n in counts.most_common()]
    lines += ["", "## Diagnoses", ""]
    lines += [
        f"- **{_markdown(row['student'])}**, {row['part']}: {_markdown(row['diagnosis'])}"
        for row in rows
        if row["diagnosis"]
    ]
    lines += [
        "",
        "## How these points came about",
        "",
        f"Inputs and parameters were random, with seed {seed}. The checks have the hash "
        f"`{checks_hash()}`: with the same hash and seed the points can be reproduced.",
        "",
        "Each submission ran in a process with limits on time, memory and file size. That is not "
        "a sandbox: its code had all rights of the user who started the grading, and code that "
        "aims at the checks can deceive them.",
    ]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def checks_hash() -> str:
    """SHA-256 over the code of the checks, to tell whether they were changed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
