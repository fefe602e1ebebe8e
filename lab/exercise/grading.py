"""Grades a folder of submissions: grades.csv, totals.csv and summary.md.

Each student has a file (alice.py), a folder (bob/) or the zip file of report.py --hand-in. All
files are read before the first submission runs, and each one runs on a copy, so a submission that
writes elsewhere cannot change what the others get.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from lab.core import UserError, checkpoints, runtime
from lab.exercise.checks import Result
from lab.exercise.processes import Job, run_checks
from lab.exercise.submissions import HandIn, read_json, read_submissions

Points = dict[str, dict[str, float]]  # part: check: points
_PART = "grades.part.csv"  # the grades so far
_WRITTEN = ("grades.csv", _PART, "grades-previous.csv", "totals.csv", "summary.md")
_EXCEL = "utf-8-sig"  # without the mark, Excel garbles umlauts
_NOT_OWN_MODEL = ("cnn_baseline.py", "finetune_swin.py", "sweep.py")  # do not train model.py


@dataclass
class _Row:
    """What grading found for one part, run or file of a student."""

    student: str
    part: str
    points: float
    diagnosis: str
    mistakes: list[str] = field(default_factory=list)  # only for the summary


def grade(folder: Path, points: Points, job: Job, on_student: Callable[[str, float], None]) -> Path:
    """Grades all submissions in a folder.

    Args:
        folder: with one file, folder or zip file per student.
        points: for every check of every part.
        job: seed and limits; its files are replaced by each student's.
        on_student: called with name and points when a student is done.

    Returns: the path of the summary. Beside it are grades.csv, with a row for each part, and
        totals.csv. The grades of an earlier run are in grades-previous.csv.
    Raises: UserError if there are no submissions, or if grades.csv cannot be replaced.
    """
    hand_ins, ignored = read_submissions(folder, _WRITTEN)
    rows: list[_Row] = []
    grades, part, totals = (folder / name for name in ("grades.csv", _PART, "totals.csv"))
    for path in (folder / name for name in _WRITTEN):
        if path.exists():
            with _explain_locks():
                path.open("a").close()
    for hand_in in hand_ins:
        before = _snapshot(folder)
        results = [] if hand_in.problem else _run_submission(hand_in, job)
        after = _snapshot(folder)
        changed = sorted(path for path in before if before[path] != after.get(path))
        graded = _rows_of(hand_in, results, points, changed)
        rows += graded
        # After each submission, so that an interruption loses little.
        with _explain_locks():
            checkpoints.write_rows(part, [_cells(row) for row in rows], encoding=_EXCEL)
        on_student(hand_in.student, sum(row.points for row in graded))
    path = folder / "summary.md"
    text = _summary(rows, hand_ins, ignored, points, job.seed)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    with _explain_locks(f". The new grades are in {part}"):
        checkpoints.write_rows(totals, _totals(rows), encoding=_EXCEL)
        if grades.exists():
            grades.replace(folder / "grades-previous.csv")
        part.replace(grades)
    return path


@contextmanager
def _explain_locks(where: str = "") -> Iterator[None]:
    """Turns a failure to write, such as a file that Excel shows and locks, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename} cannot be written ({error.strerror}): close it "
            f"in your spreadsheet program{where}"
        ) from error


def _run_submission(hand_in: HandIn, job: Job) -> list[Result]:
    """Checks a copy of a student's files."""
    with tempfile.TemporaryDirectory(prefix="vit-grade-") as scratch:
        steps = hand_in.steps
        for name, content in hand_in.files.items():
            if not name.endswith(".py"):
                continue
            copy = Path(scratch, name)
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
            except (OSError, ValueError) as error:  # such as a name that is too long
                hand_in.skipped.append(f"{name} cannot be copied ({error})")
                if name in (hand_in.model, steps):
                    hand_in.problem = hand_in.skipped[-1]
                    return []
        own = replace(
            job,
            model_file=Path(scratch, hand_in.model),
            steps_file=Path(scratch, steps) if steps else None,
        )
        return run_checks(own)[0]


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file, to notice a submission that writes there."""
    files = (
        path for path in folder.rglob("*")
        if path.is_file() and path.name not in _WRITTEN and not path.name.startswith(".")
    )  # fmt: skip
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _rows_of(
    hand_in: HandIn, results: list[Result], points: Points, changed: list[str]
) -> list[_Row]:
    rows = []
    by_part = {result.part: result for result in results}
    for part in points:
        result = by_part.get(part, Result(part, says=hand_in.problem))
        earned = sum(points[part].get(check, 0) for check in result.passed)
        rows.append(_Row(hand_in.student, part, round(earned, 4), result.says, result.mistakes))
    remarks = [*check_runs(hand_in), *(("files", says) for says in hand_in.skipped[:20])]
    if changed:  # all submissions were read before, so it cannot have changed their points
        says = (
            f"{', '.join(changed[:5])} changed while this submission was checked: if you did not "
            "change it yourself, read the code of this submission"
        )
        remarks.append(("files", says))
    return rows + [_Row(hand_in.student, part, 0.0, says) for part, says in remarks]


def check_runs(hand_in: HandIn) -> list[tuple[str, str]]:
    """The runs that do not belong to the submitted model.py: pairs of a run and what is wrong."""
    if hand_in.model is None:
        return []
    model = runtime.source_hash(hand_in.files[hand_in.model])
    wrong = []
    for path, config in _runs_of_model(hand_in).items():
        if says := _check_run(config, model):
            wrong.append((f"run {PurePosixPath(path).parent}", says))
    return wrong


def _runs_of_model(hand_in: HandIn) -> dict[str, dict[str, Any]]:
    """The config.json of every run that used a model.py, by path; {} for a damaged file."""
    found = {}
    for path, content in hand_in.files.items():
        if PurePosixPath(path).name == "config.json":
            config = read_json(content)
            words = str(config.get("command")).split()
            is_own = not re.search(r"(^|/)(results/official|theory)/", path)  # of this project
            is_run = not config or "command" in config  # share.py writes config.json files, too
            constants = config.get("constants")
            timm = isinstance(constants, dict) and constants.get("MODEL", "vit") != "vit"
            scripts = {PurePosixPath(word).name for word in words}
            other_model = not scripts.isdisjoint(_NOT_OWN_MODEL) or (timm and "train.py" in scripts)
            if is_own and is_run and not other_model:
                found[path] = config
    return found


def _check_run(config: dict[str, Any], model: str) -> str:
    """What is wrong with a run's config.json; "" if it names the model with this hash."""
    if not config:
        return "config.json cannot be read"
    code = config.get("code")
    recorded = code.get("model.py") if isinstance(code, dict) else None
    if not isinstance(recorded, str):
        return "the run does not record which model.py it used, so this cannot be verified"
    if recorded != model:
        return "the run was made with a different model.py than the submitted one"
    return ""


