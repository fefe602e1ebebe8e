"""A script's constants are its command line: `BATCH_SIZE: int = 128  # why` is `--batch-size 64`.

The type comes from the annotation, the help text from the comment behind the constant and the
groups from the headings `# --- Data ---`, so that a script says everything once.
"""

import argparse
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

HEADING = re.compile(r"# --- (.+?) -*$")
CONSTANT = re.compile(r"([A-Z][A-Z0-9_]*)\s*:[^#]*=[^#]*(?:#\s*(.*))?$")


def override(
    module: types.ModuleType,
    argv: list[str] | None = None,
    base: types.ModuleType | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Replaces a script's annotated upper-case constants by what the command line says.

    Args:
        module: the script, `sys.modules[__name__]`; its docstring heads `--help`.
        argv: the arguments; None takes those of the process.
        base: a script whose other constants this one has too.
        without: the constants of `base` that it has not.

    Returns: every constant by name, as it holds from now on.
    Raises: SystemExit with a message, for a flag that does not exist or a value of a wrong type.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, module, set())
    if base:
        add_flags(parser, base, {*get_type_hints(module), *without})
    values = vars(parser.parse_args(argv))
    vars(module).update(values)
    return values


def add_flags(parser: argparse.ArgumentParser, module: types.ModuleType, known: set[str]) -> None:
    """Adds a flag for each annotated constant in the source of `module` that is not known yet."""
    types_of = {n: t for n, t in get_type_hints(module).items() if n.isupper() and n not in known}
    group: Any = parser
    with open(module.__file__, encoding="utf-8") as source:
        for line in source:
            if heading := HEADING.match(line):
                group = parser.add_argument_group(heading[1].strip())
            elif (match := CONSTANT.match(line.rstrip())) and match[1] in types_of:
                default = getattr(module, match[1])
                shown = "" if default is None else f" (default: {default})"
                text = f"{match[2] or ''}{shown}".replace("%", "%%")
                flag = "--" + match[1].lower().replace("_", "-")
                group.add_argument(
                    flag, dest=match[1], default=default, help=text, **kind(types_of[match[1]])
                )


def resolve(values: dict[str, Any], recipe: dict[str, Any]) -> types.SimpleNamespace:
    """Constants that are None take the recipe's value; what a user set stays."""
    filled = {k: recipe.get(k) if v is None else v for k, v in values.items()}
    return types.SimpleNamespace(**filled)


def kind(annotation: Any) -> dict[str, Any]:
    """argparse's keywords for int, float, str, bool, Literal[...], or one of these | None."""
    options = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in options:
        inner = kind(next(o for o in options if o is not type(None)))
        if parse := inner.get("type"):

            def parse_or_none(text: str) -> Any:
                return None if text.lower() == "none" else parse(text)

            inner["type"] = parse_or_none
            parse_or_none.__name__ = f"{parse.__name__} or none"  # argparse's messages show it
            inner["metavar"] = f"{parse.__name__.upper()}|none"
        return inner
    if get_origin(annotation) is Literal:
        return {"choices": options}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation, "metavar": annotation.__name__.upper()}
