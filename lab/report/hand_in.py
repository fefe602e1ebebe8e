"""One zip for the teacher: records, images, the report, code, and what is missing for each task.

TASKS says what each task of the lab sheet asks for, and which run or exercise shows it. Weights are
left out, because they are large and the records contain everything that is graded.
"""

import hashlib
import json
import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.core import checkpoints, runtime
from lab.report.markdown import escape, table
from lab.report.records import Found, Record

ROOT = Path(__file__).resolve().parents[2]
NAME = "hand-in.zip"
RECORDS = {".csv", ".html", ".jpeg", ".jpg", ".json", ".md", ".png"}  # suffixes of included files
MAX_FILE = 20_000_000  # bytes; larger records are listed, but not included
CODE = ("*.py", "exercise/*.py", "lab/**/*.py")
HANDED_OUT = "exercise/handed_out.json"  # exercise.py --hand-out writes hashes of its files there
_EXERCISE = "exercise/report.json"  # in the results folder, from exercise.py


@dataclass(frozen=True)
class _Work:
    """What a student has done: finished runs of each script, and parts of the exercise."""

    runs: list[Record]
    attention: list[Path]
    sweeps: list[Path]
    exercise: dict[str, Any]  # by part; see Report in exercise.py


@dataclass(frozen=True)
class Item:
    """One thing that a task asks for."""

    what: str
    command: str  # produces it
    find: Callable[[_Work], list[str]]  # where it is: names of runs, or points; empty if missing


def _part(name: str) -> Item:
    def find(work: _Work) -> list[str]:
        part = work.exercise.get(name, {})
        passed = part.get("current") and part["points"] >= part["of"] > 0
        return [f"{part['points']:g} of {part['of']:g} points"] if passed else []

    return Item(f"`{name}` passes its checks", f"python exercise.py --part {name}", find)


def _run(what: str, command: str, kind: str | None = None, **constants: Any) -> Item:
    script = command.split()[1]

    def find(work: _Work) -> list[str]:
        return [
            run.folder.name
            for run in work.runs
            if run.script == script
            and kind in (None, run.kind)
            and all(run.constants.get(name) == value for name, value in constants.items())
        ]

    return Item(what, command, find)


def _two_patch_sizes(work: _Work) -> list[str]:
    """The ViTs of train.py on a dataset on which there are runs with several patch sizes."""
    vits = [run for run in work.runs if run.script == "train.py" and run.kind == "ViT"]
    runs = [(run, run.config["dataset"]["name"]) for run in vits]
    sizes = {(name, run.constants.get("PATCH_SIZE")) for run, name in runs}
    several = {name for name, _ in sizes if sum(other == name for other, _ in sizes) > 1}
    return [run.folder.name for run, name in runs if name in several]


TASKS: dict[str, tuple[str, tuple[Item, ...]]] = {
    "1.I": ("Patches, class token, positions", (
        _part("PatchEmbed"), _part("VisionTransformer"),
        Item("runs with two patch sizes", "python train.py --patch-size 14", _two_patch_sizes),
    )),
    "1.II": ("Attention, MLP, block", (_part("Attention"), _part("MLP"), _part("Block"))),
    "1.III": ("Training from scratch", (
        _part("training_step"), _part("evaluate"),
        _run("a ViT trained on CIFAR-10", "python train.py --dataset cifar10", "ViT",
             DATASET="cifar10"),
    )),
    "1.IV": ("Fine-tuning", tuple(
        _run(f"fine-tuning, mode {mode}", f"python finetune.py --mode {mode}", MODE=mode)
        for mode in ("full", "head", "top-k", "scratch")
    )),
    "1.V": ("Swin", (
        Item("a fine-tuned Swin", "python finetune_swin.py", lambda work: [
            run.folder.name for run in work.runs
            if run.kind == "Swin" and run.pretrained and run.constants.get("MODE") != "scratch"]),
    )),
    "1.VI": ("Experiments", (
        Item("a sweep", "python sweep.py", lambda work: [path.name for path in work.sweeps]),
    )),
    "2.1": ("Concepts", (
        _run("a CNN to compare with the ViT", "python cnn_baseline.py --match macs"),
    )),
    "2.2a, 2.2b": ("Data and normalization", (
        _run("a ViT trained on Oxford Pets", "python train.py --dataset pets", "ViT",
             DATASET="pets"),
    )),
    "2.2c, 2.2d": ("New head, frozen layers", (
        _part("replace_head"),
        _run("only the head trained", "python finetune.py --mode head", MODE="head"),
        _run("the last blocks trained", "python finetune.py --mode top-k", MODE="top-k"),
    )),
    "2.2e": ("Curves and comparison", (
        Item("two runs in the report", "python train.py", lambda work: (
            [run.folder.name for run in work.runs] if len(work.runs) > 1 else [])),
    )),
    "2.2f": ("Attention maps", (
        Item("attention maps", "python attention_viz.py", lambda work: (
            [path.name for path in work.attention])),
    )),
}  # fmt: skip


