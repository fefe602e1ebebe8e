"""Runs a part in several situations and compares it with a reference that has the same weights.

Only the CPU's generator is seeded, because torch.manual_seed also seeds GPUs, which is slow.
All numbers are float64, so that two ways of writing the same thing agree to ten digits and even a
small mistake, such as the tanh approximation of GELU, stands out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lab.exercise.layouts import Layout, Slot, flat, layouts, slots
from lab.exercise.parts import Part
from lab.exercise.reference import NEEDS, Mistake, reference_class
from lab.exercise.submission import Failure, NaNFinder, Submission

# Unusual sizes: a number such as 768 in an error message then comes from the student's file.
BASE = {
    "img_size": 12, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dim": 24, "depth": 2,
    "num_heads": 3, "mlp_ratio": 2.0,
}  # fmt: skip
OTHER = {
    "img_size": 25, "patch_size": 5, "in_chans": 1, "num_classes": 7, "embed_dim": 28, "depth": 3,
    "num_heads": 2, "mlp_ratio": 2.5,
}  # fmt: skip
TOLERANCE = 1e-5  # of the largest value; float32 inside a submission costs about 1e-6


@dataclass(frozen=True)
class Case:
    """A situation in which a part is run."""

    name: str
    options: dict[str, Any] = field(default_factory=lambda: BASE)
    batch: int = 2
    scale: float = 1.0  # of weights and inputs; small values show the eps of a norm


TWO, THREE = Case("two images"), Case("three images of another size", OTHER, 3)
ONE = Case("one image", batch=1)
_DROPOUT = Case("eval mode with dropout", BASE | {"attn_drop_rate": 0.5, "drop_rate": 0.5})
_CASES = (TWO, THREE, ONE, Case("small values", scale=1e-3), _DROPOUT)


class Trial:
    """A student's class, built for one case with random parameters.

    Attributes:
        module: in eval mode; None if it could not be built, and `failure` says why.
        inputs: what the module gets in this case.
        slots: the module's parameters.
    """

    def __init__(self, evidence: "Evidence", case: Case):
        self.submission, self.part, self.seed = evidence.submission, evidence.part, evidence.seed
        self.failure: Failure | None = None
        self.module: nn.Module | None = None
        self.slots: list[Slot] = []
        torch.default_generator.manual_seed(self.seed)
        self.config = self.submission.config(case.options)
        self.inputs = case.scale * _random_inputs(self.part, self.config, case.batch)
        try:
            self.module = evidence.build(self.config)
            self.slots = slots(self.module)
            _randomize(self.slots, case.scale)
        except Failure as failure:
            self.failure = failure
        self._layouts: dict[object, list[Layout]] = {}
        self._mutants: list[tuple[nn.Module, Layout]] | None = None  # see mutants

    def run(self, inputs: Tensor | None = None, **keywords: Any) -> Any:
        """What the student's module returns; the random numbers of dropout are always the same.

        Raises Failure.
        """
        if self.failure:
            raise self.failure
        torch.default_generator.manual_seed(self.seed)
        try:
            return self.module(self.inputs.clone() if inputs is None else inputs, **keywords)
        except (Exception, SystemExit) as error:
            raise self.submission.explain(error, self.part) from error

    def output(self) -> Tensor:
        """The output as a finite tensor. Raises Failure."""
        finder = NaNFinder(self.submission.files)
        with finder:
            out = self.run()
        if not isinstance(out, Tensor):
            missing = "nothing (is a return missing?)"
            kind = missing if out is None else f"a value of type {type(out).__name__}"
            says = f"{self.part.name} returns {kind}, not a tensor"
            raise self.submission.failure(self.part, says)
        if not out.isfinite().all():
            what = "NaN (not a number)" if out.isnan().any() else "infinite values"
            says = f"the output contains {what}; it starts here"
            raise self.submission.failure(self.part, says, line=finder.line)
        return out

    def reference(self, mistakes: tuple[Mistake, ...] = ()) -> nn.Module:
        """timm's module for this case, with mistakes, in eval mode."""
        torch.default_generator.manual_seed(self.seed)
        return reference_class(self.part.name, mistakes)(self.config).eval()

    def layouts(self, reference: nn.Module) -> list[Layout]:
        """How the student's parameters can be the reference's; empty if they cannot."""
        wanted = slots(reference)
        key = tuple((slot.name, slot.kind, slot.tensor.shape) for slot in wanted)
        if key not in self._layouts:
            self._layouts[key] = list(layouts(self.slots, wanted))
        return self._layouts[key]

    def mutants(self, mistakes: tuple[Mistake, ...]) -> Iterator[tuple[nn.Module, Layout]]:
        """timm's module with mistakes and the student's parameters, for each possible layout.

        A mutant is valid until the next one is asked for. Raises what the reference raises.
        """
        if any(mistake.change for mistake in mistakes):
            reference = self.reference(mistakes)
            for layout in self.layouts(reference):
                yield self.load(reference, layout), layout
            return
        # These mistakes only replace methods, so the correct module takes another class. To build
        # a new module for each of hundreds of pairs would take most of the time of a check.
        mistaken = reference_class(self.part.name, mistakes)
        if self._mutants is None:
            found = self.layouts(self.reference())
            self._mutants = [(self.load(self.reference(), layout), layout) for layout in found]
        for mutant, layout in self._mutants:
            mutant.__class__ = mistaken
            yield mutant, layout

    def load(self, reference: nn.Module, layout: Layout) -> nn.Module:
        """Copies the student's parameters into the reference."""
        values = flat([slot.tensor for slot in self.slots])
        with torch.no_grad():
            for slot in slots(reference):
                slot.tensor.copy_(values[layout[slot.name]])
        return reference

    def load_back(self, layout: Layout, reference: nn.Module) -> None:
        """Copies the reference's parameters into the student's module."""
        values = flat([slot.tensor for slot in self.slots])
        for slot in slots(reference):
            values[layout[slot.name].reshape(-1)] = slot.tensor.detach().reshape(-1)
        parts = values.split([slot.tensor.numel() for slot in self.slots])
        with torch.no_grad():
            for slot, part in zip(self.slots, parts, strict=True):
                slot.tensor.copy_(part.reshape(slot.tensor.shape))