def _cells(row: _Row) -> dict[str, str | float]:
    """A row of grades.csv; a spreadsheet must not read text from a submission as a formula."""
    cells = {name: getattr(row, name) for name in ("student", "part", "points", "diagnosis")}
    for name, cell in cells.items():
        if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")):
            cells[name] = f"'{cell}"
    return cells


def _totals(rows: list[_Row]) -> list[dict[str, str | float]]:
    """The rows of totals.csv: each student's sum."""
    of_students = [list(map(_cells, same)) for _, same in groupby(rows, lambda row: row.student)]
    return [
        {"student": cells[0]["student"], "points": round(sum(row["points"] for row in cells), 4)}
        for cells in of_students
    ]


def _summary(
    rows: list[_Row], hand_ins: list[HandIn], ignored: list[str], points: Points, seed: int
) -> str:
    """A page with points by student and part, the mistakes by frequency, and the hand-ins."""
    students = list(dict.fromkeys(row.student for row in rows))
    total = sum(sum(checks.values()) for checks in points.values())
    earned = {(row.student, row.part): row.points for row in rows}
    lines = [
        "# Grades",
        "",
        f"{len(students)} submissions, {total:g} points each at most."
        + f" Not graded, because they are not submissions: {_markdown(', '.join(ignored))}."
        * bool(ignored),
        "",
        f"| student | {' | '.join(points)} | total |",
        f"|---|{'---|' * (len(points) + 1)}",
    ]
    for student in students:
        cells = [earned[student, part] for part in points]
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {_markdown(student)} | {shown} | **{sum(cells):.2f}** |")
    counts = Counter((row.part, row.mistakes[0]) for row in rows if row.mistakes)
    lines += ["", "## Mistakes by frequency", "", "| part | mistake | students |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {n} |" for (part, name), n in counts.most_common()]
    lines += [
        "", "## Runs and records", "",
        "| student | runs that belong to the submitted model.py | missing | solution shown for |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for hand_in in hand_ins:
        runs = len(_runs_of_model(hand_in))
        right = runs - len(check_runs(hand_in)) if hand_in.model else 0
        cells = [f"{right} of {runs}", *_own_records(hand_in)]
        lines.append(f"| {_markdown(hand_in.student)} | {' | '.join(map(_markdown, cells))} |")
    lines += ["", "## Diagnoses", ""]
    for (student, says), same in groupby(rows, lambda row: (row.student, row.diagnosis)):
        if says:
            parts = ", ".join(row.part for row in same)
            lines.append(f"- **{_markdown(student)}**, {parts}: {_markdown(says)}")
    lines += [
        "",
        "## How the points were computed",
        "",
        f"Inputs and parameters were random, with seed {seed}. The checks have the hash "
        f"`{checks_hash()}`: with the same hash and seed the points can be reproduced.",
        "",
        "Each submission ran in a process with limits on time, memory and file size. That is not "
        "a sandbox: its code had all rights of the user who started the grading, and code "
        "that is written to deceive the checks can do so.",
    ]
    return "\n".join(lines) + "\n"


def _own_records(hand_in: HandIn) -> tuple[str, str]:
    """What the zip of report.py --hand-in says is missing, and where the student gave up."""
    content = read_json(hand_in.files.get(hand_in.find("hand_in.json") or "", b""))
    if not content:
        return "not recorded", "not recorded"
    try:
        missing = [
            f"{task['task']}: {item['what']}"
            for task in content["tasks"] for item in task["items"] if not item["found"]
        ]  # fmt: skip
        gave_up = map(str, content["exercise"].get("gave_up", []))
        return "; ".join(missing) or "nothing", ", ".join(gave_up) or "nothing"
    except (KeyError, TypeError, AttributeError):
        return "damaged", "damaged"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def checks_hash() -> str:
    """SHA-256 over the code of the checks, to tell whether they were changed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} {checkpoints.text_hash(path)}\n".encode())
    return digest.hexdigest()[:16]
