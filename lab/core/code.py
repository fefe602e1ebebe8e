"""Hashes of the code that determines a run's result.

A hash is computed on the syntax tree without docstrings, so comments and formatting do not change
it. The constants of the running script are left out: they identify a run by their values.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

from lab.core import constants

_ROOT = Path(__file__).resolve().parents[2]
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields that depend on the Python version or only on the notation, such as u"text".
_SKIPPED = {"ctx", "kind", "type_comment", "type_ignores"}


def code_hashes(*scripts: Path) -> dict[str, str]:
    """Hashes of model.py, of scripts, and of the files that they import from this project.

    Of a package in `lab/` all files count, because a package imports some of its files on demand.

    Args:
        scripts: without any, those of the running script, see `constants.override`.

    Returns: 16 hexadecimal digits by path, relative to the project.
    """
    files = constants.running.files
    todo = {_ROOT / "model.py", *(script.resolve() for script in scripts or files)}
    found: dict[str, str] = {}
    modules: set[tuple[str, Path]] = set()
    while todo:
        path = todo.pop()
        inside = path.is_relative_to(_ROOT)
        name = path.relative_to(_ROOT).as_posix() if inside else path.name
        if name in found or not path.is_file():
            continue
        left_out = constants.running.names if path in files else frozenset()
        found[name], imported = _parsed(path.read_bytes(), left_out)
        for module in {(module, path.parent) for module in imported} - modules:
            modules.add(module)
            todo.update(_files_of(*module))
    return dict(sorted(found.items()))


@cache
def _parsed(source: bytes, left_out: frozenset[str]) -> tuple[str, frozenset[str]]:
    """The hash of a file without the named assignments, and the modules that it imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # cannot be imported either
        return hashlib.blake2b(source, digest_size=8).hexdigest(), frozenset()
    imports: set[str] = set()
    for node in ast.walk(tree):  # also inside functions
        if isinstance(node, ast.Import):
            imports.update(_package(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            imports.update(map(_package, (node.module, *names)))
    tree.body = [node for node in tree.body if not _assigns(node, left_out)]
    tokens: list[str] = []
    _tokenize(tree, tokens)
    text = "\0".join(tokens).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest(), frozenset(imports)


def _package(module: str) -> str:
    """`lab.core` for `lab.core.runs`: a package of the lab counts as a whole."""
    return ".".join(module.split(".")[:2]) if module.startswith("lab.") else module


def _assigns(node: ast.stmt, names: frozenset[str]) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in names for target in targets)


def _tokenize(node: ast.AST, tokens: list[str]) -> None:
    """Appends a tree as text. Unlike `ast.dump`, it is the same in all versions of Python."""
    tokens.append(type(node).__name__)
    for name in node._fields:
        value = getattr(node, name, None)
        if name in _SKIPPED or (value is None and name != "value") or value == []:
            continue
        if name == "body" and isinstance(node, _DOCUMENTED) and ast.get_docstring(node, False):
            value = value[1:]
        tokens.append(name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, ast.AST):
                _tokenize(item, tokens)
            else:
                tokens.append(repr(item))
        tokens.append(";")


def _files_of(module: str, folder: Path) -> list[Path]:
    """The files of an imported module; none for a module that is not part of this project."""
    first, *rest = module.split(".")
    if first == "lab":
        package = _ROOT / "lab" / rest[0] if rest else _ROOT / "lab" / "__init__.py"
        return [*package.rglob("*.py")] if package.is_dir() else [package.with_suffix(".py")]
    places = [folder, _ROOT] if folder.is_relative_to(_ROOT) else [folder]
    candidates = [place.joinpath(first, *rest).with_suffix(".py") for place in places]
    return [path for path in candidates if path.is_file()]