@dataclass
class Outcome:
    """What a module did with a trial's inputs."""

    output: Any = None  # None where it failed
    error: Exception | None = None
    gradients: list[Tensor | None] = field(default_factory=list)  # of the input, then of each slot


def _outcome(
    module: nn.Module | None, members: list[Slot], trial: Trial, gradients: bool = False
) -> Outcome:
    """Runs a module on a trial's inputs; an exception is an outcome too.

    members: the module's slots, found before it ran: forward may keep tensors in attributes.
    """
    if module is None:
        return Outcome(error=trial.failure)
    torch.default_generator.manual_seed(trial.seed)
    inputs = trial.inputs.clone().requires_grad_(gradients)
    try:
        with torch.set_grad_enabled(gradients):
            out = module(inputs * 1.0)  # not a leaf, so a change in place does not fail by itself
        if not gradients:
            return Outcome(out)
        torch.default_generator.manual_seed(trial.seed + 1)
        tensors = [inputs, *(slot.tensor for slot in members)]
        learned = [t for t in tensors if t.requires_grad]
        loss = (out * torch.randn(out.shape)).sum()  # randn_like would follow the strides of out
        found = iter(torch.autograd.grad(loss, learned, allow_unused=True))
        return Outcome(out, None, [next(found) if t.requires_grad else None for t in tensors])
    except (Exception, SystemExit) as error:
        return Outcome(error=error)


