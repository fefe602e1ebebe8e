"""The checks of a part, in order, and the diagnosis of the first one that fails.

`check_part` runs them on one part of a submission. A mistake in model.py is named by what the part
computes: it agrees with a known mistake, shows a symptom, or agrees with two known mistakes. Where
nothing fits, the diagnosis is a true statement about the output.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from lab.exercise.model_mistakes import MISTAKES
from lab.exercise.options import OPTIONS
from lab.exercise.parts import PARTS, Part
from lab.exercise.reference import NEEDS, DoesNotApply, Mistake, method_of
from lab.exercise.statements import narrowest_statement
from lab.exercise.step_checks import check_step, find_step_mistakes
from lab.exercise.step_mistakes import StepMistake
from lab.exercise.submission import Failure, Submission
from lab.exercise.symptoms import SYMPTOMS, Symptom, find_symptoms, finite
from lab.exercise.trials import ONE, THREE, TWO, Case, Evidence, close

_RELEASED = {
    "PatchEmbed": "patch_embed.", "MLP": "blocks.0.mlp.", "Attention": "blocks.0.attn.",
    "Block": "blocks.0.", "VisionTransformer": "",
}  # fmt: skip


@dataclass
class Result:
    """The checks of one part that passed, and the first one that did not."""

    part: str
    passed: list[str] = field(default_factory=list)
    failed: str | None = None
    says: str = ""  # what is wrong
    because: str = ""  # how somebody gets there
    mistakes: list[str] = field(default_factory=list)  # names from the library, most likely first
    unwritten: bool = False


@dataclass
class _Diagnosis:
    """The fields of a Result that explain a failure."""

    says: str
    because: str = ""
    mistakes: list[str] = field(default_factory=list)


def check_part(
    submission: Submission,
    name: str,
    seed: int,
    weights: Path,
    on_passed: Callable[[str], None] = lambda check: None,
) -> Result:
    """Checks one part with random inputs and parameters that follow from the seed.

    Args:
        submission: the student's files.
        name: of the part.
        seed: any number; the outcome must not depend on it.
        weights: released weights of a small ViT, a safetensors file of the lab's.
        on_passed: called with each check that passed.
    """
    part, passed = PARTS[name], []
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        evidence = None if part.is_function else _gather(submission, part, seed)
        for check in part.checks:
            try:
                if evidence is None:
                    check_step(submission, part, check, seed)
                else:
                    _CHECKS[check](evidence, weights)
                passed.append(check)
                on_passed(check)
            except Failure as failure:
                if evidence is None:
                    diagnosis = _diagnose_step(submission, part, failure, seed)
                else:
                    diagnosis = _diagnose(evidence, failure, check)
                return Result(name, passed, check, unwritten=failure.unwritten, **vars(diagnosis))
    except Failure as failure:  # there is nothing to check, such as no ViTConfig
        return Result(name, passed, part.checks[0], str(failure))
    finally:
        torch.set_default_dtype(previous)
    return Result(name, passed)


def _gather(submission: Submission, part: Part, seed: int) -> Evidence:
    """Evidence on top of the reference's other parts, or of the student's if only that works."""
    filled = Evidence(submission, part, seed)
    if part.name in NEEDS and filled.outcome(TWO).error:
        own = Evidence(submission, part, seed, fill_in=False)
        if not own.outcome(TWO).error:
            return own
    return filled


def _shapes(evidence: Evidence, weights: Path) -> None:
    """The part runs for several batches and sizes, and its output has the right shape."""
    for case in (TWO, THREE, ONE):
        trial = evidence.trial(case)
        out, right = trial.output(), trial.reference()(trial.inputs)
        if out.shape != right.shape:
            got, wanted = tuple(out.shape), tuple(right.shape)
            raise _failure(evidence, f"for {case.name} the output has shape {got}, not {wanted}")


def _values(evidence: Evidence, weights: Path) -> None:
    """The output is that of timm's module with the same parameters."""
    if not evidence.agrees():
        raise _failure(evidence, "the shapes are correct, but the values are not")


def _gradients(evidence: Evidence, weights: Path) -> None:
    """The part can be trained: all parameters are registered and get the right gradient."""
    symptoms = {symptom.name: symptom for symptom in SYMPTOMS}
    for name in ("input changed in place", "parameters in a plain list",
                 "tensor instead of parameter", "hard-coded device"):  # fmt: skip
        if symptoms[name].test(evidence):
            raise _failure(evidence, symptoms[name].says, symptoms[name])
    out = evidence.outcome(TWO, gradients=True)
    if out.error:
        raise evidence.submission.explain(out.error, evidence.part)
    if not evidence.agrees(cases=(TWO,), gradients=True):
        names = ["the input", *(slot.name for slot in evidence.trial(TWO).slots)]
        missing = [n for n, g in zip(names, out.gradients, strict=True) if g is None]
        what = f"no gradient reaches {', '.join(missing)}" if missing else "gradients are wrong"
        raise _failure(evidence, f"the output is correct, but {what}")


def _options(evidence: Evidence, weights: Path) -> None:
    """The part does what the configuration can ask for besides sizes, also in training mode."""
    for mistake in OPTIONS[evidence.part.name]:
        if mistake.test(evidence):
            raise _failure(evidence, mistake.sentence(evidence), mistake)
    _own_parts(evidence)


