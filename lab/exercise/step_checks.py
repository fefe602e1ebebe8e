"""The checks of the functions in exercise/steps.py.

Each function runs in a small scenario that records what it did: a trace. It is compared with the
expected trace, and if it differs, with the traces of the wrong functions in step_mistakes.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.exercise.diagnosis import Diagnosis
from lab.exercise.parts import Part
from lab.exercise.reference import reference_class
from lab.exercise.step_mistakes import STEP_MISTAKES
from lab.exercise.submission import Failure, Submission, where
from lab.exercise.trials import BASE, close

Trace = dict[str, Any]


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
        "loss": torch.tensor([_number(loss) for loss in losses]),
        "has graph": any(isinstance(loss, Tensor) and loss.requires_grad for loss in losses),
        "weights": torch.stack(weights[1:]),
        "modes": all(model.modes) and bool(model.modes),
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


def _expected_training_step(seed: int) -> Trace:
    """The same two updates, from the gradient of a formula."""
    torch.manual_seed(seed)
    head, losses, weights = _RecordingModel().head, [], []
    weight, bias = head.weight.detach(), head.bias.detach()
    for _ in range(2):
        images, labels = torch.randn(4, 3, 2, 2), torch.randint(5, (4,))
        x, target = images.flatten(1), F.one_hot(labels, 5)
        scores = x @ weight.T + bias
        difference = (scores.softmax(1) - target) / len(x)  # d loss / d scores
        losses.append((scores.logsumexp(1) - scores[range(4), labels]).mean())
        weight, bias = weight - 0.1 * difference.T @ x, bias - 0.1 * difference.sum(0)
        weights.append(weight)
    return {
        "loss": torch.stack(losses), "has graph": False, "weights": torch.stack(weights),
        "modes": True, "steps": 2, "gradient left": None,
    }  # fmt: skip


def _trace_evaluate(function: Callable, seed: int) -> Trace:
    """Three batches, the last one smaller, in a scenario with different results for each error."""
    torch.manual_seed(seed)
    model, used = _RecordingModel().train(), []
    batches = _batches(model)

    def train_transform(images: Tensor) -> Tensor:
        used.append("train")
        return images.flip(1) * 3

    def eval_transform(images: Tensor) -> Tensor:
        used.append("eval")
        return images - 0.5

    accuracy = function(model, batches, train_transform, eval_transform)
    return {
        "accuracy": torch.tensor(_number(accuracy)),
        "transforms": sorted(set(used)),
        "modes": sorted(set(model.modes)),
        "grad enabled": sorted(set(model.grad_enabled)),
        "raw images": len(used) < len(model.modes),
    }


def _batches(model: _RecordingModel) -> list[tuple[Tensor, Tensor]]:
    """In eval mode 3 of 4, 1 of 4 and 2 of 2 images are predicted correctly: 6 of 10."""
    batches = []
    for size, correct in ((4, 3), (4, 1), (2, 2)):
        images = torch.randn(size, 3, 2, 2)
        logits = -(F.linear((images - 0.5).flatten(1), model.head.weight, model.head.bias))
        wrong = logits.argsort(1)[:, -2]
        labels = torch.where(torch.arange(size) < correct, logits.argmax(1), wrong)
        batches.append((images, labels.detach()))
    return batches


def _expected_evaluate(seed: int) -> Trace:
    return {
        "accuracy": torch.tensor(0.6), "transforms": ["eval"], "modes": [False],
        "grad enabled": [False], "raw images": False,
    }  # fmt: skip


def _trace_replace_head(function: Callable, seed: int) -> Trace:
    """A new head with 7 outputs on a ViT that had 5."""
    torch.manual_seed(seed)
    model = reference_class("VisionTransformer")(_Config())
    model.init_weights()  # the reference leaves its parameters uninitialized
    old, before = model.head, {k: v.clone() for k, v in model.state_dict().items()}
    returned = function(model, 7)
    model = returned if isinstance(returned, nn.Module) else model
    kept = all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.startswith("head")
    )
    try:
        shape = list(model(torch.randn(2, 3, 12, 12)).shape)
    except Exception as error:
        shape = [f"{type(error).__name__}: {error}".splitlines()[0]]
    return {
        "new": model.head is not old,
        "shape": shape,
        "head trainable": sorted({p.requires_grad for p in model.head.parameters()}),
        "trainable backbone": [
            n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")
        ],
        "kept": kept,
    }


class _Config:
    """The fields of a ViTConfig, without the student's file."""

    def __init__(self) -> None:
        defaults = {
            "qkv_bias": True, "drop_rate": 0.0, "attn_drop_rate": 0.0, "init_values": None,
            "global_pool": "token", "class_token": True, "no_embed_class": False, "norm_eps": 1e-6,
        }  # fmt: skip
        vars(self).update(BASE | defaults)