class Evidence:
    """What a part does in all cases, computed when it is asked for.

    fill_in: other parts that this one builds on are the reference's instead of the student's.
    """

    def __init__(self, submission: Submission, part: Part, seed: int, fill_in: bool = True):
        self.submission, self.part, self.seed, self.fill_in = submission, part, seed, fill_in
        self._trials: dict[str, Trial] = {}
        self._outcomes: dict[tuple[str, bool], Outcome] = {}

    def trial(self, case: Case) -> Trial:
        """The trial of a case, built once. Code that changes its module builds another Trial."""
        if case.name not in self._trials:
            self._trials[case.name] = Trial(self, case)
        return self._trials[case.name]

    def build(self, config: Any, *more: Any) -> nn.Module:
        """The student's module in eval mode, with the student's initial values. Raises Failure."""
        part, model = self.part, self.submission.model
        cls = self.submission.find(part, config, *more)
        for name in NEEDS.get(part.name, ()):
            own = self.submission.own[name]
            setattr(model, name, reference_class(name) if self.fill_in else own)
        try:
            module = cls(config, *more)
        except (Exception, SystemExit) as error:
            raise self.submission.explain(error) from error
        if not isinstance(module, nn.Module):
            raise self.submission.failure(part, f"write `class {part.name}(nn.Module)`", None)
        return module.eval()

    def outcome(self, case: Case, gradients: bool = False) -> Outcome:
        key = (case.name, gradients)
        if key not in self._outcomes:
            trial = self.trial(case)
            self._outcomes[key] = _outcome(trial.module, trial.slots, trial, gradients)
        return self._outcomes[key]

    def agrees(self, mistakes: tuple[Mistake, ...] = (), cases: tuple[Case, ...] = _CASES,
               gradients: bool = False) -> bool:  # fmt: skip
        """Whether the part does what the reference with these mistakes does, in all cases.

        gradients: compare the gradients of the first case too.
        Raises: DoesNotApply for mistakes that cannot be made together.
        """
        reference_class(self.part.name, mistakes)  # or DoesNotApply
        worked = False
        for case in cases:
            trial, with_gradients = self.trial(case), gradients and case is cases[0]
            own = self.outcome(case, with_gradients)
            try:
                mutants = trial.mutants(mistakes)
                if not any(_same(own, trial, *mutant, with_gradients) for mutant in mutants):
                    return False
            except Exception:  # the reference with these mistakes cannot be built
                if own.error is None:
                    return False
            worked = worked or own.error is None
        return worked

    def layout(self, case: Case) -> Layout | None:
        """The layout with which the part agrees with the reference, else the most likely one."""
        trial = self.trial(case)
        reference = trial.reference()
        found = trial.layouts(reference)
        own = self.outcome(case)
        right = (x for x in found if _same(own, trial, trial.load(reference, x), x, False))
        return next(right, found[0] if found else None)

    def reference(self, case: Case) -> nn.Module:
        """timm's module with the student's parameters. Raises if they cannot be its parameters."""
        trial = self.trial(case)
        return trial.load(trial.reference(), self.layout(case))


def _same(own: Outcome, trial: Trial, mutant: nn.Module, layout: Layout, gradients: bool) -> bool:
    """Whether a mutant with the student's parameters does what the student's module did."""
    members = slots(mutant) if gradients else []
    theirs = _outcome(mutant, members, trial, gradients)
    if not close(own.output, theirs.output):
        return False
    if not gradients or own.error:
        return True
    student = zip(own.gradients[1:], trial.slots, strict=True)
    values = flat([_zeros(gradient, slot.tensor) for gradient, slot in student])
    return close(
        _zeros(own.gradients[0], trial.inputs), _zeros(theirs.gradients[0], trial.inputs)
    ) and all(
        close(values[layout[slot.name]], _zeros(gradient, slot.tensor))
        for slot, gradient in zip(members, theirs.gradients[1:], strict=True)
    )


def _zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient, or zeros where there is none."""
    return torch.zeros_like(like) if gradient is None else gradient


def close(a: object, b: object) -> bool:
    """Whether two outputs are the same up to rounding; two failures (None) are the same too."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is None and b is None
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max() + 1e-12)


def _random_inputs(part: Part, config: Any, batch: int) -> Tensor:
    """Images (B, C, H, W) or tokens (B, N, D), whatever the part takes."""
    if part.name in ("PatchEmbed", "VisionTransformer"):
        return torch.randn(batch, config.in_chans, config.img_size, config.img_size)
    tokens = (config.img_size // config.patch_size) ** 2 + 1
    return torch.randn(batch, tokens, config.embed_dim)


def _randomize(members: list[Slot], scale: float) -> None:
    """Values far from any special one (zeros, ones) for all registered parameters."""
    with torch.no_grad():
        for slot in members:
            if slot.kind == "LayerNorm.weight":
                slot.tensor.normal_(1, 0.3)
            elif slot.registered:
                fan_in = slot.tensor[0].numel() if slot.kind.endswith("weight") else 2
                slot.tensor.normal_(0, scale * (1.5 if fan_in > 2 else 1) / fan_in**0.5)