def _own_parts(evidence: Evidence) -> None:
    """The part also runs with the student's own parts, if those are correct.

    timm's parts, which the checks use instead, have more attributes.
    """
    submission, part, seed = evidence.submission, evidence.part, evidence.seed
    parts = [Evidence(submission, PARTS[name], seed) for name in NEEDS.get(part.name, ())]
    if not parts or not all(other.agrees() for other in parts):
        return
    if error := Evidence(submission, part, seed, fill_in=False).outcome(TWO).error:
        found = submission.explain(error, part)
        says = f"{str(found).rstrip('.')}. It works with timm's parts, but not with your own"
        raise Failure(says, found.line, found.cause)


def _released(evidence: Evidence, weights: Path) -> None:
    """With released weights the part computes what timm's module computes."""
    name = evidence.part.name
    with safe_open(weights, "pt") as file:
        options = json.loads(file.metadata()["vit-lab"])["config"]
        state = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    prefix = _RELEASED[name]
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    trial = evidence.trial(Case("released weights", options))
    right = trial.reference()
    right.load_state_dict(state)
    for layout in trial.layouts(right):
        trial.load_back(layout, right)
        with torch.no_grad():
            if close(trial.run(), right(trial.inputs)):
                return
    raise _failure(evidence, "with released weights the output is not that of timm's model")


def _failure(evidence: Evidence, says: str, mistake: Symptom | None = None) -> Failure:
    method = mistake.method if mistake else "forward"
    return evidence.submission.failure(evidence.part, says, method, mistake=mistake)


_CHECKS: dict[str, Callable[[Evidence, Path], None]] = {
    "shapes": _shapes,
    "values": _values,
    "gradients": _gradients,
    "options": _options,
    "released weights": _released,
}


def _diagnose(evidence: Evidence, failure: Failure, check: str) -> _Diagnosis:
    """Explains why a class of model.py fails a check."""
    if failure.mistake:
        return _Diagnosis(str(failure), failure.mistake.because, [failure.mistake.name])
    not_built = evidence.trial(TWO).module is None and not failure.cause
    correct_otherwise = check in ("options", "released weights")
    if failure.unwritten or not_built or correct_otherwise:
        return _Diagnosis(str(failure))

    def start(method: str = "forward") -> str:
        """What Python said, or the line to look at."""
        if failure.cause:
            return f"{str(failure).rstrip('.')}. "
        return str(evidence.submission.failure(evidence.part, "", method))

    gradients = check == "gradients"
    mistakes = [mistake for (mistake,) in _known_mistakes(evidence, 1, gradients)]
    symptoms = find_symptoms(evidence, _text(failure), failure.code)
    if not gradients and not evidence.outcome(TWO).error:
        symptoms = [symptom for symptom in symptoms if not symptom.only_training]
    # A tensor that should be a parameter and a detached parameter have the same (no) gradient.
    known: list[Mistake | Symptom] = symptoms + mistakes if gradients else mistakes + symptoms
    if known:
        found, names = known[0], [mistake.name for mistake in known]
        if isinstance(found, Symptom):
            says = start(found.method) + found.sentence(evidence)
        else:
            says = start(method_of(evidence.part.name, found)) + found.says
        return _Diagnosis(says, found.because, names)
    if not gradients and finite(evidence.outcome(TWO).output):
        if pair := next(_known_mistakes(evidence, 2), None):
            return _together(start(method_of(evidence.part.name, pair[0])), pair)
        if not failure.cause and (statement := narrowest_statement(evidence, check)):
            says = statement[0].upper() + statement[1:]
            return _Diagnosis(start() + says + ("" if says.endswith("?") else "."))
    return _Diagnosis(str(failure))


def _diagnose_step(submission: Submission, part: Part, failure: Failure, seed: int) -> _Diagnosis:
    """Explains why a function of steps.py fails a check."""
    if failure.unwritten:
        return _Diagnosis(str(failure))
    if failure.cause:
        if known := find_symptoms(None, _text(failure), failure.code):
            says = f"{str(failure).rstrip('.')}. {known[0].says}"
            return _Diagnosis(says, known[0].because, [symptom.name for symptom in known])
    elif mistakes := find_step_mistakes(submission, part, seed):
        return _together(str(submission.failure(part, "")), mistakes)
    return _Diagnosis(str(failure))


def _text(failure: Failure) -> str:
    """The text that symptoms are searched in: the student's exception, or else the failure."""
    cause = failure.cause
    return f"{type(cause).__name__}: {cause}" if cause else str(failure)


def _together(start: str, mistakes: Sequence[Mistake | StepMistake]) -> _Diagnosis:
    """Names one or several mistakes, in a sentence that begins with `start`."""
    count = {1: "", 2: "two mistakes at once: ", 3: "three mistakes at once: "}[len(mistakes)]
    return _Diagnosis(
        start + count + " ".join(mistake.says for mistake in mistakes),
        ". Also: ".join(mistake.because for mistake in mistakes),
        [mistake.name for mistake in mistakes],
    )


def _known_mistakes(
    evidence: Evidence, count: int, gradients: bool = False
) -> Iterator[tuple[Mistake, ...]]:
    """Sets of `count` mistakes that explain everything the part did, in the library's order."""
    for mistakes in itertools.combinations(MISTAKES[evidence.part.name], count):
        for order in itertools.permutations(mistakes):
            try:
                if evidence.agrees(order, gradients=gradients):
                    yield mistakes
                break
            except DoesNotApply:  # one edit may need the line that another one replaces
                continue
