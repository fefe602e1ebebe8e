"""Mistakes that show in other ways than in the values: exceptions, gradients, hidden parameters.

Where several symptoms fit, the first one counts. A test that raises does not fit.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lab.exercise.reference import named
from lab.exercise.trials import BASE, ONE, OTHER, TWO, Case, Evidence, close


@dataclass(frozen=True)
class Symptom:
    """A mistake that is recognized by what the part did, or by the text of its exception."""

    says: str | Callable[[Evidence], str]
    because: str
    test: Callable[[Evidence], bool] | None = None
    pattern: str = ""  # a regular expression for the text of the exception
    code: str = ""  # a regular expression for the student's line that led to it
    only_classes: bool = False  # the pattern means something else in a function of steps.py
    only_training: bool = False  # the values are right, but training or another device fails
    method: str = "forward"  # where to look
    name: str = ""

    def sentence(self, evidence: Evidence) -> str:
        return self.says(evidence) if callable(self.says) else self.says


def finite(output: object) -> bool:
    return isinstance(output, torch.Tensor) and bool(output.isfinite().all())


def _hidden(evidence: Evidence, modules: bool) -> bool:
    """Whether layers (or bare tensors) are kept where PyTorch does not find parameters."""
    used = {int(i) for ids in evidence.layout(TWO).values() for i in ids.reshape(-1)[:1]}
    start = 0
    for slot in evidence.trial(TWO).slots:
        if not slot.registered and start in used and bool(slot.kind) == modules:
            return True
        start += slot.tensor.numel()
    return False


def _random_in_eval(evidence: Evidence) -> bool:
    trial = evidence.trial(TWO)
    if not finite(evidence.outcome(TWO).output):
        return False
    with torch.no_grad():
        torch.manual_seed(1)
        first = trial.module(trial.inputs.clone())
        return not close(trial.module(trial.inputs.clone()), first)


def _makes_layers(evidence: Evidence) -> bool:
    """Whether forward creates modules, which start with new random weights every time."""
    trial, made = evidence.trial(TWO), []
    original = nn.Module.__init__
    nn.Module.__init__ = lambda self, *a, **k: (made.append(type(self)), original(self, *a, **k))[1]
    try:
        trial.module(trial.inputs.clone())
    finally:
        nn.Module.__init__ = original
    return any(issubclass(kind, nn.Linear | nn.Conv2d | nn.LayerNorm) for kind in made)


def _changes_input(evidence: Evidence) -> bool:
    trial = evidence.trial(TWO)
    inputs = trial.inputs.clone()
    with torch.no_grad():
        trial.module(inputs)
    return not torch.equal(inputs, trial.inputs)


def _detached(evidence: Evidence) -> bool:
    out = evidence.outcome(TWO, gradients=True)
    return "does not require grad" in str(out.error) if out.error else out.gradients[0] is None


def _in_place(evidence: Evidence) -> bool:
    return "inplace operation" in str(evidence.outcome(TWO, gradients=True).error)


def _wrong_device(evidence: Evidence) -> bool:
    """Whether a tensor that was created on the default device meets the input's."""
    with _DeviceTracker() as tracker:
        evidence.trial(TWO).run()
    return tracker.mixed


class _DeviceTracker(TorchFunctionMode):
    """Within this context, notices computations that would fail if the input were on a GPU.

    Those are computations on the input and a tensor from a call such as torch.zeros(3), which is
    created on the CPU unless `device` is given. Numbers (tensors without axes) are allowed to mix.
    """

    CREATE = (torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.randn,
              torch.rand, torch.empty, torch.eye, torch.tensor, torch.tril_indices)  # fmt: skip
    MOVE = (torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.__getitem__, torch.Tensor.cpu)

    def __init__(self) -> None:
        super().__init__()
        self.created: list[torch.Tensor] = []  # keeps them alive, so that no id is used twice
        self.mixed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        known = {id(tensor) for tensor in self.created}
        inner = [x for a in args for x in (a if isinstance(a, list | tuple) else [a])]
        given = [x for x in inner if isinstance(x, torch.Tensor) and x.ndim > 0]
        own = [x for x in given if id(x) in known]
        if function in self.CREATE and "device" not in kwargs:
            self.created.append(result)
        elif function in (torch.Tensor.to, torch.Tensor.type_as) and _names_a_device(args, kwargs):
            # On a CPU, the result can be the same tensor.
            self.created = [tensor for tensor in self.created if tensor is not result]
        elif own and function not in self.MOVE:
            if len(own) < len(given):
                self.mixed = True
            elif isinstance(result, torch.Tensor):
                self.created.append(result)
        return result


