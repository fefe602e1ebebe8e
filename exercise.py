"""The exercise of the lab: write model.py, and let this script check it.

    python exercise.py                                 # check all parts, explain the first mistake
    python exercise.py --part attention                # one part
    python exercise.py --hint                          # the next of three hints
    python exercise.py --watch                         # check again whenever the file is saved
    python exercise.py --hand-out ../lab-for-students  # for teachers: the student version
    python exercise.py --grade ../submissions          # for teachers: grades, totals and a summary

Every constant is also a flag. Submissions are compared with timm's modules on random inputs, and
run in processes with limits on time and memory, which are not a sandbox. The README of a
hand-out, or exercise/README.md, says more.
"""

import difflib
import inspect
import json
import os
import pkgutil
import secrets
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab.core import UserError, checkpoints, constants, runtime
from lab.exercise import LOADING, PARTS, Job, Result, checks_hash, grade, hand_out, run_checks

# --- What is checked ---
MODEL_FILE: str = "model.py"  # the student's model
STEPS_FILE: str = "exercise/steps.py"  # the student's steps; if missing, MODEL_FILE is used
PART: str | None = None  # the part to check, such as attention; None: all parts
HINT: bool = False  # show the next hint for the first part that fails
WATCH: bool = False  # check again whenever a file is saved
SOLUTION: str | None = None  # show the solution of a part that passes
GIVE_UP: bool = False  # with --solution: show it even if the part fails; the report records this

# --- For teachers ---
HAND_OUT: str | None = None  # write the student version of this repository to a new folder
GRADE: str | None = None  # grade the submissions in a folder: a file, folder or zip per student

# --- Limits ---
SECONDS: float = 10.0  # CPU time limit per part, in seconds
MEMORY_MB: int = 2000  # memory limit per submission in MB, not counting PyTorch itself
SEED: int | None = None  # seed of the random inputs; None: a new one on every run
RESULTS_DIR: str = "results/exercise"  # folder of the report, which also records the hints shown

POINTS = {  # Task II of the lab sheet, one point in all: part, check, points
    "PatchEmbed": {"shapes": 0.03, "values": 0.06, "gradients": 0.02, "released weights": 0.02},
    "MLP": {"shapes": 0.03, "values": 0.06, "gradients": 0.02, "released weights": 0.02},
    "Attention": {
        "shapes": 0.04, "values": 0.12, "gradients": 0.02, "options": 0.02,
        "released weights": 0.04,
    },
    "Block": {
        "shapes": 0.02, "values": 0.08, "gradients": 0.02, "options": 0.02,
        "released weights": 0.02,
    },
    "VisionTransformer": {
        "shapes": 0.03, "values": 0.08, "gradients": 0.02, "options": 0.03,
        "released weights": 0.03,
    },
    "training_step": {"loss": 0.02, "update": 0.02, "train mode": 0.01},
    "evaluate": {"accuracy": 0.02, "eval mode": 0.01, "no gradients": 0.01},
    "replace_head": {"new head": 0.02, "frozen layers": 0.04},
}  # fmt: skip
WEIGHTS = Path(__file__).resolve().parent / "weights" / "vit_128x6_cifar10.safetensors"
BAR, WIDTH = 20, 100  # characters of the progress bar, and of a line


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not every console on Windows can print the bars
        sys.stdout.reconfigure(errors="replace")
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if c.HAND_OUT:
        target = Path(c.HAND_OUT).expanduser()
        print(f"students write: {', '.join(hand_out(target))}\n{target}")
    elif c.GRADE:
        if c.PART:
            raise UserError("--grade grades all parts: leave out --part")
        print(grade(Path(c.GRADE).expanduser(), POINTS, job(c), print_student))
    elif c.SOLUTION:
        show_solution(c, part_named(c.SOLUTION))
    elif c.WATCH:
        watch(c)
    elif not check(c):
        sys.exit(1)


def check(c: SimpleNamespace) -> bool:
    """Checks the parts, prints what came out, and writes the report. True if all parts pass."""
    report = Report(Path(c.RESULTS_DIR) / "report.json")
    work = job(c)
    results, printed = run_checks(work, lambda result: print(line(result), flush=True))
    if len(results) > 1:
        earned = sum(points_of(result) for result in results)
        total = sum(sum(POINTS[result.part].values()) for result in results)
        print(f"  {'all parts':<18} {bar(earned, total)}  {earned:.2f} of {total:.2f}")
    failing = next((result for result in results if result.failed is not None), None)
    if failing and failing.failed == LOADING:
        say("", failing.says)
    elif failing:
        if failing.unwritten:
            say("", f"{failing.part}: {failing.says}. The task: {PARTS[failing.part].task}.")
        else:
            say("", f"{failing.part}, {failing.failed}: {failing.says}")
        if failing.because:
            say(f"Common cause: {failing.because}.")
        show_hints(report, failing.part, c.HINT)
    elif len(results) > 1:
        print("\nAll parts pass: python train.py trains your model.")
    elif c.HINT:
        show_hints(report, results[0].part, more=True)
    if printed.strip():
        lines = printed.strip().splitlines()
        print("\nYour code printed:", *lines[:10], *["..."] * (len(lines) > 10), sep="\n  ")
    report.write(results, work)
    print(report.path)
    return failing is None


def say(*paragraphs: str) -> None:
    print(*(textwrap.fill(text, WIDTH) for text in paragraphs), sep="\n")


