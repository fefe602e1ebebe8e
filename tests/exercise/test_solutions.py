"""Correct solutions that are written differently pass: the skeleton scores 0, the solution all."""

import re
from pathlib import Path

import pytest

from exercise import POINTS
from lab.exercise.handout import skeleton
from lab.exercise.model_mistakes import MISTAKES
from lab.exercise.options import OPTIONS
from lab.exercise.parts import PARTS
from lab.exercise.step_mistakes import STEP_MISTAKES
from lab.exercise.symptoms import SYMPTOMS
from tests.exercise.conftest import HERE, ROOT, STUDENT, definitions, pasted

SOLUTIONS = sorted((HERE / "solutions").glob("*.py"))
README = ROOT / "exercise" / "README.md"
FULL = {part: sum(checks.values()) for part, checks in POINTS.items()}


def points(result) -> float:
    return sum(POINTS[result.part][check] for check in result.passed)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rest", ["nothing else written", "other parts written"])
def test_solution_passes(check, path: Path, rest):
    source = path.read_text(encoding="utf-8")
    parts = [name for name in definitions(source) if name in PARTS]
    assert parts
    whole = source
    if rest == "other parts written":
        others = [code for name, code in definitions(STUDENT).items() if name not in parts]
        imports = STUDENT[STUDENT.index("import math") : STUDENT.index("class PatchEmbed")]
        whole = imports + source + "\n\n" + "\n\n".join(others)
    for part in parts:
        result = check(pasted(whole), part)
        assert result.failed is None, f"{part}, {result.failed}: {result.says}"


def test_there_are_twenty_solutions():
    assert len(SOLUTIONS) >= 20


def test_points_sum_to_one_and_cover_all_checks():
    assert sum(FULL.values()) == pytest.approx(1)
    assert {part: list(checks) for part, checks in POINTS.items()} == {
        name: list(part.checks) for name, part in PARTS.items()
    }


@pytest.mark.parametrize("part", PARTS)
def test_skeleton_scores_nothing(check, part):
    steps, _ = skeleton((ROOT / "exercise" / "steps.py").read_text(encoding="utf-8"), "steps.py")
    result = check(steps if PARTS[part].is_function else pasted(""), part)
    assert points(result) == 0
    assert result.unwritten


@pytest.mark.parametrize("seed", [0, 1, 2, 2**31 - 1])
def test_the_solution_has_full_points_for_every_seed(check, seed):
    steps = (ROOT / "exercise" / "steps.py").read_text(encoding="utf-8")
    model = (ROOT / "model.py").read_text(encoding="utf-8")
    for part in PARTS:
        result = check(steps if PARTS[part].is_function else model, part, seed)
        assert points(result) == pytest.approx(FULL[part]), result.says


def test_the_readme_has_the_points_of_the_script():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", README.read_text(encoding="utf-8"), re.M)
    assert {part: float(points) for part, points in rows} == pytest.approx(FULL)


def test_the_session_in_the_readme_has_the_sentences_of_the_library():
    text = " ".join(README.read_text(encoding="utf-8").split())
    groups = (MISTAKES, OPTIONS, STEP_MISTAKES, {"symptoms": SYMPTOMS})
    known = {entry.because for group in groups for part in group.values() for entry in part}
    shown = re.findall(r"Common cause: (.+?)\. (?=\$|Hint)", text)
    assert len(shown) >= 5
    assert {reason for line in shown for reason in line.split(". Also: ")} <= known