def _names_a_device(args: tuple, kwargs: dict) -> bool:
    """Whether a call such as x.to(y), x.to("cpu") or x.to(device=y.device) does."""
    devices = (torch.device, torch.Tensor, str)
    return "device" in kwargs or any(isinstance(value, devices) for value in args[1:])


def _batch_sizes(evidence: Evidence) -> tuple[list[str], list[str]]:
    """The numbers of images that work and those that do not, in words."""
    cases = {"one": ONE, "two": TWO, "three": Case("three images", BASE, 3)}
    works = {name: evidence.outcome(case).error is None for name, case in cases.items()}
    return [n for n, ok in works.items() if ok], [n for n, ok in works.items() if not ok]


def _which_batch_sizes(evidence: Evidence) -> str:
    good, bad = _batch_sizes(evidence)
    noun = "image" if good == ["one"] else "images"
    return (
        f"It works for {' and '.join(good)} {noun} but not for {' and '.join(bad)}: the batch size "
        "is hard-coded."
    )


def _one_size(evidence: Evidence) -> bool:
    """Whether the first configuration works and another one does not."""
    other = Case("two images of another size", OTHER, 2)
    return evidence.outcome(TWO).error is None and evidence.outcome(other).error is not None


SYMPTOMS = named({
    "/ instead of //": Symptom(
        "A size is a float, and PyTorch needs an int.",
        "/ always returns a float, even without a remainder, and so does a product with mlp_ratio; "
        "use // or int()",
        pattern=r"TypeError.*(float.*integer|got .*float|must be tuple of ints|type float)",
    ),
    "wrong number of axes unpacked": Symptom(
        "A shape is unpacked into the wrong number of names: images have the axes (B, C, H, W), "
        "and tokens have the axes (B, N, D).",
        "The batch axis is left out, as in code for a single image",
        pattern=r"(too many|not enough) values to unpack",
        code=r"shape|size",
        only_classes=True,
    ),
    "tensor unpacked along the batch": Symptom(
        "A tensor is unpacked along its first axis, the batch.",
        "q, k, v = self.qkv(x) looks as if it split the channels; split them with "
        "chunk(3, dim=-1)",
        pattern=r"(too many|not enough) values to unpack",
        code=r"^(?!.*(shape|size|chunk|split|unbind|zip|enumerate))",
        only_classes=True,
    ),
    "ModuleList called like a layer": Symptom(
        "nn.ModuleList only holds layers and cannot be called: loop over it, or use nn.Sequential.",
        "nn.ModuleList and nn.Sequential look alike, but only nn.Sequential has a forward",
        pattern=r"Module \[ModuleList\] is missing the required",
    ),
    "forward missing": Symptom(
        "This class has no method called forward.",
        "The name is misspelled, or the method is not indented as far as __init__",
        pattern=r"Module \[(?!ModuleList).*is missing the required .forward. function",
    ),
    "super().__init__() missing": Symptom(
        "nn.Module's __init__ must run before layers and parameters are assigned.",
        "The class has its own __init__, which replaces nn.Module's",
        pattern=r"before Module.__init__",
    ),
    "nothing returned": Symptom(
        "forward has no return, so the result is lost.",
        "The last line assigns the result to a variable",
        pattern=r"returns nothing",
    ),
    "view of a transposed tensor": Symptom(
        "view needs contiguous memory; use reshape after a transpose.",
        "view and reshape do the same unless a tensor was transposed",
        pattern=r"view size is not compatible",
    ),
    "loss called like a function": Symptom(
        "nn.CrossEntropyLoss is a class: nn.CrossEntropyLoss()(logits, labels) creates it and "
        "calls it.",
        "F.cross_entropy(logits, labels) looks similar and is a function",
        pattern=r"Boolean value of Tensor with more than one value",
        code=r"(?i)loss",
    ),
    "comparison used as a condition": Symptom(
        "A comparison of tensors gives one value for each image or element, and a condition needs "
        "a single one.",
        "== compares tensors element by element; (predictions == labels).sum() counts the equal "
        "elements",
        pattern=r"Boolean value of Tensor with more than one value",
    ),
    "no_grad without parentheses": Symptom(
        "torch.no_grad is a class: write `with torch.no_grad():`.",
        "The parentheses are missing",
        pattern=r"'type' object does not support the context manager|__enter__",
    ),
    "hard-coded device": Symptom(
        "A tensor is created on one particular device instead of the one of the input.",
        "The code was written on a GPU, or torch.zeros was called without device=x.device",
        _wrong_device,
        pattern=r"CUDA|cuda|NVIDIA|same device",
        only_training=True,
    ),
    "hard-coded dtype": Symptom(
        "A part of the code uses float32, whatever the dtype of the input is.",
        "dtype=torch.float32 or .float() is hard-coded; x.dtype also works for half precision",
        pattern=r"same dtype|mixed dtype|scalar type|dtype.*mismatch|(Float|Half|Double).*!=",
    ),
    "hard-coded batch size": Symptom(
        _which_batch_sizes,
        "A reshape contains a number, or the batch axis is left out",
        lambda evidence: all(_batch_sizes(evidence)),
    ),
    "hard-coded size": Symptom(
        "It works for one image size or width only: a value of the configuration is hard-coded.",
        "The numbers of ViT-B/16 (224, 16, 197, 768) are in every tutorial; use the config's",
        _one_size,
        pattern=r"\b(16|32|49|50|64|65|128|192|196|197|224|384|768|2304|3072)\b",
        only_classes=True,
    ),
    "layers created in forward": Symptom(
        "forward creates layers, so their weights are random in every call and never trained.",
        "A layer looks like a function; it must be created once, in __init__",
        _makes_layers,
    ),
    "random in eval mode": Symptom(
        "Two calls with the same input differ in eval mode: something is dropped at random.",
        "F.dropout drops in eval mode too unless it is given training=self.training",
        _random_in_eval,
    ),
    "parameters in a plain list": Symptom(
        "Layers are kept in a Python list or dict, so eval() and the optimizer do not reach them.",
        "nn.ModuleList looks like a list, but it also registers its layers",
        lambda evidence: _hidden(evidence, modules=True),
        method="__init__",
    ),
    "tensor instead of parameter": Symptom(
        "A tensor that must be learned is not an nn.Parameter, so the optimizer never sees it.",
        "torch.zeros and torch.randn create constants",
        lambda evidence: _hidden(evidence, modules=False),
        only_training=True,
        method="__init__",
    ),
    "input changed in place": Symptom(
        "forward changes its input, which the caller still needs.",
        "x += y changes the tensor x itself; x = x + y makes a new one",
        _changes_input,
        only_training=True,
    ),
    "in-place operation on a value that backward needs": Symptom(
        "A tensor is changed in place after it was used, so the gradient cannot be computed.",
        "+=, relu_ or an assignment to a slice saves memory, but autograd needs the old value",
        _in_place,
        pattern="inplace operation",
        only_classes=True,
        only_training=True,
    ),
    "detached graph": Symptom(
        "Autograd sees no connection from the output to the input: the graph is cut.",
        "detach(), .data, numpy() or no_grad() is left in the code",
        _detached,
        pattern="does not have a grad_fn",
        only_training=True,
    ),
})  # fmt: skip


def find_symptoms(evidence: Evidence | None, text: str, code: str) -> list[Symptom]:
    """All symptoms that a part shows.

    Args:
        evidence: None for a function of steps.py; then only text and code count.
        text: the student's exception or the failure.
        code: the student's line that led to the exception.
    """
    return [symptom for symptom in SYMPTOMS if _shows(symptom, evidence, text, code)]


def _shows(symptom: Symptom, evidence: Evidence | None, text: str, code: str) -> bool:
    fits = re.search(symptom.pattern, text) and re.search(symptom.code, code)
    if symptom.pattern and fits:
        return evidence is not None or not symptom.only_classes
    with suppress(Exception, SystemExit):  # a part that does not run cannot be tested
        return bool(symptom.test and evidence and symptom.test(evidence))
    return False
