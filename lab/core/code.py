"""The code that determines a run's result: which file is the module `model`, and hashes.

A hash is computed on the syntax tree without docstrings, so comments and formatting do not change
it. The constants of the running script are ignored, because their values identify a run.
"""

import ast
import hashlib
import sys
import traceback
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from lab import without_garbage_collection
from lab.core import constants
from lab.core.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
# What lab/ imports from the module `model`.
_NEEDED = ("ConfigError", "DropPath", "VisionTransformer", "ViTConfig", "interpolate_pos_embed")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields that depend on the Python version or only on the notation, such as u"text".
_SKIPPED = {"ctx", "kind", "type_comment", "type_ignores"}


def import_model() -> None:
    """Imports the module `model` from the running script's MODEL_FILE, or else from model.py.

    lab.models calls this before anything in lab/ imports `model`, so that all of the lab uses the
    classes of a student's file. A module `model` that is already imported stays.

    Raises: SystemExit, after printing why the file cannot be used.
    """
    if "model" in sys.modules:
        return
    given = constants.early_value("MODEL_FILE")
    path = Path(given).resolve() if given else _ROOT / "model.py"
    try:
        _import_file(path)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


def _import_file(path: Path) -> None:
    """Runs a file as the module `model`. Raises: UserError, with the line that is wrong."""
    spec = spec_from_file_location("model", path)
    if spec is None or not path.is_file():
        raise UserError(
            f"MODEL_FILE={path} is not a Python file: set it to the path of your model.py"
        )
    sys.modules["model"] = module = module_from_spec(spec)
    spec.loader_state = path.read_bytes()  # the file may be edited while the process runs
    sys.path.append(str(path.parent))  # it may import files beside it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path.name}, line {error.lineno}: syntax error ({error.msg})") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        location = f"{path.name}, line {lines[-1]}" if lines else path.name
        raise UserError(f"{location}: {type(error).__name__}: {error}") from error
    if missing := [name for name in _NEEDED if not hasattr(module, name)]:
        raise UserError(
            f"{path} does not define {', '.join(missing)}, which the lab needs: start from the "
            "model.py that you were given, and keep its other classes and functions"
        )


def uses_model(file: str, recorded: str | None) -> bool:
    """Whether the module `model` is a file, or has the hash that a run has recorded for it.

    Args:
        file: MODEL_FILE of the run.
        recorded: the run's hash of that file, from `code_hashes`.
    """
    used = Path(sys.modules["model"].__file__).resolve()
    return Path(file).resolve() == used or source_hash(_source(used)) == recorded


def source_hash(source: bytes) -> str:
    """The hash that `code_hashes` gives a file with this content."""
    return _parsed(source, frozenset())[0]


def code_hashes(*scripts: Path) -> dict[str, str]:
    """Hashes of model.py, of scripts, and of the files that they import from this project.

    All files of an imported package of `lab/` count, because packages import some of their files
    lazily.

    Args:
        scripts: default: the running script and its base, see `constants.override`.

    Returns: 16 hexadecimal digits by path, relative to the project. The entry "model.py" is the
        hash of the running script's MODEL_FILE, if there is one.
    Raises: UserError, if that file is not the module `model` of this process.
    """
    files, model = constants.running.files, _model_file()
    todo = {model, *(script.resolve() for script in scripts or files)}
    found: dict[str, str] = {}
    modules: set[tuple[str, Path]] = set()
    while todo:
        path = todo.pop()
        inside = path.is_relative_to(_ROOT)
        name = path.relative_to(_ROOT).as_posix() if inside else path.name
        name = "model.py" if path == model else name
        if name in found or not path.is_file():
            continue
        ignored = constants.running.names if path in files else frozenset()
        found[name], imported = _parsed(_source(path), ignored)
        for module in {(module, path.parent) for module in imported} - modules:
            modules.add(module)
            todo.update([model] if module[0] == "model" else _files_of(*module))
    return dict(sorted(found.items()))


def _model_file() -> Path:
    """The running script's MODEL_FILE, or model.py."""
    given = constants.running.model_file
    if given is None:
        return _ROOT / "model.py"
    path, used = Path(given).resolve(), getattr(sys.modules.get("model"), "__file__", None)
    if used is None or path != Path(used).resolve():
        raise UserError(
            f"MODEL_FILE={given} has no effect here, because this process has already imported "
            f"{used}. Start the script by itself: python train.py --model-file {given}"
        )
    return path


def _source(path: Path) -> bytes:
    """The content of a file; for the module `model`, the content that was imported."""
    spec = getattr(sys.modules.get("model"), "__spec__", None)
    if spec and spec.loader_state and Path(spec.origin) == path:
        return spec.loader_state
    return path.read_bytes()


@cache
def _parsed(source: bytes, ignored: frozenset[str]) -> tuple[str, frozenset[str]]:
    """The hash of a file without the named assignments, and the modules that it imports."""
    try:
        with without_garbage_collection():  # of the many nodes of a syntax tree, none is garbage
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if not _assigns(node, ignored)]
            tokens: list[str] = []
            imports: set[str] = set()
            _tokenize(tree, tokens, imports)
            source = "\0".join(tokens).encode("utf-8", "surrogatepass")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # cannot be imported either
        imports = set()
    return hashlib.blake2b(source, digest_size=8).hexdigest(), frozenset(imports)


def _package(module: str) -> str:
    """`lab.core` for `lab.core.runs`: a package of the lab is hashed as a whole."""
    return ".".join(module.split(".")[:2]) if module.startswith("lab.") else module


def _assigns(node: ast.stmt, names: frozenset[str]) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in names for target in targets)


def _tokenize(node: ast.AST, tokens: list[str], imports: set[str]) -> None:
    """Appends a tree as text, and adds the modules that it imports, also inside functions.

    Unlike `ast.dump`, the text is the same in all versions of Python.
    """
    if isinstance(node, ast.Import):
        imports.update(_package(alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        parent = f"{module}." if node.module else module
        imports.update(_package(name) for name in (module, *(parent + a.name for a in node.names)))
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
                _tokenize(item, tokens, imports)
            else:
                tokens.append(repr(item))
        tokens.append(";")


def _files_of(module: str, folder: Path) -> list[Path]:
    """The files of an imported module; none for a module that is not part of this project.

    Args:
        module: its name; with leading dots, relative to `folder`.
        folder: the folder of the file that imports it.
    """
    name = module.lstrip(".")
    first, *rest = name.split(".")
    level = len(module) - len(name)
    if first == "lab" and not level:
        package = _ROOT / "lab" / rest[0] if rest else _ROOT / "lab" / "__init__.py"
        return [*package.rglob("*.py")] if package.is_dir() else [package.with_suffix(".py")]
    if level:
        parents = [(folder, *folder.parents)[level - 1]]
    else:
        parents = [folder, _ROOT] if folder.is_relative_to(_ROOT) else [folder]
    paths = [parent.joinpath(first, *rest) for parent in parents]
    candidates = [
        file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")
    ]
    return [path for path in candidates if path.is_file()]