def write_hand_in(found: Found) -> tuple[Path, dict[str, Any]]:
    """Writes hand-in.zip into the results folder; the report must have been written before.

    Returns: the path of the zip, and the content of its hand_in.json.
    Raises: UserError if the zip cannot be written.
    """
    content = _content(found, _read_exercise(found.place / _EXERCISE))
    files, left_out = _records(found.place)
    model_files = [*map(Path, content["model_files"])]
    for path in (*model_files, *_imported(model_files), *edited_files(ROOT)):
        if path.is_file():
            files[_name_in_zip(path)] = path
        else:
            left_out.append({"path": str(path), "reason": "no longer exists"})
    content["left_out"] += left_out
    content["sha256"] = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())
    }

    def write(scratch: Path) -> None:
        with zipfile.ZipFile(
            scratch, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
        ) as archive:
            archive.writestr("hand_in.json", json.dumps(content, indent=2) + "\n")
            archive.writestr("hand_in.md", _page(content).encode("utf-8", errors="replace"))
            for name in content["sha256"]:
                archive.write(files[name], name)

    path = found.place / NAME
    checkpoints.write_atomically(path, write)
    return path, content


def missing(content: dict[str, Any]) -> list[str]:
    """A line for each missing item of a task, with the command that produces it."""
    return [
        f"task {task['task']}: missing: {item['what']} ({item['command']})"
        for task in content["tasks"]
        for item in task["items"]
        if not item["found"]
    ]


def mismatched(content: dict[str, Any]) -> list[str]:
    """Lines if parts were checked in other files than the graded ones, or if runs were trained
    with another model.py than the files in the zip.
    """
    notes = []
    for steps, flag in ((False, "--model-file"), (True, "--steps-file")):
        graded, *others = _checked_files(content["exercise"].get("parts", {}), steps) or [""]
        if others:
            notes.append(
                f"Note: parts were checked in several files, and only {graded} is graded, not "
                f"{', '.join(others)}: check all parts with python exercise.py {flag} {graded}"
            )
    files = [path for path in map(Path, content["model_files"]) if path.is_file()]
    given = {runtime.source_hash(path.read_bytes()) for path in files}
    runs = [run for run in content["runs"] if run["model_code"]]
    others = [run["folder"] for run in runs if run["model_code"] not in given]
    if not others:
        return notes
    names = ", ".join(others[:3]) + (", ..." if others[3:] else "")
    return [
        *notes,
        f"Note: {len(others)} of {len(runs)} runs were trained with another version of the model "
        f"than the zip contains, and grading checks that: {names}. Restore that version, or train "
        "again",
    ]


