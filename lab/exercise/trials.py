"""Runs a part in several situations and compares it with a reference that has the same weights.

All numbers are float64, so that two ways of writing the same thing agree to ten digits and even a
small mistake, such as the tanh approximation of GELU, stands out.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lab.exercise.layouts import Layout, Slot, flat, layouts, slots
from lab.exercise.parts import PARTS, Part
from lab.exercise.reference import fill_in, reference_class
from lab.exercise.submission import Failure, NaNFinder, Submission, where

BASE = {
    "img_size": 12, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dim": 24, "depth": 2,
    "num_heads": 3, "mlp_ratio": 2.0,
}  # fmt: skip
OTHER = {
    "img_size": 20, "patch_size": 5, "in_chans": 1, "num_classes": 7, "embed_dim": 32, "depth": 3,
    "num_heads": 2, "mlp_ratio": 3.0,
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
SMALL = Case("small values", scale=1e-3)
DROP = Case("eval mode with dropout", BASE | {"attn_drop_rate": 0.5, "drop_rate": 0.5})
CASES = (TWO, THREE, ONE, SMALL, DROP)


class Trial:
    """A student's class, built for one case with random parameters, and what it returned."""

    def __init__(self, submission: Submission, part: Part, case: Case, seed: int):
        self.submission, self.part, self.case, self.seed = submission, part, case, seed
        torch.manual_seed(seed)
        self.config = submission.config(case.options)
        self.inputs = case.scale * random_inputs(part, self.config, case.batch)
        self.module = self.build()
        self.slots = slots(self.module)
        randomize(self.slots, case.scale)
        self._layouts: dict[object, list[Layout]] = {}

    def build(self) -> nn.Module:
        """The student's module in eval mode. Raises Failure."""
        submission, part = self.submission, self.part
        cls = submission.find(part)
        arguments = (self.config, 0.0) if part.name == "Block" else (self.config,)
        submission.check_call(part, cls, *arguments)
        fill_in(submission.model, part.name)
        try:
            module = cls(*arguments)
            return module.eval()
        except Exception as error:
            raise submission.explain(error) from error

    def run(self, inputs: Tensor | None = None, **keywords: Any) -> Any:
        """What the student's module returns; the random numbers of dropout are always the same."""
        torch.manual_seed(self.seed)
        try:
            return self.module(self.inputs if inputs is None else inputs, **keywords)
        except Exception as error:
            raise self.submission.explain(error) from error

    def output(self) -> Tensor:
        """The output as a finite tensor. Raises Failure."""
        finder = NaNFinder(self.submission.files)
        with finder:
            out = self.run()
        module = self.submission.module_of(self.part)
        line = self.submission.line_of(self.part.name, "forward")
        if not isinstance(out, Tensor):
            kind = "nothing (is a return missing?)" if out is None else f"a {type(out).__name__}"
            raise Failure(
                f"{where(module, line)}: {self.part.name} returns {kind}, not a tensor", line
            )
        if not out.isfinite().all():
            line = finder.line or line
            what = "NaN (not a number)" if out.isnan().any() else "infinite values"
            raise Failure(f"{where(module, line)}: the output contains {what}; it starts here",
                          line)  # fmt: skip
        return out

    def reference(self, mistakes: tuple = ()) -> nn.Module:
        torch.manual_seed(self.seed)
        return reference_class(self.part.name, mistakes)(self.config).eval()

    def layouts(self, reference: nn.Module) -> list[Layout]:
        """How the student's parameters can be the reference's; empty if they cannot."""
        wanted = slots(reference)
        key = tuple((slot.name, slot.kind, slot.tensor.shape) for slot in wanted)
        if key not in self._layouts:
            self._layouts[key] = list(layouts(self.slots, wanted))
        return self._layouts[key]

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
        with torch.no_grad():
            start = 0
            for slot in self.slots:
                count = slot.tensor.numel()
                slot.tensor.copy_(values[start : start + count].reshape(slot.tensor.shape))
                start += count


@dataclass
class Outcome:
    """What a module did with a trial's inputs; `gradients` are flat, zero where there is none."""

    output: Tensor | None
    gradients: Tensor | None = None
    without_gradient: tuple[str, ...] = ()


def outcome(module: nn.Module, trial: Trial, members: list[Slot], gradients: bool) -> Outcome:
    """Runs a module on a trial's inputs; an exception is an outcome too."""
    torch.manual_seed(trial.seed)
    inputs = trial.inputs.clone().requires_grad_(gradients)
    try:
        with torch.set_grad_enabled(gradients):
            out = module(inputs * 1.0 if gradients else inputs)
        if not gradients:
            return Outcome(out)
        torch.manual_seed(trial.seed + 1)
        tensors = [inputs, *(slot.tensor for slot in members)]
        learned = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad((out * torch.randn_like(out)).sum(), learned,
                                         allow_unused=True))  # fmt: skip
        grads = [next(found) if t.requires_grad else None for t in tensors]
        names = ["the input", *(slot.name for slot in members)]
        missing = tuple(n for n, g in zip(names, grads, strict=True) if g is None)
        zeros = [torch.zeros_like(t) if g is None else g
                 for t, g in zip(tensors, grads, strict=True)]  # fmt: skip
        return Outcome(out, flat(zeros), missing)
    except Exception:
        return Outcome(None)


def close(a: object, b: object) -> bool:
    """Whether two outputs are the same up to rounding; two failures (None) are the same too."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is None and b is None
    if a.shape != b.shape:
        return False
    largest = b.abs().max() if b.numel() else torch.tensor(0.0)
    return bool((a - b).abs().max() <= TOLERANCE * largest)


def random_inputs(part: Part, config: Any, batch: int) -> Tensor:
    """Images (B, C, H, W) or tokens (B, N, D), whatever the part takes."""
    if part.name in ("PatchEmbed", "VisionTransformer"):
        return torch.randn(batch, config.in_chans, config.img_size, config.img_size)
    tokens = (config.img_size // config.patch_size) ** 2 + 1
    return torch.randn(batch, tokens, config.embed_dim)


def randomize(members: list[Slot], scale: float) -> None:
    """Values far from any special one (zeros, ones) for all registered parameters."""
    with torch.no_grad():
        for slot in members:
            if slot.kind == "LayerNorm.weight":
                slot.tensor.normal_(1, 0.3)
            elif slot.registered:
                fan_in = slot.tensor[0].numel() if slot.kind.endswith("weight") else 2
                slot.tensor.normal_(0, scale * (1.5 if fan_in > 2 else 1) / fan_in**0.5)
