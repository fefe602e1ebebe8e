"""A script's constants are its flags: `BATCH_SIZE: int = 128  # why` is also `--batch-size 64`.

The type comes from the annotation, the help text from the comment after the constant, and the
groups from headings such as `# --- Data ---`, so that a script states everything once. A value
edited in the file and a value given as a flag pass the same checks.
"""

import argparse
import ast
import math
import os
import shlex
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lab.core.errors import UserError, suggest
from lab.core.script_source import (
    MISSING,
    Constant,
    Recipes,
    committed,
    missing_constant,
    read_constants,
    unknown_constant,
)

_MINIMUM = {"SEED": 0}  # random generators accept no negative seeds
_MAXIMUM = {"DEPTH": 1000, "NUM_SEEDS": 1000}  # more would fill the memory, or never end


@dataclass(frozen=True)
class RunningScript:
    """The script that is running, as registered by `override`."""

    files: tuple[Path, ...] = ()  # the script and, if there is one, the script it is based on
    names: frozenset[str] = frozenset()  # its constants, and the name of its recipes
    edited: Mapping[str, Any] = field(default_factory=dict)  # differ from the committed values
    model_file: str | None = None  # its MODEL_FILE: see lab/core/code.py


running = RunningScript()


def override(
    module: types.ModuleType,
    argv: list[str] | None = None,
    base: types.ModuleType | None = None,
    without: tuple[str, ...] = (),
    recipes: Recipes | None = None,
) -> dict[str, Any]:
    """Replaces a script's upper-case constants with the values given on the command line.

    Args:
        module: the script, `sys.modules[__name__]`; its docstring heads `--help`.
        argv: the arguments; None takes the process's own if it was started to run this script,
            and no arguments otherwise, as in a notebook that imports the script.
        base: a script whose constants this one inherits.
        without: constants of `base` that this script does not have.
        recipes: values of the constants that are None, by name of the recipe; `--help` shows them.

    Returns: the value of each constant by name; the attributes of `module` are set to them.
    Raises: SystemExit with a message for an unknown flag or constant, or an invalid value.
    """
    global running
    parser = _Parser(
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    constants = read_constants(module, base, without, recipes)
    names = [*(constant.name for constant in constants), *without]
    if message := unknown_constant(module, base) or missing_constant(module, base, names):
        parser.error(message)
    for constant in constants:
        try:
            check(constant.value, constant.annotation, constant.name)
        except ValueError as error:
            parser.error(f"{constant.place}: {constant.name} = {constant.value!r}: {error}")
    _add_flags(parser, constants, recipes or {})
    if argv is None:
        argv = sys.argv[1:] if _is_running(module) else []
    given = vars(parser.parse_args(argv))
    for name in (name for name, value in given.items() if value == []):  # as argparse reads `=--`
        parser.error(f"argument {_flag(name)}: the value is missing")
    values, edited = {}, {}
    for constant in constants:
        name = constant.name
        values[name] = check(given[name], constant.annotation, name)
        if name.endswith("_DIR"):
            values[name] = os.path.expanduser(values[name])
        original = committed(constant.file).get(name, (None, MISSING))[1]
        if given[name] is constant.value and original not in (MISSING, values[name]):
            edited[name] = values[name]
    modules = [module, base] if base else [module]
    tables = {k for m in modules for k, v in vars(m).items() if recipes and v is recipes}
    files = tuple(Path(m.__file__).resolve() for m in modules)
    names = frozenset({*values, *tables})
    running = RunningScript(files, names, edited, values.get("MODEL_FILE"))
    vars(module).update(values)
    return values


def early_value(name: str) -> str | None:
    """A text constant of the running script, read before the script has assigned it.

    This is for a constant that decides what the script imports. The value comes from the script's
    source or from its flag; `override` checks it later.

    Returns: the value; None if it is None, or if the script has no such constant.
    """
    script = Path(sys.argv[0]) if sys.argv else Path()
    if script.suffix != ".py" or not script.is_file():  # an interactive session, for example
        return None
    values = [
        node.value
        for node in ast.parse(script.read_bytes()).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and name in map(ast.unparse, getattr(node, "targets", None) or [node.target])
    ]
    if not values:
        return None
    value = values[-1].value if isinstance(values[-1], ast.Constant) else None
    words = iter(sys.argv[1:])
    for word in words:
        flag, separator, text = word.partition("=")
        if flag == _flag(name):
            value = text if separator else next(words, None)
    return value if isinstance(value, str) and value.lower() != "none" else None


def resolve(values: dict[str, Any], recipe: Mapping[str, Any]) -> types.SimpleNamespace:
    """Constants that are None take the recipe's value; all others keep theirs."""
    filled = {k: recipe.get(k) if v is None else v for k, v in values.items()}
    return types.SimpleNamespace(**filled)


def header(values: Mapping[str, Any], resolved: types.SimpleNamespace, recipe: str) -> str:
    """The lines at the start of a run that say which value each None constant received.

    Args:
        values: the constants as `override` returned them.
        resolved: the constants as `resolve` returned them.
        recipe: name of the recipe that was used.
    """
    found = [f"{k} {v}" for k, v in vars(resolved).items() if values[k] is None and v is not None]
    used = ", ".join(found) or "not used, because every constant is set"
    text = f"recipe {recipe}: {used}"
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Constants as command-line arguments, such as `--batch-size=64` or `--no-flip`."""
    args = []
    for name, value in values.items():
        flag = _flag(name)
        if isinstance(value, bool):
            args.append(flag if value else f"--no-{flag[2:]}")
        else:
            args.append(f"{flag}={'none' if value is None else value}")
    return args


def check(value: Any, annotation: Any, name: str = "") -> Any:
    """Checks a constant's value against its annotation.

    Args:
        value: the value, from the file or, already converted, from a flag.
        annotation: int, float, str, bool, Literal[...], or one of these | None.
        name: the constant's name; some have limits of their own.

    Returns: the value; for float constants an int becomes a float.
    Raises: ValueError, with a message that says what is wrong and which values are valid.
    """
    optional, choices, kind = _unpack(annotation)
    or_none = " or None" if optional else ""
    noun = "True, False" if optional and kind is bool else _NOUNS.get(kind, "a choice")
    if value is None:
        if optional:
            return None
        raise _InvalidValue(f"None is not {noun}")
    if choices:
        if value in choices and type(value) in map(type, choices):
            return value
        listed = ", ".join(map(str, choices))
        raise _InvalidValue(
            f"{value!r} is not one of {listed}{or_none}{suggest(str(value), map(str, choices))}"
        )
    wrong = f"{value!r} is not {noun}{or_none}"
    if isinstance(value, tuple) and kind is not tuple:
        if kind is float and len(value) == 2 and all(isinstance(v, int) for v in value):
            wrong += f"; write a decimal point, {value[0]}.{value[1]}"
        elif len(value) == 1:
            wrong += f"; remove the comma after {value[0]!r}"
        raise _InvalidValue(wrong)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.maxsize:
            raise _InvalidValue(f"{value} is too large")
        value = float(value)
    if type(value) is not kind:
        if kind is int and isinstance(value, float) and value.is_integer():
            wrong += f"; write {int(value)}"
        elif kind is bool and str(value).lower() in ("true", "false"):
            wrong += f"; write {str(value).capitalize()} without quotes"
        elif kind in (int, float) and isinstance(value, str) and _is_number(value):
            wrong += f"; write {value} without quotes"
        raise _InvalidValue(wrong)
    if kind is float and not math.isfinite(value):
        raise _InvalidValue(f"{value} is not a finite number")
    if kind is int and abs(value) > sys.maxsize:
        raise _InvalidValue(f"{value} is too large; the maximum is {sys.maxsize}")
    if kind is int and value < _MINIMUM.get(name, value):
        raise _InvalidValue(f"{value} is negative; it must be {_MINIMUM[name]} or more")
    if kind is int and value > _MAXIMUM.get(name, value):
        raise _InvalidValue(f"{value} is too large; the maximum is {_MAXIMUM[name]}")
    return value


def check_choices(config: Any) -> None:
    """Checks the fields of a dataclass that are annotated as Literal.

    A constant loses its annotation, and with it the check, in the edit `LR_SCHEDULE = "step"`.

    Raises: UserError, naming the constant.
    """
    for name, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is Literal:
            try:
                check(getattr(config, name), annotation)
            except ValueError as error:
                raise UserError(f"{name.upper()}: {error}") from error


def _is_running(module: types.ModuleType) -> bool:
    """Whether the process's arguments are meant for this script."""
    started = Path(sys.argv[0]).name if sys.argv else ""
    return module.__name__ == "__main__" or started == Path(module.__file__).name


# --- Flags ---


class _InvalidValue(argparse.ArgumentTypeError, ValueError):
    """An ArgumentTypeError, so that argparse prints it verbatim, and a ValueError for callers."""


class _Parser(argparse.ArgumentParser):
    """Suggests the closest flag for one that does not exist."""

    def parse_args(self, argv: Any = None, namespace: Any = None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            words = [word.partition("=")[0] for word in unknown]
            flag = next((word for word in words if word.startswith("-")), None)
            if flag is None:
                shown = shlex.join(unknown[:3]) + (" ..." if unknown[3:] else "")
                self.error(f"{shown} is not preceded by a flag{self._after(argv, words)}")
            known = self._option_string_actions
            if (name := _OTHER_NAMES.get(flag)) in known:
                self.error(f"unknown flag {flag}; here it is {name}")
            self.error(f"unknown flag {flag}{_ABSENT.get(flag) or suggest(flag, known, 0.7)}")
        return found

    def _after(self, argv: list[str], words: list[str]) -> str:
        """A hint for a value too many, as in `--flip False` and `--images a.jpg b.jpg`."""
        at = argv.index(words[0]) if words[0] in argv else 0
        before = [i for i, word in enumerate(argv[:at]) if word.startswith("--")]
        flag = argv[before[-1]] if before else ""
        action = self._option_string_actions.get(flag)
        if action and action.nargs == 0 and at == before[-1] + 1:
            return f"; {flag} takes no value: write {flag} or --no-{flag[2:].removeprefix('no-')}"
        if action and action.metavar and action.metavar.startswith("STR") and action.nargs is None:
            return f'; {flag} takes one value: put names that belong together in quotes, "a b"'
        return ""


_OTHER_NAMES = {"--lr": "--learning-rate", "--bs": "--batch-size", "--wd": "--weight-decay"}
_ABSENT = {  # what other programs have a flag for
    "--resume": "; the same command resumes a stopped run",
    "--device": "; a GPU is used if there is one",
    "--gpu": "; a GPU is used if there is one",
}


def _add_flags(
    parser: argparse.ArgumentParser, constants: list[Constant], recipes: Recipes
) -> None:
    """Adds a flag for each constant, in the group of its heading."""
    groups: dict[str, Any] = {"": parser}
    for constant in constants:
        title = constant.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        optional, choices, kind = _unpack(constant.annotation)
        if kind is bool:
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = kind.__name__.upper() + ("|none" if optional else "")
            if choices:
                metavar = "{" + ",".join(map(str, choices)) + "}"
            options = {"type": _reader(constant), "metavar": metavar}
        text = f"{constant.comment} {_default(constant, recipes)}".strip().replace("%", "%%")
        groups[title].add_argument(
            _flag(constant.name), dest=constant.name, default=constant.value, help=text, **options
        )


def _default(constant: Constant, recipes: Recipes) -> str:
    if constant.value is not None:
        return f"(default: {constant.value})"
    values = {name: r[constant.name] for name, r in recipes.items() if constant.name in r}
    if len(values) == len(recipes) > 0 and len(set(values.values())) == 1:
        return f"(default: {next(iter(values.values()))})"
    return f"({', '.join(f'{name}: {value}' for name, value in values.items())})" if values else ""


def _reader(constant: Constant) -> Callable[[str], Any]:
    """A function that reads a flag's text as a value of the constant."""
    optional, choices, kind = _unpack(constant.annotation)
    by_text = {str(choice): choice for choice in choices}

    def read(text: str) -> Any:
        if text in by_text:
            return by_text[text]
        if optional and text.lower() == "none":
            return None
        value: Any = text
        if kind in (int, float):
            try:
                value = kind(text)
            except ValueError:  # `check` reports it
                if kind is int and _is_number(text):
                    value = float(text)
        return check(value, constant.annotation, constant.name)

    return read


_NOUNS = {int: "an integer", float: "a number", str: "text", bool: "True or False"}


def _unpack(annotation: Any) -> tuple[bool, tuple[Any, ...], Any]:
    """Whether None is allowed, the choices if there are any, and the plain type."""
    options = get_args(annotation)
    optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in options
    if optional:
        annotation = next(o for o in options if o is not type(None))
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return optional, choices, type(choices[0])
    return optional, (), annotation


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")