def _checked_files(parts: dict[str, Any], steps: bool) -> list[str]:
    """The files in which parts of the model (or the steps) were checked, the graded one first.

    That is the file with the most points.
    """
    earned: Counter[str] = Counter()
    for name, part in parts.items():
        if name[0].islower() == steps:
            earned[part["file"]] += part["points"]
    return sorted(earned, key=earned.get, reverse=True)


def _content(found: Found, exercise: dict[str, Any]) -> dict[str, Any]:
    """What hand_in.json says."""
    runs = [run for run in found.runs if not run.is_reference]
    attention = [run for run in found.attention_runs if not found.is_reference(run.folder)]
    work = _Work(
        [run for run in runs if run.metrics and not run.sweep],
        [run.folder for run in attention],
        [
            folder
            for folder, sweep in found.sweeps
            if not found.is_reference(folder) and sweep.get("best") is not None
        ],
        exercise.get("parts", {}),
    )
    of_runs = [run.constants.get("MODEL_FILE") for run in runs]
    of_runs += [run.config().get("constants", {}).get("MODEL_FILE") for run in attention]
    checked = [part["file"] for part in work.exercise.values()]
    model_files = list(dict.fromkeys(filter(None, [*checked, *of_runs, "model.py"])))
    model = next(iter(_checked_files(work.exercise, steps=False)), None)
    steps = next(iter(_checked_files(work.exercise, steps=True)), None)
    return {
        "schema": 1,
        "tasks": [
            {
                "task": task,
                "title": title,
                "items": [
                    {"what": item.what, "command": item.command, "found": item.find(work)}
                    for item in items
                ],
            }
            for task, (title, items) in TASKS.items()
        ],
        "runs": [_run_entry(run, found.place) for run in runs],
        "exercise": exercise,
        "model_files": model_files,
        "model": _name_in_zip(Path(model or next(filter(None, of_runs), "model.py"))),
        "steps": _name_in_zip(Path(steps)) if steps else None,
        "code": runtime.code_hashes(*ROOT.glob("*.py")),
        "left_out": [
            {"path": _name_of(folder, found.place), "reason": reason}
            for folder, reason in found.left_out
            if not found.is_reference(folder)
        ],
        "made": runtime.provenance(),
    }


def _run_entry(run: Record, place: Path) -> dict[str, Any]:
    return {
        "folder": _name_of(run.folder, place),
        "script": run.script,
        "dataset": run.config["dataset"]["name"],
        "model": run.model,
        "model_file": run.constants.get("MODEL_FILE"),
        "model_code": run.model_code,
        "test_accuracy": run.metrics["test_accuracy"] if run.metrics else None,
    }


def _read_exercise(path: Path) -> dict[str, Any]:
    """The report of exercise.py; each part also says if its file is still what was checked."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for part in report["parts"].values():
            file, _ = Path(part["file"]), float(part["points"]) + float(part["of"])
            now = runtime.source_hash(file.read_bytes()) if file.is_file() else None
            part["current"] = now == part["code"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not done, or damaged
    return report


def _records(place: Path) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Records and images by their name in the zip, and what is left out of it."""
    files, left_out = {}, []
    for folder, subfolders, names in os.walk(place):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if Path(folder) == place and "official" in subfolders:
            subfolders.remove("official")
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix.lower() not in RECORDS or path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size > MAX_FILE:
                left_out.append({"path": _name_of(path, place), "reason": "larger than 20 MB"})
            elif not _is_utf8(path):
                left_out.append({"path": _name_of(path, place), "reason": "its name is not UTF-8"})
            else:
                files[_name_of(path, place)] = path
    return files, left_out


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _name_of(path: Path, place: Path) -> str:
    """The name of a file or folder of the results folder, in the zip."""
    return f"results/{path.relative_to(place).as_posix()}"


def _name_in_zip(path: Path) -> str:
    """The name of a file of the project, or of a file elsewhere, in the zip."""
    path = path.resolve()
    inside = path.is_relative_to(ROOT)
    return path.relative_to(ROOT).as_posix() if inside else f"elsewhere/{path.name}"


