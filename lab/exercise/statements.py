"""What can be said about outputs that no known mistake explains: the narrowest true statement.

Each function returns a sentence if it is true of the part, else None. The order is from narrow to
wide, and the first sentence is used.
"""

import math
from contextlib import suppress

import torch
from torch import Tensor

from lab.exercise.layer_mistakes import SCALE
from lab.exercise.layouts import slots
from lab.exercise.reference import TIMM, Mistake
from lab.exercise.trials import THREE, TWO, Case, Evidence, Trial, close


def narrowest_statement(evidence: Evidence, check: str) -> str | None:
    """A true sentence about how the part differs from the reference, as narrow as possible."""
    for statement, *parts in _SHAPE_STATEMENTS if check == "shapes" else _STATEMENTS:
        with suppress(Exception, SystemExit):  # the next statement may still work
            if (not parts or evidence.part.name in parts) and (sentence := statement(evidence)):
                return sentence
    return None


def _outputs(evidence: Evidence, case: Case = TWO) -> tuple[Tensor, Tensor]:
    """The part's output and the reference's with the same weights, (B, ...)."""
    with torch.no_grad():
        right = evidence.reference(case)(evidence.trial(case).inputs)
    return evidence.outcome(case).output, right


def _returns_input(evidence: Evidence) -> str | None:
    if close(evidence.outcome(TWO).output, evidence.trial(TWO).inputs):
        return "the output equals the input: what `forward` computes is not returned"
    return None


def _shape(evidence: Evidence) -> str | None:
    trial = evidence.trial(TWO)
    got, right = evidence.outcome(TWO).output.shape, trial.reference()(trial.inputs).shape
    if got != right and sorted(got) == sorted(right):
        return f"the axes of the output are in another order: {tuple(got)}, not {tuple(right)}"
    return None


def _parameters(evidence: Evidence) -> str | None:
    """The parameters cannot be those of the part: which shapes are missing or too many."""
    trial = evidence.trial(TWO)
    if evidence.layout(TWO) is not None:
        return None
    own = [slot for slot in trial.slots if slot.registered]
    wanted = list(slots(trial.reference()))
    for same in (
        lambda one, other: (one.name, one.tensor.shape) == (other.name, other.tensor.shape),
        lambda one, other: one.tensor.shape == other.tensor.shape,
        lambda one, other: one.tensor.numel() == other.tensor.numel(),  # another layout
    ):
        for slot in list(own):
            if match := next((other for other in wanted if same(slot, other)), None):
                own.remove(slot)
                wanted.remove(match)
    missing, extra = (
        ", ".join(f"{slot.name} {tuple(slot.tensor.shape)}" for slot in found[:4])
        + (f" and {len(found) - 4} more" if found[4:] else "")
        for found in (wanted, own)
    )
    kinds = {"missing": missing, "unexpected": extra}
    said = "; ".join(f"{kind} parameters: {names}" for kind, names in kinds.items() if names)
    return said or "its parameters have the right shapes, but their names do not say which is which"


def _mixes_images(evidence: Evidence) -> str | None:
    trial = evidence.trial(TWO)
    other = trial.inputs.clone()
    other[1] = torch.randn_like(other[1])
    with torch.no_grad():
        if not close(trial.run(other)[0], trial.run()[0]):
            return "the output for one image depends on the other images of the batch"
    return None


def _mixes_tokens(evidence: Evidence) -> str | None:
    trial = evidence.trial(TWO)
    other = trial.inputs.clone()
    other[:, 1:] = torch.randn_like(other[:, 1:])
    if not close(trial.run(other)[:, 0], trial.run()[:, 0]):
        return "the output for one token depends on the other tokens; an MLP treats each separately"
    return None


def _depends_on_order(evidence: Evidence) -> str | None:
    trial = evidence.trial(TWO)
    order = torch.arange(trial.inputs.shape[1]).roll(3)
    if not close(trial.run(trial.inputs[:, order]), trial.run()[:, order]):
        return "the result for a token depends on the order of the tokens; it must not"
    return None


