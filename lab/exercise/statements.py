"""What can be said about outputs that no known mistake explains: the narrowest true statement.

Each function returns a sentence if it is true of the part, else None. The order is from narrow to
wide, and the first sentence is used.
"""

import math

import torch
from torch import Tensor

from lab.exercise.layouts import slots
from lab.exercise.mistakes import SCALE
from lab.exercise.reference import Mistake
from lab.exercise.trials import THREE, TWO, Case, Evidence, close


def narrowest_statement(evidence: Evidence) -> str | None:
    """A true sentence about how the part differs from the reference, as narrow as possible."""
    for statement in STATEMENTS:
        try:
            if sentence := statement(evidence):
                return sentence
        except (Exception, SystemExit):  # the next statement may still work
            continue
    return None


def _outputs(evidence: Evidence, case: Case = TWO) -> tuple[Tensor, Tensor]:
    """The part's output and the reference's with the same weights, (B, ...)."""
    trial = evidence.trial(case)
    reference = trial.load(trial.reference(), evidence.layout(case))
    with torch.no_grad():
        return evidence.outcome(case).output, reference(trial.inputs)


def _shape(evidence: Evidence) -> str | None:
    got, right = evidence.outcome(TWO).output.shape, _outputs_shape(evidence)
    if got != right and sorted(got) == sorted(right):
        return f"the axes of the output are in another order: {tuple(got)}, not {tuple(right)}"
    return None


def _outputs_shape(evidence: Evidence) -> torch.Size:
    trial = evidence.trial(TWO)
    return trial.reference()(trial.inputs).shape


def _parameters(evidence: Evidence) -> str | None:
    """The parameters cannot be those of the part: which shapes are missing or too many."""
    trial = evidence.trial(TWO)
    if evidence.layout(TWO) is not None:
        return None
    own = [tuple(slot.tensor.shape) for slot in trial.slots if slot.registered]
    wanted = [(slot.name, tuple(slot.tensor.shape)) for slot in slots(trial.reference())]
    for shape in list(own):
        if match := next((item for item in wanted if item[1] == shape), None):
            own.remove(shape)
            wanted.remove(match)
    missing = ", ".join(f"{name} {shape}" for name, shape in wanted)
    extra = ", ".join(str(shape) for shape in own)
    return (
        "; ".join(
            ([f"parameters that it needs and does not have: {missing}"] if missing else [])
            + ([f"parameters that it has and does not need, of shape {extra}"] if extra else [])
        )
        or "its parameters have the right shapes, but which is which is not clear from their names"
    )


def _mixes_images(evidence: Evidence) -> str | None:
    trial = evidence.trial(TWO)
    other = trial.inputs.clone()
    other[1] = torch.randn_like(other[1])
    with torch.no_grad():
        if not close(trial.run(other)[0], trial.run()[0]):
            return "the output for one image depends on the other images of the batch"
    return None


def _mixes_tokens(evidence: Evidence) -> str | None:
    if evidence.part.name != "MLP":
        return None
    trial = evidence.trial(TWO)
    other = trial.inputs.clone()
    other[:, 1:] = torch.randn_like(other[:, 1:])
    if not close(trial.run(other)[:, 0], trial.run()[:, 0]):
        return "the output for one token depends on the other tokens; an MLP treats each separately"
    return None


def _depends_on_order(evidence: Evidence) -> str | None:
    if evidence.part.name not in ("Attention", "Block"):
        return None
    trial = evidence.trial(TWO)
    order = torch.arange(trial.inputs.shape[1]).roll(3)
    if not close(trial.run(trial.inputs[:, order]), trial.run()[:, order]):
        return "the result for a token depends on the order of the tokens; it must not"
    return None


def _weight_sums(evidence: Evidence) -> str | None:
    if evidence.part.name != "Attention":
        return None
    _, weights = evidence.trial(TWO).run(return_weights=True)
    one = torch.ones(())
    over_keys, over_queries = weights.sum(-1), weights.sum(-2)
    if close(over_keys, one.expand_as(over_keys)):
        return None
    if close(over_queries, one.expand_as(over_queries)):
        return "the attention weights sum to one over queries; they must do so over keys"
    if close(over_keys, over_keys.flatten()[0].expand_as(over_keys)):
        return f"the attention weights of a token sum to {over_keys.flatten()[0]:.3g}, not to one"
    return "the attention weights of a token do not sum to one"


def _factor(evidence: Evidence) -> str | None:
    factors = []
    for case in (TWO, THREE):
        got, right = _outputs(evidence, case)
        factors.append(float((got * right).sum() / right.square().sum()))
        if not close(got, factors[-1] * right):
            return None
    first, second = factors
    if math.isclose(first, second, rel_tol=1e-6):
        return f"the outputs are correct up to a factor of {first:.3g}"
    return (
        f"the outputs are correct up to a factor that depends on the sizes: {first:.3g} for "
        f"{_sizes(evidence, TWO)}, {second:.3g} for {_sizes(evidence, THREE)}"
    )


