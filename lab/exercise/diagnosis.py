"""Names the mistake in a part: a known one, a symptom, two known ones, or a true statement."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lab.exercise.mistakes import MISTAKES
from lab.exercise.reference import DoesNotApply, Mistake
from lab.exercise.statements import narrowest_statement
from lab.exercise.submission import Failure, where
from lab.exercise.symptoms import Symptom, find_symptoms, finite
from lab.exercise.trials import TWO, Evidence


@dataclass
class Diagnosis:
    """What is wrong, in words. `mistakes` are names from the library, the most likely first."""

    says: str
    because: str = ""
    mistakes: list[str] = field(default_factory=list)


def diagnose(evidence: Evidence, failure: Failure, check: str) -> Diagnosis:
    """Explains why a part fails a check."""
    text = f"{type(failure.cause).__name__}: {failure.cause}" if failure.cause else str(failure)
    if failure.unwritten or (evidence.trial(TWO).module is None and not failure.cause):
        return Diagnosis(str(failure))
    if failure.mistake:
        return Diagnosis(str(failure), failure.mistake.because, [failure.mistake.name])
    if check in ("options", "released weights"):  # the part is correct otherwise
        return Diagnosis(str(failure))
    gradients = check == "gradients"
    twins, symptoms = list(_single_mistakes(evidence, gradients)), find_symptoms(evidence, text)
    if not gradients and not evidence.outcome(TWO).error:
        symptoms = [symptom for symptom in symptoms if not symptom.only_training]
    # A tensor that should be a parameter and a detached parameter have the same (no) gradient.
    known: list[Mistake | Symptom] = symptoms + twins if gradients else twins + symptoms
    if known:
        found = known[0]
        says = found.sentence(evidence) if isinstance(found, Symptom) else found.says
        names = [mistake.name for mistake in known]
        return Diagnosis(_sentence(failure, evidence, says), found.because, names)
    if not gradients and finite(evidence.outcome(TWO).output):
        if pair := next(_pairs_of_mistakes(evidence), None):
            says, because = together(*pair)
            names = [mistake.name for mistake in pair]
            return Diagnosis(_sentence(failure, evidence, says), because, names)
        if not failure.cause and (statement := narrowest_statement(evidence)):
            says = statement[0].upper() + statement[1:] + "."
            return Diagnosis(_sentence(failure, evidence, says))
    return Diagnosis(str(failure))


def together(*mistakes: Any) -> tuple[str, str]:
    """What several mistakes do, and how they happen."""
    count = {1: "", 2: "two mistakes together: ", 3: "three mistakes together: "}[len(mistakes)]
    return (
        count + " ".join(mistake.says for mistake in mistakes),
        ". And: ".join(mistake.because for mistake in mistakes),
    )


def _sentence(failure: Failure, evidence: Evidence, says: str) -> str:
    """The explanation, behind the line to look at and what Python said there."""
    if failure.cause:
        return f"{str(failure).rstrip('.')}. {says}"
    part, submission = evidence.part, evidence.submission
    return f"{where(submission.module_of(part), failure.line)}: {says}"


def _single_mistakes(evidence: Evidence, gradients: bool) -> Iterator[Mistake]:
    """The known mistakes that explain everything the part did, in the order of the library."""
    for mistake in MISTAKES[evidence.part.name]:
        try:
            if evidence.agrees((mistake,), gradients=gradients):
                yield mistake
        except DoesNotApply:  # this version of timm is written differently
            continue


def _pairs_of_mistakes(evidence: Evidence) -> Iterator[tuple[Mistake, Mistake]]:
    """Pairs of known mistakes that explain everything the part did."""
    for pair in itertools.combinations(MISTAKES[evidence.part.name], 2):
        for order in (pair, pair[::-1]):
            try:
                if evidence.agrees(order):
                    yield pair
                break
            except DoesNotApply:  # the second edit may need the line that the first one replaces
                continue