def _weight_sums(evidence: Evidence) -> str | None:
    _, weights = evidence.trial(TWO).run(return_weights=True)
    one = torch.ones(())
    over_keys, over_queries = weights.sum(-1), weights.sum(-2)
    if close(over_keys, one.expand_as(over_keys)):
        return None
    if close(over_queries, one.expand_as(over_queries)):
        return "the attention weights sum to one over queries; they must sum to one over keys"
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
        f"{_sizes(evidence.trial(TWO))}, {second:.3g} for {_sizes(evidence.trial(THREE))}"
    )


def _sizes(trial: Trial) -> str:
    tokens = f"N={trial.inputs.shape[1]}, " if trial.inputs.ndim == 3 else ""
    return f"{tokens}D={trial.config.embed_dim} and h={trial.config.num_heads}"


def _offset(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    difference = got - right
    if close(difference, difference.flatten()[0].expand_as(difference)):
        return f"the outputs are correct up to a constant of {difference.flatten()[0]:+.3g}"
    if got.ndim == 3 and close(difference, difference[:1, :1].expand_as(difference)):
        return "the outputs are correct up to a vector that is the same for all tokens and images"
    inputs = evidence.trial(TWO).inputs
    if inputs.shape == got.shape:
        times = float((difference * inputs).sum() / inputs.square().sum())
        if close(difference, times * inputs):
            return f"the outputs are correct up to {times:+.3g} times the input"
    return None


def _never_negative(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    if got.min() < 0 or right.min() >= 0:
        return None
    return "the output has no negative values: is there an activation function at the end?"


def _correct_part(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    names = ("image", "token", "channel") if got.ndim == 3 else ("image", "class")
    for axis, name in enumerate(names):
        pairs = zip(got.unbind(axis), right.unbind(axis), strict=True)
        good = [i for i, (a, b) in enumerate(pairs) if close(a, b)]
        if good:
            return f"the outputs are correct for {name} {_numbers(good)}, not for others"
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
        return "all values of the output are correct, but in the wrong places"
    return None


def _activation(evidence: Evidence) -> str | None:
    """What an MLP does to single values, with weights that let them through unchanged."""
    trial = Trial(evidence, TWO)
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
        f"with weights that only let one value through, 1 becomes {up:.4f} and -1 becomes "
        f"{down:.4f}; with the exact GELU they become {right_up:.4f} and {right_down:.4f}"
    )


def _scale(evidence: Evidence) -> str | None:
    """Looks for a factor of the scores that explains the output of attention."""
    trial = evidence.trial(TWO)
    got, layout = evidence.outcome(TWO).output, evidence.layout(TWO)

    def error(log_scale: float) -> float:
        mistake = Mistake("", "", {SCALE: f"q = q * {math.exp(log_scale)!r}"})
        mutant = trial.load(trial.reference((mistake,)), layout)
        with torch.no_grad():
            return float((mutant(trial.inputs) - got).square().mean())

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


def _read_pixels(evidence: Evidence) -> str | None:
    """Which pixels the first token depends on."""
    trial = evidence.trial(TWO)
    inputs = trial.inputs.clone().requires_grad_()
    trial.module(inputs)[0, 0].sum().backward()
    rows, columns = (inputs.grad[0].abs().amax(0) > 0).nonzero().unbind(1)  # (H, W) read or not
    last = trial.config.patch_size - 1
    if (rows.max(), columns.max(), len(rows)) == (last, last, (last + 1) ** 2):
        return None
    return (
        f"token 0 reads {len(rows)} pixels, from rows {rows.min()} to {rows.max()} and columns "
        f"{columns.min()} to {columns.max()}; it must read the patch in rows 0 to {last} and "
        f"columns 0 to {last}"
    )


def _attention_stage(evidence: Evidence) -> str | None:
    """Whether the weights are correct, and if they are, whether the heads are only misplaced."""
    reference, trial = evidence.reference(TWO), evidence.trial(TWO)
    seen: list[Tensor] = []
    for layer in (reference.attn_drop, reference.proj):
        layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        reference(trial.inputs)
        right, heads = seen
        got, weights = trial.run(return_weights=True)
        if not close(weights, right):
            return "the attention weights are not correct: the mistake is in them, or before them"
        merged = torch.linalg.solve(reference.proj.weight, (got - reference.proj.bias).mT).mT
    if close(merged.flatten().sort()[0], heads.flatten().sort()[0]):
        return (
            "the heads compute the right numbers, which reach the output layer in the wrong order: "
            "look at the line that merges the heads"
        )
    return "the attention weights are correct: the mistake comes after them"


def _block_stage(evidence: Evidence) -> str | None:
    """What attention and MLP read, and so which line of a block is wrong."""
    if not evidence.fill_in:
        return None
    trial = evidence.trial(TWO)
    found = []
    for block in (trial.module, evidence.reference(TWO)):
        read: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, read=read, name=name: read.setdefault(name, args[0])
            )
            for name in ("Attention", "MLP")
            for module in block.modules()
            if isinstance(module, TIMM[name])
        ]
        with torch.no_grad():
            block(trial.inputs.clone())
        for hook in hooks:
            hook.remove()
        found.append(read)
    got, right = found
    if not close(got["Attention"], right["Attention"]):
        return "attention does not read norm1 of the input of the block"
    if not close(got["MLP"], right["MLP"]):
        return (
            "attention reads the right tokens, but the MLP does not: it must read norm2 of the sum "
            "of the first half"
        )
    return "attention and MLP read the right tokens: look at what is added and returned after them"