def _imported(files: list[Path]) -> list[Path]:
    """The project's files that these files import, with all files of the packages they are in."""
    names = (name for name in runtime.code_hashes(*files) if not name.startswith("lab/"))
    paths = {path for path in (ROOT / name for name in names) if path.is_file()}
    packages = {path.parent for path in paths if path.with_name("__init__.py").is_file()}
    return sorted(paths.union(*(package.glob("*.py") for package in packages)))


def edited_files(root: Path) -> list[Path]:
    """Code that differs from what was handed out, or else from the last commit.

    Without either, all code counts as edited.
    """
    files = {path.relative_to(root).as_posix(): path for glob in CODE for path in root.glob(glob)}
    try:
        given = json.loads((root / HANDED_OUT).read_text(encoding="utf-8"))
        changed = {
            name for name, path in files.items() if given.get(name) != checkpoints.text_hash(path)
        }
    except (OSError, ValueError, AttributeError):
        changed = _changed_since_commit(root)
    return [path for name, path in sorted(files.items()) if changed is None or name in changed]


def _changed_since_commit(root: Path) -> set[str] | None:
    """Paths that git calls modified or untracked; None without git."""
    command = ("git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", ".")
    prefix_command = ("git", "rev-parse", "--show-prefix")  # where root is in its repository
    try:
        prefix, status = (
            os.fsdecode(subprocess.run(words, cwd=root, capture_output=True, check=True).stdout)
            for words in (prefix_command, command)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {entry[3:].removeprefix(prefix.rstrip("\n")) for entry in status.split("\0") if entry}


def _page(content: dict[str, Any]) -> str:
    """hand_in.json as readable Markdown."""
    made = content["made"]
    tasks = []
    for task in content["tasks"]:
        for item in task["items"]:
            done = escape(", ".join(item["found"][:3])) + (", ..." if item["found"][3:] else "")
            command = "" if item["found"] else f"`{item['command']}`"
            first = item is task["items"][0]
            name = f"{task['task']} {task['title']}" if first else ""
            tasks.append([name, item["what"], done, command])
    runs = []
    for run in content["runs"]:
        accuracy = run["test_accuracy"]
        shown = "not finished" if accuracy is None else f"{100 * accuracy:.1f} %"
        runs.append([*(escape(run[key]) for key in ("folder", "dataset", "model")), shown])
    sections = [
        f"# Hand-in\n\nMade on {made['started'][:10]} by `{made['command']}`. The model is "
        f"{escape(content['model'])}. Open results/report.html for curves, tables and images. "
        "Weights are not included.\n",
        *(f"{escape(note)}.\n" for note in mismatched(content)),
        table(["task", "what", "done", "missing"], tasks),
        "## Runs\n",
        table(["folder", "dataset", "model", "test accuracy"], runs),
    ]
    if parts := content["exercise"].get("parts"):
        hints, gave_up = (content["exercise"].get(key) or () for key in ("hints", "gave_up"))
        rows = []
        for name, part in parts.items():
            remarks = ["the solution was shown before it passed"] if name in gave_up else []
            if not part["current"]:
                remarks.append(f"{escape(part['file'])} has changed since the check")
            points = f"{part['points']:g} of {part['of']:g}"
            shown = hints.get(name, 0) if isinstance(hints, dict) else 0
            rows.append([escape(name), points, str(shown), ", ".join(remarks)])
        sections += ["## Exercise\n", table(["part", "points", "hints", "remarks"], rows)]
    code = [name for name in content["sha256"] if name.endswith(".py")]
    sections += ["## Code\n", "".join(f"- {escape(name)}\n" for name in code)]
    if left_out := content["left_out"]:
        lines = [f"- {escape(out['path'])}: {escape(out['reason'])}\n" for out in left_out]
        sections += ["## Not included\n", "".join(lines)]
    return "\n".join(sections)
