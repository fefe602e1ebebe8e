"""The checks of the functions in exercise/steps.py.

Each function runs in a small scenario that records what it did: a trace. It is compared with the
trace of the correct program, and if it differs, with those of the wrong programs in
step_mistakes.py.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.exercise.parts import Part
from lab.exercise.reference import reference_class
from lab.exercise.step_mistakes import PROGRAMS, STEP_MISTAKES, StepMistake, program
from lab.exercise.submission import Failure, Submission
from lab.exercise.trials import BASE, close

Trace = dict[str, Any]
_MODE = "train mode"  # an entry of traces
_NO_MODE = ("no train mode", "no eval mode")  # names of mistakes
_TOGETHER = 3  # mistakes that are looked for at most


class _RecordingModel(nn.Module):
    """A linear model that behaves differently in train mode, and records how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        nn.init.normal_(self.head.weight, 0, 0.5)
        self.modes: list[bool] = []
        self.grad_enabled: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.grad_enabled.append(torch.is_grad_enabled())
        return self.head(x.flatten(1)) * (1.0 if self.training else -1.0)


class _PlainSGD:
    """Gradient descent with the interface of an optimizer, which loads much faster than torch's."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.param_groups = [{"params": self.parameters, "lr": 0.1}]
        self.steps = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def _trace_training_step(function: Callable, seed: int) -> Trace:
    """Two steps on two batches, starting in eval mode, as after a validation."""
    torch.manual_seed(seed)
    model = _RecordingModel().eval()
    optimizer, losses, weights = _PlainSGD(model), [], [model.head.weight.detach().clone()]
    for _ in range(2):
        images, labels = torch.randn(4, 3, 2, 2), torch.randint(5, (4,))
        losses.append(function(model, optimizer, images, labels))
        weights.append(model.head.weight.detach().clone())
    unchanged = torch.equal(weights[0], weights[2])
    return {
        "loss": torch.tensor(_number(losses[0])),
        "second loss": torch.tensor(_number(losses[1])),
        "has graph": any(isinstance(loss, Tensor) and loss.requires_grad for loss in losses),
        "weights": torch.stack(weights[1:]),
        _MODE: all(model.modes) and bool(model.modes),
        # These two tell apart the ways in which nothing is learned.
        "steps": optimizer.steps,
        "gradient left": model.head.weight.grad is not None if unchanged else None,
    }


def _number(returned: Any) -> float:
    """What a function returned, as a number. Raises Failure."""
    value = returned.detach() if isinstance(returned, Tensor) else returned
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise Failure(f"the function must return a number, not {kind}") from error


def _trace_evaluate(function: Callable, seed: int) -> Trace:
    """Three batches, the last one smaller, in a scenario with different results for each error."""
    torch.manual_seed(seed)
    model, used = _RecordingModel().train(), []
    batches = _batches(model)

    def train_transform(images: Tensor) -> Tensor:
        used.append("train_transform")
        return images.flip(1) * 3

    def eval_transform(images: Tensor) -> Tensor:
        used.append("eval_transform")
        return images - 0.5

    accuracy = function(model, batches, train_transform, eval_transform)
    return {
        "accuracy": torch.tensor(_number(accuracy)),
        "transforms": sorted(set(used)),
        "raw images": len(used) < len(model.modes),
        _MODE: any(model.modes),
        "gradients": any(model.grad_enabled),
    }


def _batches(model: _RecordingModel) -> list[tuple[Tensor, Tensor]]:
    """In eval mode 12 of 16, 5 of 16 and 6 of 9 images are predicted correctly: 23 of 41.

    The largest logit of a batch belongs to its first image: an argmax over the whole batch is then
    a class, so that it finds some images correct, unlike a prediction that is wrong everywhere.
    """
    batches = []
    for size, correct in ((16, 12), (16, 5), (9, 6)):
        images = torch.randn(size, 3, 2, 2)
        logits = -(F.linear((images - 0.5).flatten(1), model.head.weight, model.head.bias))
        order = logits.amax(1).argsort(descending=True)
        images, logits = images[order], logits[order]
        wrong = logits.argsort(1)[:, -2]
        labels = torch.where(torch.arange(size) < correct, logits.argmax(1), wrong)
        batches.append((images, labels.detach()))
    return batches


# The fields of a ViTConfig, without the student's file.
CONFIG = SimpleNamespace(
    **BASE, qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0, init_values=None, global_pool="token",
    class_token=True, no_embed_class=False, norm_eps=1e-6,
)  # fmt: skip


def _trace_replace_head(function: Callable, seed: int) -> Trace:
    """A new head with 7 outputs on a ViT that had 5."""

    class VisionTransformer(reference_class("VisionTransformer")):
        reset_classifier = get_classifier = property()  # model.py has no such methods

    torch.manual_seed(seed)
    model = VisionTransformer(CONFIG)
    for name in ("embed_dim", "num_features", "head_hidden_size"):  # nor such attributes
        vars(model).pop(name, None)
    model.init_weights()  # the reference leaves its parameters uninitialized
    old, before = model.head, {k: v.clone() for k, v in model.state_dict().items()}
    returned = function(model, 7)
    model = returned if isinstance(returned, nn.Module) else model
    kept = all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.startswith("head")
    )
    try:
        output = f"an output of shape {tuple(model(torch.randn(2, 3, 12, 12)).shape)}"
    except Exception as error:
        output = f"{type(error).__name__}: {error}".splitlines()[0]
    return {
        "head": "the old layer" if model.head is old else f"a new {type(model.head).__name__}",
        "output": output,
        "head trainable": sorted({p.requires_grad for p in model.head.parameters()}),
        "trainable": [
            n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")
        ],
        "kept": kept,
    }


_TRACES: dict[str, Callable[[Callable, int], Trace]] = {
    "training_step": _trace_training_step,
    "evaluate": _trace_evaluate,
    "replace_head": _trace_replace_head,
}
# Which entries of the trace a check looks at, and what to say about each that is wrong.
_CHECKED = {
    "loss": {
        "loss": "it returns the loss {got}, where {right} is correct",
        "second loss": "the first loss is correct, but that of the second batch is {got} instead "
        "of {right}: the update between them is wrong",
        "has graph": "it returns the loss as a tensor with its graph instead of a number",
    },
    "update": {"weights": "the weights after two updates are not correct"},
    "train mode": {_MODE: "the model is not in train mode"},
    "accuracy": {
        "accuracy": "it returns {got}, where {right} is correct",
        "transforms": "it uses {got} instead of {right}",
        "raw images": "the model also gets images that were not transformed",
    },
    "eval mode": {_MODE: "the model is in train mode"},
    "no gradients": {"gradients": "gradients are recorded"},
    "new head": {
        "head": "model.head is {got}, where {right} is correct",
        "output": "with the new head, two images and seven classes give {got}, where {right} is "
        "correct",
    },
    "frozen layers": {
        "head trainable": "not all parameters of the new head are trainable",
        "trainable": "these parameters stay trainable: {got}",
        "kept": "pretrained weights are changed",
    },
}


def _same(one: Any, other: Any) -> bool:
    return close(one, other) if isinstance(one, Tensor) else one == other


def _same_trace(one: Trace, other: Trace) -> bool:
    return all(_same(value, other[key]) for key, value in one.items())


def check_step(submission: Submission, part: Part, check: str, seed: int) -> None:
    """Raises Failure if the student's function fails a check.

    Only the check of the mode fails if model.train() or model.eval() is missing; the others then
    compare with the program in which it is missing, too.
    """
    trace, right = _trace_of(submission, part, seed), _TRACES[part.name](program(part.name), seed)
    accepted = right
    if trace.get(_MODE) != right.get(_MODE) and _MODE not in _CHECKED[check]:
        missing = (mistake for mistake in STEP_MISTAKES[part.name] if mistake.name in _NO_MODE)
        accepted = _TRACES[part.name](program(part.name, tuple(missing)), seed)
    for key, sentence in _CHECKED[check].items():
        if not _same(trace[key], accepted[key]):
            says = sentence.format(got=_shown(trace[key]), right=_shown(right[key]))
            raise submission.failure(part, says)


def find_step_mistakes(
    submission: Submission, part: Part, seed: int
) -> tuple[StepMistake, ...] | None:
    """Mistakes that lead to the student's trace, as few as possible. Raises Failure."""
    trace = _trace_of(submission, part, seed)
    for count in range(1, _TOGETHER + 1):
        for mistakes in itertools.combinations(STEP_MISTAKES[part.name], count):
            function = program(part.name, mistakes)
            if function and _same_trace(trace, _TRACES[part.name](function, seed)):
                return mistakes
    return None


def _trace_of(submission: Submission, part: Part, seed: int) -> Trace:
    """What the student's function does in the scenario. Raises Failure."""
    function = submission.find(part, *PROGRAMS[part.name][0].split())
    try:
        return _TRACES[part.name](function, seed)
    except (Exception, SystemExit) as error:
        raise submission.explain(error, part) from error


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim == 0:
        return f"{value:.3f}"
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)
