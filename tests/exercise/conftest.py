"""The hand-out, and submissions made from it by pasting solutions in."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import model
from lab.exercise.checks import Result, check_part
from lab.exercise.handout import skeleton
from lab.exercise.submission import Submission

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
WEIGHTS = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
STUDENT = (HERE / "student.py").read_text(encoding="utf-8")


@cache
def definitions(source: str, of_class: bool = False) -> dict[str, str]:
    """The source of every class and function of a file, or of every method of a class, by name."""
    lines = source.splitlines(keepends=True)
    body = ast.parse(source).body
    found = {}
    for node in body[0].body if of_class else body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return found


@cache
def handed_out_model() -> str:
    return skeleton((ROOT / "model.py").read_text(encoding="utf-8"), "model.py")[0]


@cache
def pasted(solution: str) -> str:
    """One file: the hand-out's model.py with a solution pasted over its classes."""
    text = handed_out_model()
    given = definitions(text)
    for name, code in definitions(solution).items():
        if name == "VisionTransformer":  # the methods that the hand-out gives stay
            written = definitions(code, of_class=True)
            for method, source in definitions(given[name], of_class=True).items():
                code += "" if method in written else f"\n{source}"
        text = text.replace(given[name], code) if name in given else f"{text}\n\n{code}\n"
    imports = [ast.unparse(node) for node in ast.parse(solution).body
               if isinstance(node, ast.Import | ast.ImportFrom)
               and getattr(node, "module", "") != "model"]  # fmt: skip
    start = text.index("import math")
    return text[:start] + "\n".join([*imports, text[start:]])


def edited(part: str, edits: list[tuple[str, str]]) -> str:
    """The student's solution with mistakes in one part."""
    code = definitions(STUDENT)[part]
    for old, new in edits:
        assert old in code, f"{old!r} is not in {part}"
        code = code.replace(old, new, 1)
    return STUDENT.replace(definitions(STUDENT)[part], code)


@pytest.fixture
def check(tmp_path):
    """Checks one part of a solution: check(source, part) -> Result."""

    def run(source: str, part: str, seed: int = 1) -> Result:
        path = tmp_path / "model.py"
        path.write_text(source, encoding="utf-8")
        return check_part(Submission.load(path, None), part, seed, WEIGHTS)

    return run


@pytest.fixture(autouse=True)
def own_model_module(monkeypatch):
    """Loading a submission replaces the module `model`; other tests need the solution."""
    monkeypatch.setitem(sys.modules, "model", model)
