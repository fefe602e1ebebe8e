"""The constants in a script's source: their names, types, comments, groups and committed values."""

import ast
import re
import subprocess
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from lab.core.errors import suggest

Recipes = Mapping[str, Mapping[str, Any]]

MISSING = object()  # the committed value of a name that is not a plain constant
_HEADING = re.compile(r"# --- (.+?) -*$")
_CONSTANT = re.compile(r"([A-Z][A-Z0-9_]*)\s*(?::[^=#]+)?=(?!=)[^#]*(?:#\s*(.*))?$")


@dataclass(frozen=True)
class Constant:
    """A constant as its script states it."""

    name: str
    annotation: Any
    value: Any  # as in the file, not checked yet
    comment: str
    group: str
    file: Path
    line: int

    @property
    def place(self) -> str:
        return f"{self.file.name}, line {self.line}"


def read_constants(
    module: types.ModuleType,
    base: types.ModuleType | None = None,
    without: Iterable[str] = (),
    recipes: Recipes | None = None,
) -> list[Constant]:
    """The constants of a script in the order of its source, then those of its base.

    Args: as for `lab.core.constants.override`.
    """
    file = Path(module.__file__)
    hints = {name: hint for name, hint in get_type_hints(module).items() if name.isupper()}
    assigned = _assigned(_tree(file))
    for name in assigned.keys() - hints.keys():
        if name in vars(module) and _is_plain(vars(module)[name]):
            annotation = _annotation_of(name, module, base, recipes or {})
            if annotation is not None:
                hints[name] = annotation
    found: dict[str, Constant] = {}
    group = ""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if heading := _HEADING.match(line):
            group = heading[1].strip()
        elif (match := _CONSTANT.match(line.rstrip())) and number in assigned.get(match[1], ()):
            name, comment = match[1], match[2] or ""
            if name in hints:
                found.pop(name, None)  # the last assignment counts
                value = getattr(module, name)
                found[name] = Constant(name, hints[name], value, comment, group, file, number)
    inherited = read_constants(base, recipes=recipes) if base else []
    known = {*found, *without}
    return [*found.values(), *(c for c in inherited if c.name not in known)]


def _annotation_of(
    name: str, module: types.ModuleType, base: types.ModuleType | None, recipes: Recipes
) -> Any:
    """The type of a constant whose annotation is gone, as after the edit `EPOCHS = 5`.

    It is the type in the base script or in the committed file; if neither has one, the type of the
    value, provided that the name is assigned below a heading such as `# --- Model ---`. Returns
    None if the name is not a constant.
    """
    if base and name in (hints := get_type_hints(base)):
        return hints[name]
    if text := committed(Path(module.__file__)).get(name, (None, None))[0]:
        holder = type("Holder", (), {"__annotations__": {name: text}})
        return get_type_hints(holder, vars(module))[name]
    file = Path(module.__file__)
    lines = _text(file).split("\n")
    heading = next((i for i, line in enumerate(lines, 1) if _HEADING.match(line)), len(lines))
    if _assigned(_tree(file))[name][0] > heading:
        kinds = {type(recipe[name]) for recipe in recipes.values() if name in recipe}
        value = vars(module)[name]
        kind = kinds.pop() if len(kinds) == 1 else str if value is None else type(value)
        return kind | None
    return None


def unknown_constant(module: types.ModuleType, base: types.ModuleType | None) -> str | None:
    """A message about a constant that nothing reads, such as the typo `EPOHCS = 5`; else None."""
    file = Path(module.__file__)
    trees = [_tree(Path(m.__file__)) for m in (module, base) if m]
    read = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            read.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            read.add(node.value)
    assigned, inherited = _assigned(trees[0]), _assigned(trees[1]) if base else {}
    known = {*filter(str.isupper, read), *assigned, *inherited, *committed(file)}
    for name, lines in assigned.items():
        # What the committed script assigns but does not read, a module of the lab reads.
        if name in read or name in inherited or name in committed(file):
            continue
        if not _is_plain(vars(module).get(name)):
            continue
        hint = suggest(name, known - {name}, 0.8)
        if hint or committed(file):
            return f"{file.name}, line {lines[-1]}: {name} is not a constant of this script{hint}"
    return None


def missing_constant(
    module: types.ModuleType, base: types.ModuleType | None, names: Iterable[str]
) -> str | None:
    """A message about a constant that a script reads, but that is commented out; else None."""
    nodes = [node for m in (module, base) if m for node in ast.walk(_tree(Path(m.__file__)))]
    read, assigned = set(), set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "c":
            (read if isinstance(node.ctx, ast.Load) else assigned).add(node.attr)
    missing = sorted(filter(str.isupper, read - assigned - set(names)))
    if not missing:
        return None
    file = Path(module.__file__)
    name, value = missing[0], committed(file).get(missing[0], (None, MISSING))[1]
    was = "" if value is MISSING else f"; its value was {value!r}"
    return f"{file.name}: {name} is missing; put its line back, and change its value instead{was}"


@lru_cache
def committed(file: Path) -> dict[str, tuple[str | None, Any]]:
    """Annotation and value of each constant in the committed version of a script.

    Empty without git, or for a file that was never committed.
    """
    command = ["git", "show", f"HEAD:./{file.name}"]
    try:
        done = subprocess.run(command, cwd=file.resolve().parent, capture_output=True, timeout=10)
        tree = ast.parse(done.stdout) if done.returncode == 0 else None
    except (OSError, SyntaxError, ValueError, subprocess.TimeoutExpired):
        tree = None
    found: dict[str, tuple[str | None, Any]] = {}
    for node in tree.body if tree else ():
        if isinstance(node, ast.AnnAssign) and node.value:
            target, annotation = node.target, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            target, annotation = node.targets[0], None
        else:
            continue
        if isinstance(target, ast.Name) and target.id.isupper():
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = MISSING
            found[target.id] = (annotation, value)
    return found


def _assigned(tree: ast.Module) -> dict[str, list[int]]:
    """The upper-case names that a module assigns at its top level, with their line numbers."""
    found: dict[str, list[int]] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                found.setdefault(target.id, []).append(node.lineno)
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")  # some editors on Windows write a byte order mark


def _tree(file: Path) -> ast.Module:
    return ast.parse(_text(file))


def _is_plain(value: Any) -> bool:
    """Whether a value can be a constant. Tables, paths and functions cannot."""
    if isinstance(value, tuple):  # as after the edits `1e-3,` and `0,1`
        return len(value) <= 2 and all(isinstance(part, (int, float)) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))