def _sizes(evidence: Evidence, case: Case) -> str:
    config, inputs = evidence.trial(case).config, evidence.trial(case).inputs
    tokens = f"N={inputs.shape[1]}, " if inputs.ndim == 3 else ""
    return f"{tokens}D={config.embed_dim} and h={config.num_heads}"


def _offset(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    difference = got - right
    if close(difference, difference.flatten()[0].expand_as(difference)):
        return f"the outputs are correct up to {difference.flatten()[0]:+.3g} that is added to all"
    if got.ndim == 3 and close(difference, difference[:1, :1].expand_as(difference)):
        return "the outputs are correct up to a vector that is the same for all tokens and images"
    inputs = evidence.trial(TWO).inputs
    if inputs.shape == got.shape:
        times = float((difference * inputs).sum() / inputs.square().sum())
        if close(difference, times * inputs):
            return f"the outputs are correct up to {times:+.3g} times the input"
    return None


def _correct_part(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    names = ("image", "token", "channel") if got.ndim == 3 else ("image", "class")
    for axis, name in enumerate(names):
        pairs = zip(got.unbind(axis), right.unbind(axis), strict=True)
        good = [i for i, (a, b) in enumerate(pairs) if close(a, b)]
        if good:
            numbers = ", ".join(map(str, good[:8])) + (", ..." if len(good) > 8 else "")
            return f"the outputs are correct for {name} {numbers} (counted from 0), not for others"
    return None


def _reordered(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    names = {1: "tokens", 2: "channels"} if got.ndim == 3 else {1: "classes"}
    for axis, name in {0: "images", **names}.items():
        a, b = got.movedim(axis, 0).flatten(1), right.movedim(axis, 0).flatten(1)
        nearest = torch.cdist(b, a).argmin(1)
        if len(set(nearest.tolist())) == len(nearest) and close(a[nearest], b):
            return f"the outputs are correct, but the {name} are in another order"
    if close(got.flatten().sort()[0], right.flatten().sort()[0]):
        return "all numbers of the output are correct, but in other places"
    return None


def _activation(evidence: Evidence) -> str | None:
    """Measures the activation of an MLP with weights that let single values through."""
    if evidence.part.name != "MLP":
        return None
    trial = evidence.new_trial(TWO)
    reference = trial.reference()
    layout = trial.layouts(reference)[0]
    with torch.no_grad():
        for slot in slots(reference):
            slot.tensor.zero_()
        reference.fc1.weight[0, 0] = reference.fc2.weight[0, 0] = 1.0
        trial.load_back(layout, reference)
        inputs = torch.zeros_like(trial.inputs[:, :2])
        inputs[:, 0, 0], inputs[:, 1, 0] = 1.0, -1.0
        (up, down), (right_up, right_down) = trial.run(inputs)[0, :, 0], reference(inputs)[0, :, 0]
    if math.isclose(up, right_up, rel_tol=1e-6) and math.isclose(down, right_down, rel_tol=1e-6):
        return None
    return (
        f"between the two layers, 1 becomes {up:.4f} and -1 becomes {down:.4f}; with the exact "
        f"GELU they become {right_up:.4f} and {right_down:.4f}"
    )


def _scale(evidence: Evidence) -> str | None:
    """Looks for a factor of the scores that explains the output of attention."""
    if evidence.part.name != "Attention":
        return None
    trial = evidence.trial(TWO)
    got, layout = evidence.outcome(TWO).output, evidence.layout(TWO)

    def error(log_scale: float) -> float:
        edit = (SCALE, f"q = q * {math.exp(log_scale)!r}")
        twin = trial.load(trial.reference((Mistake(str(log_scale), "", "", (edit,)),)), layout)
        with torch.no_grad():
            return float((twin(trial.inputs) - got).square().mean())

    grid = [-6 + 0.25 * i for i in range(37)]
    best = min(grid, key=error)
    low, high = best - 0.25, best + 0.25
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if error(left) < error(right) else (left, high)
    if error(low) > 1e-10 * float(got.square().mean()):
        return None
    correct = (trial.config.embed_dim // trial.config.num_heads) ** -0.5
    return f"the scores are multiplied by {math.exp(low):.3g} instead of {correct:.3g}"


def _largest_difference(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    difference = (got - right).abs()
    place = torch.unravel_index(difference.argmax(), difference.shape)
    where = ", ".join(str(int(i)) for i in place)
    return (
        f"the largest difference is at [{where}]: {got[place]:.4f}, where {right[place]:.4f} is "
        "correct"
    )


STATEMENTS = (
    _shape, _parameters, _factor, _offset, _reordered, _correct_part, _weight_sums, _scale,
    _mixes_images, _mixes_tokens, _activation, _depends_on_order, _largest_difference,
)  # fmt: skip