def _expected_replace_head(seed: int) -> Trace:
    return {
        "new": True, "shape": [2, 7], "head trainable": [True], "trainable backbone": [],
        "kept": True,
    }  # fmt: skip


TRACES: dict[str, tuple[Callable[..., Trace], Callable[[int], Trace]]] = {
    "training_step": (_trace_training_step, _expected_training_step),
    "evaluate": (_trace_evaluate, _expected_evaluate),
    "replace_head": (_trace_replace_head, _expected_replace_head),
}
CHECKED = {  # which entries of the trace a check looks at
    "loss": ("loss", "has graph"),
    "update": ("weights",),
    "train mode": ("modes",),
    "accuracy": ("accuracy", "transforms", "raw images"),
    "eval mode": ("modes",),
    "no gradients": ("grad enabled",),
    "new head": ("new", "shape"),
    "frozen layers": ("head trainable", "trainable backbone", "kept"),
}


def _same_trace(one: Trace, other: Trace, keys: tuple[str, ...] | None = None) -> bool:
    """Whether two traces agree, in all entries or in some."""
    for key in keys or one:
        a, b = one[key], other[key]
        if not (close(a, b) if isinstance(a, Tensor) else a == b):
            return False
    return True


def check_step(submission: Submission, part: Part, check: str, seed: int) -> None:
    """Raises Failure if the student's function fails a check."""
    trace, expected = _trace_of(submission, part, seed), TRACES[part.name][1](seed)
    if not _same_trace(trace, expected, CHECKED[check]):
        raise _failed_entry(submission, part, trace, expected)


def diagnose_step(submission: Submission, part: Part, failure: Failure, seed: int) -> Diagnosis:
    """Names the mistake whose trace is the student's, else says what differs."""
    if failure.cause or failure.unwritten:
        return Diagnosis(str(failure))
    trace, run = _trace_of(submission, part, seed), TRACES[part.name][0]
    known = [m for m in STEP_MISTAKES[part.name] if _same_trace(trace, run(m.function, seed))]
    if not known:
        return Diagnosis(str(failure))
    place = where(submission.module_of(part), failure.line)
    names = [mistake.name for mistake in known]
    return Diagnosis(f"{place}: {known[0].says}", known[0].because, names)


def _trace_of(submission: Submission, part: Part, seed: int) -> Trace:
    """What the student's function does in the scenario. Raises Failure."""
    function = submission.find(part)
    arguments = {"training_step": 4, "evaluate": 4, "replace_head": 2}[part.name]
    submission.check_call(part, function, *range(arguments))
    try:
        return TRACES[part.name][0](function, seed)
    except (Exception, SystemExit) as error:
        failure = submission.explain(error)
        if failure.line is None:  # such as a function that returns nothing
            line = submission.line_of(part.name)
            place = where(submission.module_of(part), line)
            failure = Failure(f"{place}: {failure}", line, failure.cause, failure.unwritten)
        raise failure from error


def _failed_entry(submission: Submission, part: Part, trace: Trace, expected: Trace) -> Failure:
    """The first difference from the expected trace, in words."""
    line = submission.line_of(part.name)
    for key, value in trace.items():
        if not _same_trace({key: value}, expected):
            got, right = _shown(value), _shown(expected[key])
            text = f"{key}: {got}, where {right} is correct"
            return Failure(f"{where(submission.module_of(part), line)}: {text}", line)
    raise AssertionError("the traces agree")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() <= 2:
        return ", ".join(f"{v:.3f}" for v in value.flatten().tolist())
    return "other values" if isinstance(value, Tensor) else str(value)
