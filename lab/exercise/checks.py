"""The checks of the parts of model.py, in order: shapes, values, gradients, options, weights.

`check_part` runs them on one part of a submission until one fails, and explains the failure.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from lab.exercise.diagnosis import diagnose
from lab.exercise.options import OPTIONS
from lab.exercise.parts import PARTS, Part
from lab.exercise.reference import NEEDS
from lab.exercise.step_checks import check_step, diagnose_step
from lab.exercise.submission import Failure, Submission
from lab.exercise.symptoms import SYMPTOMS, Symptom
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


def check_part(submission: Submission, name: str, seed: int, weights: Path) -> Result:
    """Checks one part with random inputs and parameters that follow from the seed.

    Args:
        submission: the student's files.
        name: of the part.
        seed: any number; the outcome must not depend on it.
        weights: released weights of a small ViT, a safetensors file of the lab's.
    """
    part, result = PARTS[name], Result(name)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        evidence = None if part.is_function else _gather(submission, part, seed)
        for check in part.checks:
            try:
                if evidence is None:
                    check_step(submission, part, check, seed)
                else:
                    CHECKS[check](evidence, weights)
                result.passed.append(check)
            except Failure as failure:
                if evidence is None:
                    diagnosis = diagnose_step(submission, part, failure, seed)
                else:
                    diagnosis = diagnose(evidence, failure, check)
                result.failed, result.unwritten = check, failure.unwritten
                result.says, result.because = diagnosis.says, diagnosis.because
                result.mistakes = diagnosis.mistakes
                break
    except Failure as failure:  # there is nothing to check, such as no ViTConfig
        result.failed, result.says = part.checks[0], str(failure)
    finally:
        torch.set_default_dtype(previous)
    return result


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
            raise _failure(
                evidence,
                f"for {case.name} the output has shape {tuple(out.shape)}, not "
                f"{tuple(right.shape)}",
            )


def _values(evidence: Evidence, weights: Path) -> None:
    """The output is that of timm's module with the same parameters."""
    if not evidence.agrees():
        raise _failure(evidence, "the shapes are correct, but the values are not")


def _gradients(evidence: Evidence, weights: Path) -> None:
    """The part can be trained: all parameters are registered and get the right gradient."""
    symptoms = {symptom.name: symptom for symptom in SYMPTOMS}
    for name in ("input changed in place", "parameters in a plain list",
                 "tensor instead of parameter", "hard-coded device"):  # fmt: skip
        if symptoms[name].test(evidence, ""):
            raise _failure(evidence, symptoms[name].says, symptoms[name])
    out = evidence.outcome(TWO, gradients=True)
    if out.error:
        explained = evidence.submission.explain(out.error)
        if explained.line:
            raise explained
        failure = _failure(evidence, str(explained))
        failure.cause = out.error
        raise failure
    if not evidence.agrees(cases=(TWO,), gradients=True):
        names = ["the input", *(slot.name for slot in evidence.trial(TWO).slots)]
        missing = [n for n, g in zip(names, out.gradients, strict=True) if g is None]
        what = f"no gradient reaches {', '.join(missing)}" if missing else "gradients are wrong"
        raise _failure(evidence, f"the output is correct, but {what}")


def _options(evidence: Evidence, weights: Path) -> None:
    """The part does what the configuration can ask for besides sizes, also in training mode."""
    for mistake in OPTIONS[evidence.part.name]:
        if mistake.test(evidence, ""):
            raise _failure(evidence, mistake.sentence(evidence), mistake)


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


CHECKS: dict[str, Callable[[Evidence, Path], None]] = {
    "shapes": _shapes,
    "values": _values,
    "gradients": _gradients,
    "options": _options,
    "released weights": _released,
}
