"""The script that a sweep runs: which constants it has, and how a trial gives it theirs."""

import argparse
import ast
import difflib
import hashlib
import importlib.util
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from lab.core.constants import add_flags
from lab.core.errors import UserError

OURS = ("NAME", "RESULTS_DIR", "FRESH", "SEEDS")  # the sweep sets them, for each trial
Params = dict[str, Any]  # a trial's value of each constant


@dataclass(frozen=True)
class Script:
    """A script that trains, and its constants as a sweep fixes them."""

    path: Path
    types: dict[str, Any]  # annotations, by constant
    values: dict[str, Any]  # by constant, FIXED included
    tables: dict[str, str]  # fingerprints of what else is in capitals, such as RECIPES
    fixed: list[str]  # the words of FIXED

    @classmethod
    def load(cls, name: str, fixed: str) -> "Script":
        """Imports a script, to read which constants are its flags.

        Args:
            name: its path.
            fixed: flags that every run gets.

        Raises: UserError, for a script that is not there or trains nothing, and for flags that it
            does not have, or that the sweep sets itself.
        """
        path, words = Path(name), split("FIXED", fixed)
        if not path.is_file() or path.suffix != ".py":
            there = sorted(p.name for p in path.parent.glob("*.py"))
            raise UserError(f"there is no script {name!r}{near(path.name, there)}")
        module, base, without = imported(path)
        parser = FixedParser(add_help=False, allow_abbrev=False)
        add_flags(parser, module, set())
        if base:
            add_flags(parser, base, {*get_type_hints(module), *without})
        values = vars(parser.parse_args(words))
        if not {"EPOCHS", "NAME", "RESULTS_DIR"} <= values.keys():
            raise UserError(f"SCRIPT={name!r} trains nothing: it has no EPOCHS. Sweep train.py, "
                            "finetune.py or another script that trains")  # fmt: skip
        if ours := sorted({*OURS} & {*named(words)}):
            raise UserError(f"FIXED: the sweep sets {' and '.join(ours)} itself, for each trial")
        if values.get("SEEDS", 1) != 1:
            raise UserError("SEEDS must be 1, for a trial is one run: sweep SEED=0,1,2 instead")
        modules = [base, module] if base else [module]
        types = {k: v for m in modules for k, v in get_type_hints(m).items() if k in values}
        tables = {k: v for m in modules for k, v in tables_of(m).items()}
        return cls(path, types, values, tables, words)

    def flags(self, params: Params) -> list[str]:
        """The command line of a trial, without its name and place."""
        return self.fixed + [flag(name, value) for name, value in params.items()]


class FixedParser(argparse.ArgumentParser):
    """Says what is wrong with FIXED, instead of ending the process."""

    def error(self, message: str) -> None:
        raise UserError(f"FIXED: {message}")


def imported(path: Path) -> tuple[ModuleType, ModuleType | None, Sequence[str]]:
    """A script as a module, and the `base` and `without` of its call of `constants.override`.

    Raises: UserError, for one that cannot be imported, or has no such call.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with somebody's script
        raise UserError(f"SCRIPT={str(path)!r} cannot be imported: {error}") from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    call = next((c for c in calls if getattr(c.func, "attr", None) == "override"), None)
    if call is None:
        raise UserError(f"SCRIPT={str(path)!r} has no constants that are flags")
    said = {
        k.arg: eval(compile(ast.Expression(k.value), str(path), "eval"), vars(module))
        for k in call.keywords
        if k.arg in ("base", "without")
    }
    return module, said.get("base"), said.get("without", ())


def tables_of(module: ModuleType) -> dict[str, str]:
    """Fingerprints of a script's tables, such as RECIPES: another table is another run."""
    flags = get_type_hints(module)
    texts = {k: repr(v) for k, v in vars(module).items() if k.isupper() and k not in flags}
    return {
        name: hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        for name, text in texts.items()
        if " at 0x" not in text  # an address: another one in every process
    }


def split(constant: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{constant}={text!r} cannot be read: {error}") from error


def named(words: Iterable[str]) -> list[str]:
    """The constants whose flags are among the words of a command line."""
    flags = [word.partition("=")[0][2:] for word in words if word.startswith("--")]
    return [name.removeprefix("no-").replace("-", "_").upper() for name in flags]


def near(name: str, names: Iterable[str]) -> str:
    """A hint at the names that look alike; else at all of them."""
    close = difflib.get_close_matches(name, names, 3)
    return f"; do you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names)}"


def flag(name: str, value: Any) -> str:
    """A constant's value as one word of the command line."""
    word = name.lower().replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word}={'none' if value is None else value}"
