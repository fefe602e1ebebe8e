"""Names the mistake in a part: a known one, a symptom, two known ones, or a true statement."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lab.exercise.model_mistakes import MISTAKES
from lab.exercise.reference import DoesNotApply, Mistake
from lab.exercise.statements import narrowest_statement
from lab.exercise.submission import Failure
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

    def start(method: str = "forward") -> str:
        """What Python said, or the line to look at."""
        if failure.cause:
            return f"{str(failure).rstrip('.')}. "
        return str(evidence.submission.failure(evidence.part, "", method))

    gradients = check == "gradients"
    mistakes = [mistake for (mistake,) in _known_mistakes(evidence, 1, gradients)]
    symptoms = find_symptoms(evidence, text)
    if not gradients and not evidence.outcome(TWO).error:
        symptoms = [symptom for symptom in symptoms if not symptom.only_training]
    # A tensor that should be a parameter and a detached parameter have the same (no) gradient.
    known: list[Mistake | Symptom] = symptoms + mistakes if gradients else mistakes + symptoms
    if known:
        found = known[0]
        says = found.sentence(evidence) if isinstance(found, Symptom) else found.says
        names = [mistake.name for mistake in known]
        return Diagnosis(start(found.method) + says, found.because, names)
    if not gradients and finite(evidence.outcome(TWO).output):
        if pair := next(_known_mistakes(evidence, 2), None):
            return together(start(pair[0].method), pair)
        if not failure.cause and (statement := narrowest_statement(evidence, check)):
            says = statement[0].upper() + statement[1:]
            return Diagnosis(start() + says + ("" if says.endswith("?") else "."))
    return Diagnosis(str(failure))


def together(start: str, mistakes: tuple[Any, ...]) -> Diagnosis:
    """Names one or several mistakes, in a sentence that begins with `start`."""
    count = {1: "", 2: "two mistakes together: ", 3: "three mistakes together: "}[len(mistakes)]
    return Diagnosis(
        start + count + " ".join(mistake.says for mistake in mistakes),
        ". And: ".join(mistake.because for mistake in mistakes),
        [mistake.name for mistake in mistakes],
    )


def _known_mistakes(
    evidence: Evidence, count: int, gradients: bool = False
) -> Iterator[tuple[Mistake, ...]]:
    """So many mistakes that together explain everything the part did, in the library's order."""
    for mistakes in itertools.combinations(MISTAKES[evidence.part.name], count):
        for order in itertools.permutations(mistakes):
            try:
                if evidence.agrees(order, gradients=gradients):
                    yield mistakes
                break
            except DoesNotApply:  # one edit may need the line that another one replaces
                continue
