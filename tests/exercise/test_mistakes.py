"""Every mistake of the library is recognized in a student's code, and is ranked first."""

import pytest

from lab.exercise.model_mistakes import MISTAKES
from lab.exercise.options import OPTIONS
from lab.exercise.step_mistakes import STEP_MISTAKES
from lab.exercise.symptoms import SYMPTOMS
from tests.exercise.conftest import STUDENT, edited, pasted
from tests.exercise.mistakes_made import (
    MADE,
    OPTIONS_MADE,
    PAIRS,
    STEP_GROUPS,
    STEPS_MADE,
    SYMPTOMS_MADE,
)

SINGLE = [(part, name) for part in MADE for name in MADE[part]]
STEPS = [(part, name) for part in STEPS_MADE for name in STEPS_MADE[part]]


def test_every_mistake_of_the_library_is_made_here():
    for part, mistakes in MISTAKES.items():
        assert {m.name for m in mistakes} == set(MADE[part])
    for part, mistakes in STEP_MISTAKES.items():
        assert {m.name for m in mistakes} == set(STEPS_MADE[part])
    assert {s.name for s in SYMPTOMS} == set(SYMPTOMS_MADE)
    assert {o.name for options in OPTIONS.values() for o in options} == set(OPTIONS_MADE)
    assert len(SINGLE) + len(STEPS) + len(SYMPTOMS) >= 60


@pytest.mark.parametrize(("part", "name"), SINGLE)
def test_mistake_is_ranked_first(check, part, name):
    result = check(pasted(edited(part, MADE[part][name])), part)
    assert result.mistakes[:1] == [name], f"{result.says} {result.mistakes}"
    assert "line" in result.says


@pytest.mark.parametrize(("part", "name"), STEPS)
def test_mistake_in_a_step_is_ranked_first(check, part, name):
    result = check(pasted(edited(part, STEPS_MADE[part][name])), part)
    assert result.mistakes[:1] == [name], f"{result.says} {result.mistakes}"


@pytest.mark.parametrize(("part", "call", "passed"), [
    ("training_step", "model.train()", ["loss", "update"]),
    ("evaluate", "model.eval()", ["accuracy"]),
])  # fmt: skip
def test_a_forgotten_mode_only_fails_the_check_of_the_mode(check, part, call, passed):
    assert check(pasted(edited(part, [(call, "")])), part).passed == passed


@pytest.mark.parametrize("name", [*SYMPTOMS_MADE, *OPTIONS_MADE])
def test_symptom_is_ranked_first(check, name):
    part, edits = (SYMPTOMS_MADE | OPTIONS_MADE)[name]
    result = check(pasted(edited(part, edits)), part)
    assert result.mistakes[:1] == [name], f"{result.says} {result.mistakes}"


def test_the_student_without_mistakes_passes(check):
    for part in (*MADE, *STEPS_MADE):
        result = check(pasted(STUDENT), part)
        assert result.failed is None, f"{part}: {result.says}"


@pytest.mark.parametrize(("part", "first", "second"), PAIRS)
def test_pair_of_mistakes_is_found(check, part, first, second):
    result = check(pasted(edited(part, MADE[part][first] + MADE[part][second])), part)
    assert set(result.mistakes) == {first, second}, f"{result.says} {result.mistakes}"


def test_at_least_thirty_pairs_are_tested():
    assert len(PAIRS) >= 30


@pytest.mark.parametrize("group", STEP_GROUPS, ids=str)
def test_several_mistakes_in_a_step_are_found(check, group):
    part, *names = group
    edits = [edit for name in names for edit in STEPS_MADE[part][name]]
    result = check(pasted(edited(part, edits)), part)
    assert set(result.mistakes) == set(names), f"{result.says} {result.mistakes}"