def job(c: SimpleNamespace) -> Job:
    """What is checked, and within which limits, as the constants say."""
    model, steps = Path(c.MODEL_FILE).resolve(), Path(c.STEPS_FILE).resolve()
    if not c.GRADE and not model.is_file():
        raise UserError(f"there is no file {c.MODEL_FILE}: set MODEL_FILE to your model.py")
    if c.SECONDS <= 0:
        raise UserError(f"SECONDS={c.SECONDS:g} leaves no time for a check: 10 is the default")
    if not WEIGHTS.is_file():
        raise UserError(f"{WEIGHTS} is missing; the checks need it, so get it from the repository")
    for part, checks in POINTS.items():
        if part not in PARTS:
            raise UserError(f"POINTS: there is no part {part} (there are {', '.join(PARTS)})")
        if unknown := checks.keys() - {*PARTS[part].checks}:
            raise UserError(f"POINTS: {part} has no check {min(unknown)}")
    parts = (part_named(c.PART),) if c.PART else tuple(POINTS)
    seed = secrets.randbelow(2**31) if c.SEED is None else c.SEED
    steps_file = steps if steps.is_file() else None
    return Job(model, steps_file, parts, seed, WEIGHTS, c.SECONDS, c.MEMORY_MB)


def part_named(name: str) -> str:
    """The part that a flag names, in any case, with or without underscores."""
    names = {part.lower().replace("_", ""): part for part in POINTS}
    written = name.lower().replace("_", "")
    if written not in names:
        similar = difflib.get_close_matches(written, names, 1)
        guess = f": did you mean {names[similar[0]]}?" if similar else ""
        raise UserError(f"there is no part {name!r}{guess} (the parts are {', '.join(POINTS)})")
    return names[written]


def points_of(result: Result) -> float:
    return sum(POINTS[result.part].get(check, 0) for check in result.passed)


def line(result: Result) -> str:
    earned, total = points_of(result), sum(POINTS[result.part].values())
    state = "passed" if result.failed is None else f"fails: {result.failed}"
    state = "not written yet" if result.unwritten else state
    return f"  {result.part:<18} {bar(earned, total)}  {earned:.2f} of {total:.2f}  {state}"


def bar(earned: float, total: float) -> str:
    full = round(BAR * earned / total) if total else 0
    return "█" * full + "░" * (BAR - full)


def print_student(name: str, points: float) -> None:
    print(f"  {name:<30} {points:.2f}")


def show_hints(report: "Report", part: str, more: bool) -> None:
    """Prints the hints that were revealed so far, at least one; with `more` one more."""
    hints = PARTS[part].hints
    shown = min(report.hints.get(part, 0) + int(more), len(hints)) or 1
    report.hints[part] = shown
    for number, hint in enumerate(hints[:shown], 1):
        say(f"Hint {number} of {len(hints)}: {hint}")
    if shown < len(hints):
        print(f"python exercise.py --part {part} --hint shows the next one.")


def show_solution(c: SimpleNamespace, part: str) -> None:
    """Shows where the solution is, after the part passes or the student gives up."""
    report = Report(Path(c.RESULTS_DIR) / "report.json")
    c.PART = part
    work = job(c)
    results, _ = run_checks(work)
    if results[0].failed is not None:
        if not c.GIVE_UP:
            raise UserError(
                f"{part} does not pass yet. --give-up shows the solution anyway, and the report "
                "records it"
            )
        report.gave_up.append(part)
    report.write(results, work)
    print(solution_of(part))


def solution_of(part: str) -> str:
    """timm's source for a class of model.py, or the place where the lab itself does the step."""
    place = PARTS[part].solution
    if not place.startswith("timm."):
        return f"the lab does this in {place}"
    return f"# {place}\n{inspect.getsource(pkgutil.resolve_name(place))}"


def watch(c: SimpleNamespace) -> None:
    """Checks again whenever a file changes, until Ctrl-C."""
    files, seen = [Path(c.MODEL_FILE), Path(c.STEPS_FILE)], None
    job(c)  # a file that is missing now is an error
    while True:
        now = [path.stat().st_mtime_ns if path.exists() else 0 for path in files]
        if now != seen and now[0]:  # while an editor saves, the file may be gone for a moment
            print(f"\n{time.strftime('%H:%M:%S')} (Ctrl-C to stop)")
            check(c)
            seen, c.HINT = now, False
        time.sleep(0.3)


def _relative(file: Path) -> str:
    try:
        return Path(os.path.relpath(file)).as_posix()
    except ValueError:  # on another drive of Windows
        return file.as_posix()


class Report:
    """The file that remembers points, hints and given-up parts from run to run."""

    def __init__(self, path: Path):
        self.path = path
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged
            old = {}
        self.parts: dict[str, dict[str, Any]] = old.get("parts", {})
        self.hints: dict[str, int] = old.get("hints", {})
        self.gave_up: list[str] = old.get("gave_up", [])

    def write(self, results: list[Result], job: Job) -> None:
        """Saves the points of some parts, with the hash of the file that was checked."""
        for result in results:
            file = job.model_file
            if PARTS[result.part].is_function and job.steps_file:
                file = job.steps_file
            self.parts[result.part] = {
                "points": round(points_of(result), 4),
                "of": round(sum(POINTS[result.part].values()), 4),
                "file": _relative(file),
                "code": runtime.source_hash(file.read_bytes()),
            }
        content = {
            "parts": self.parts,
            "hints": self.hints,
            "gave_up": sorted(set(self.gave_up)),
            "seed": job.seed,
            "checks": checks_hash(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(self.path, content)


if __name__ == "__main__":
    runtime.run_script(main)
