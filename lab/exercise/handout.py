"""Writes the student version of the repository.

The solution is read with `ast`, and the bodies of the parts are replaced by TODO comments, so that
the hand-out follows every change of model.py. Nothing else is edited: files are copied or left out.
"""

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from lab.core import UserError, checkpoints
from lab.exercise.parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
# What goes into the hand-out. The theory, official results, tests and the history stay out.
_COPIED = (
    "*.py", "lab.ipynb", "requirements.txt", "LICENSE", ".gitignore", "lab/**/*", "weights/*",
)  # fmt: skip
WRITTEN = ("model.py", "exercise/steps.py")  # what students write
HANDED_OUT = "exercise/handed_out.json"  # hashes of the files, to tell later which were edited
_STUDENT_PAGE = re.compile(r"^## For students\n(.*?)^## For teachers", re.DOTALL | re.MULTILINE)
_TODO_CLASS = '''

class TODO(ConfigError, NotImplementedError):
    """A body that is still to be written; a script that reaches it prints the message and stops."""

    def __init__(self, name: str):
        super().__init__(
            f"model.py: {name} is not written yet. Start with PatchEmbed, and check each part "
            "with python exercise.py"
        )
'''


def hand_out(target: Path, root: Path = ROOT) -> list[str]:
    """Writes the student version of the repository at `root` to the folder `target`.

    Returns: the methods and functions that are left to write, such as "MLP.forward".
    Raises: UserError if `target` is not empty, or if `root` is itself a hand-out.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: name a new folder")
    sources = {name: (root / name).read_text(encoding="utf-8") for name in WRITTEN}
    if "class TODO(" in sources["model.py"]:
        raise UserError(
            f"{root} is a hand-out itself: use --hand-out in the complete repository, "
            "whose model.py is solved"
        )
    files = {
        path
        for pattern in _COPIED
        for path in root.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    left_out = files & _untracked(root)
    if left_out:
        names = ", ".join(sorted(path.relative_to(root).as_posix() for path in left_out))
        print(f"left out, because git does not track them: {names}")
    files -= left_out
    for path in sorted(files):
        if target.resolve() not in path.resolve().parents:
            copy = target / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    left: list[str] = []
    for name, source in sources.items():
        text, open_bodies = skeleton(source, name)
        left += open_bodies
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    page = (root / "exercise" / "README.md").read_text(encoding="utf-8")
    (target / "README.md").write_text(
        "# Exercise: a Vision Transformer from scratch\n" + _STUDENT_PAGE.search(page)[1].rstrip()
        + "\n", encoding="utf-8",
    )  # fmt: skip
    hashes = {
        path.relative_to(target).as_posix(): checkpoints.text_hash(path)
        for path in sorted(target.rglob("*.py"))
    }
    (target / HANDED_OUT).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    return left


def _untracked(root: Path) -> set[Path]:
    """Files that git does not track, such as a teacher's own solution.

    There are none without git, or if git does not track this project at all.
    """
    command = ("git", "ls-files", "--others", "-z", ".")
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return set()
    found = {root / os.fsdecode(name) for name in done.stdout.split(b"\0") if name}
    return set() if root / "model.py" in found else found


def skeleton(source: str, name: str) -> tuple[str, list[str]]:
    """The source of a file without the bodies of the parts, and the list of what was removed."""
    tree = ast.parse(source)
    lines = source.splitlines()
    edits: dict[tuple[int, int], list[str]] = {}  # (first, last) line, from 1: new lines
    removed = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "ConfigError":
            edits[node.end_lineno + 1, node.end_lineno] = _TODO_CLASS.rstrip().splitlines()
        if _node_name(node) not in PARTS:
            continue
        part = PARTS[node.name]
        functions = [node] if part.is_function else [n for n in node.body if _node_name(n)]
        for function in functions:
            if function.name in part.todo:
                path = function.name if part.is_function else f"{part.name}.{function.name}"
                start = _body_start(function, lines)
                edits[start, function.end_lineno] = _todo(function, part, path, name)
                removed.append(path)
    for (first, last), new in sorted(edits.items(), reverse=True):
        lines[first - 1 : last] = new
    return "\n".join(lines) + "\n", removed


def _node_name(node: ast.AST) -> str | None:
    """The name that a class or function definition gives; None for other statements."""
    return node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else None


def _body_start(function: ast.FunctionDef, lines: list[str]) -> int:
    """The line where the body starts, after the docstring if there is one."""
    if ast.get_docstring(function) is not None:
        return function.body[0].end_lineno + 1
    header = function.lineno  # comments between the header and the first statement go as well
    while not re.search(r":\s*(#.*)?$", lines[header - 1]):
        header += 1
    return header + 1


def _todo(function: ast.FunctionDef, part: Part, path: str, name: str) -> list[str]:
    """The lines that stand in for a body."""
    indent = " " * (function.col_offset + 4)
    what = part.todo[function.name].splitlines()
    lines = ["super().__init__()"] if function.name == "__init__" else []
    lines += [f"# TODO: {what[0]}", *(f"# {line.strip()}" for line in what[1:])]
    if part.is_function:
        lines += [f'raise NotImplementedError("{name}: {path} is not written yet")']
    else:
        lines += [f'raise TODO("{path}")']
    return [indent + line for line in lines]