def _model_stage(evidence: Evidence) -> str | None:
    """Which method of the model is the first one whose result is wrong."""
    trial, reference = evidence.trial(TWO), evidence.reference(TWO)
    with torch.no_grad():
        tokens = reference._pos_embed(reference.patch_embed(trial.inputs))
        got = trial.module.embed(trial.inputs.clone())
        if got.shape != tokens.shape:
            return f"`embed` returns the shape {tuple(got.shape)}, not {tuple(tokens.shape)}"
        if not close(got, tokens):
            right = [i for i in range(got.shape[1]) if close(got[:, i], tokens[:, i])]
            some = f"correct for token {_numbers(right)} and " if right else ""
            others = "wrong for the others" if right else "wrong"
            return f"the tokens that `embed` returns are {some}{others}"
        features = reference.forward_features(trial.inputs)
        if not close(trial.module.forward_features(trial.inputs.clone()), features):
            return "`embed` is correct, but the tokens that `forward_features` returns are wrong"
    return "`forward_features` is correct: the mistake is in `forward_head` or in `forward`"


def _numbers(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + ", ..." * (len(indices) > 8) + " (counted from 0)"


def _largest_difference(evidence: Evidence) -> str | None:
    got, right = _outputs(evidence)
    place = torch.unravel_index((got - right).abs().argmax(), got.shape)
    where = ", ".join(str(int(i)) for i in place)
    numbers = f"{got[place]:.4f}, where {right[place]:.4f} is correct"
    return f"the largest difference is at [{where}]: {numbers}"


_SHAPE_STATEMENTS = ((_shape,), (_parameters,))  # the others compare values
_STATEMENTS = (  # with the parts for which they make sense, if not for all
    (_parameters,), (_returns_input,), (_factor,), (_offset,), (_reordered,), (_correct_part,),
    (_weight_sums, "Attention"), (_scale, "Attention"), (_never_negative,), (_mixes_images,),
    (_mixes_tokens, "MLP"), (_activation, "MLP"), (_read_pixels, "PatchEmbed"),
    (_depends_on_order, "Attention", "Block"), (_attention_stage, "Attention"),
    (_block_stage, "Block"), (_model_stage, "VisionTransformer"), (_largest_difference,),
)  # fmt: skip
