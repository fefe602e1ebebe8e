"""The library of mistakes in exercise/steps.py.

A wrong training step is a list of words that are carried out in order; a wrong evaluation and a
wrong head are short functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class StepMistake:
    """A wrong function: what it does, how somebody gets there, and the function itself."""

    name: str
    says: str
    because: str
    function: Callable


def _forward(s: SimpleNamespace) -> None:
    s.logits = s.model(s.images)


def _loss(s: SimpleNamespace, function: Callable = F.cross_entropy) -> None:
    s.loss = function(s.logits, s.labels)


def _squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits))


WORDS: dict[str, Callable[[SimpleNamespace], object]] = {
    "train": lambda s: s.model.train(),
    "forward": _forward,
    "softmax": lambda s: vars(s).update(logits=s.logits.softmax(dim=1)),
    "loss": _loss,
    "summed_loss": lambda s: _loss(s, lambda x, y: F.cross_entropy(x, y, reduction="sum")),
    "squared_error": lambda s: _loss(s, _squared_error),
    "clear": lambda s: s.optimizer.zero_grad(),
    "backward": lambda s: s.loss.backward(),
    "step": lambda s: s.optimizer.step(),
}


def _steps(words: str, result: Callable = torch.Tensor.item) -> Callable:
    """A training step that carries out WORDS in this order."""

    def training_step(model, optimizer, images, labels):
        s = SimpleNamespace(model=model, optimizer=optimizer, images=images, labels=labels)
        for word in words.split():
            WORDS[word](s)
        return result(s.loss)

    return training_step


TRAINING_STEP = (
    StepMistake(
        "gradients not cleared",
        "zero_grad is missing, so every step also uses the gradients of all steps before it.",
        "PyTorch adds gradients up, which is useful for accumulation and easy to forget",
        _steps("train forward loss backward step"),
    ),
    StepMistake(
        "gradients cleared before the step",
        "zero_grad stands between backward and step, so the step has no gradient to use.",
        "The three calls are in the wrong order",
        _steps("train forward loss backward clear step"),
    ),
    StepMistake(
        "step before backward",
        "The optimizer steps before the gradients of this batch exist, one batch too late.",
        "The three calls are in the wrong order",
        _steps("train forward loss step clear backward"),
    ),
    StepMistake(
        "step before backward, gradients cleared first",
        "The gradients are cleared and the optimizer steps before backward: nothing is learned.",
        "The three calls are in the wrong order",
        _steps("train forward loss clear step backward"),
    ),
    StepMistake(
        "no train mode",
        "The model stays in eval mode, so dropout and drop path are off while it trains.",
        "A new model is in train mode, but after the first validation it is not",
        _steps("forward loss clear backward step"),
    ),
    StepMistake(
        "no train mode, gradients not cleared",
        "The model stays in eval mode, and the gradients of earlier steps are never cleared.",
        "Only forward, backward and step are written",
        _steps("forward loss backward step"),
    ),
    StepMistake(
        "softmax before the loss",
        "The cross-entropy gets probabilities and applies a second softmax, so the loss stays "
        "high and gradients are small.",
        "The loss is defined on probabilities, but PyTorch's takes logits",
        _steps("train forward softmax loss clear backward step"),
    ),
    StepMistake(
        "sum instead of mean",
        "The loss is summed over the batch, so the step grows with the batch size.",
        "reduction='sum' is set, or the losses are added up",
        _steps("train forward summed_loss clear backward step"),
    ),
    StepMistake(
        "squared error instead of cross-entropy",
        "The loss is the squared error to one-hot labels.",
        "Classification is treated as a regression of the labels",
        _steps("train forward squared_error clear backward step"),
    ),
    StepMistake(
        "no step",
        "The gradients are computed, but the optimizer never steps.",
        "backward is thought to update the parameters",
        _steps("train forward loss clear backward"),
    ),
    StepMistake(
        "loss returned with its graph",
        "The loss is returned as a tensor with its graph, so adding up losses over an epoch keeps "
        "the activations of all batches in memory.",
        "A tensor prints like a number; .item() makes one",
        _steps("train forward loss clear backward step", result=lambda loss: loss),
    ),
    StepMistake(
        "loss after the update",
        "The loss that is returned was computed after the update.",
        "The model is called a second time to get the loss",
        _steps("train forward loss clear backward step forward loss"),
    ),
)


def _evaluation(
    mode: str = "eval",
    grad: bool = False,
    transform: str = "eval",
    result: Callable[[list[torch.Tensor]], object] = lambda hits: torch.cat(hits).double().mean(),
) -> Callable:
    """An evaluation; `result` gets a list of (B,) bool tensors, one for each batch."""

    def evaluate(model, batches, train_transform, eval_transform):
        transforms = {"train": train_transform, "eval": eval_transform, "none": lambda x: x}
        model.train(mode == "train")
        with torch.set_grad_enabled(grad):
            hits = [model(transforms[transform](x)).argmax(1) == y for x, y in batches]
        return float(result(hits))

    return evaluate


EVALUATE = (
    StepMistake(
        "no eval mode",
        "The model stays in train mode, so dropout and drop path are active while it is judged.",
        "torch.no_grad() is taken for eval mode; it only switches gradients off",
        _evaluation(mode="train"),
    ),
    StepMistake(
        "gradients computed",
        "Gradients are recorded, which costs memory and time.",
        "eval() is taken for no_grad(); it only changes dropout and norms",
        _evaluation(grad=True),
    ),
    StepMistake(
        "neither eval mode nor no_grad",
        "The model stays in train mode, and gradients are recorded.",
        "The training loop is copied without backward and step",
        _evaluation(mode="train", grad=True),
    ),
    StepMistake(
        "augmented validation images",
        "The validation images are augmented at random, so the accuracy is too low and noisy.",
        "Train and validation splits share one dataset object and its transform",
        _evaluation(transform="train"),
    ),
    StepMistake(
        "images not transformed",
        "The model gets raw images, without the normalization that it was trained with.",
        "The transform is thought to be part of the batches",
        _evaluation(transform="none"),
    ),
    StepMistake(
        "mean of the batches' accuracies",
        "The accuracies of the batches are averaged, so images of a small last batch count more.",
        "All batches are thought to have the same size",
        _evaluation(result=lambda hits: torch.stack([h.double().mean() for h in hits]).mean()),
    ),
    StepMistake(
        "accuracy of the last batch",
        "Only the last batch counts.",
        "The counters are set to zero inside of the loop",
        _evaluation(result=lambda hits: hits[-1].double().mean()),
    ),
    StepMistake(
        "percent instead of a fraction",
        "The result is between 0 and 100.",
        "Accuracies are printed in percent",
        _evaluation(result=lambda hits: 100 * torch.cat(hits).double().mean()),
    ),
    StepMistake(
        "correct predictions not divided",
        "The number of correct predictions is returned instead of their fraction.",
        "The division at the end is missing",
        _evaluation(result=lambda hits: torch.cat(hits).sum()),
    ),
    StepMistake(
        "divided by the number of batches",
        "The correct predictions are divided by the number of batches instead of images.",
        "len(loader) counts batches",
        _evaluation(result=lambda hits: torch.cat(hits).sum() / len(hits)),
    ),
)


def _new_head(model: nn.Module, num_classes: int) -> None:
    width = model.head.in_features
    model.head = nn.Linear(width, num_classes)


def _train_only_head(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def _each(*actions: Callable) -> Callable:
    """A function that takes several actions, each called with (model, num_classes)."""

    def replace_head(model, num_classes):
        for action in actions:
            action(model, num_classes)

    return replace_head


REPLACE_HEAD = (
    StepMistake(
        "nothing frozen",
        "All layers stay trainable.",
        "model.requires_grad = False only sets an attribute of the model, or freezing is forgotten",
        _each(_new_head),
    ),
    StepMistake(
        "new head frozen",
        "The head is frozen too, so nothing can be trained.",
        "The head is replaced first, and then all parameters are frozen",
        _each(_new_head, lambda m, n: m.requires_grad_(False)),
    ),
    StepMistake(
        "only the blocks frozen",
        "The patch embedding, the tokens and the final norm stay trainable.",
        "Freezing goes through model.blocks only",
        _each(_new_head, lambda m, n: m.blocks.requires_grad_(False)),
    ),
    StepMistake(
        "head not replaced",
        "The old head is trained, with the old number of classes.",
        "Freezing is thought to be all that is needed",
        _each(lambda m, n: _train_only_head(m)),
    ),
    StepMistake(
        "new head behind the old one",
        "A layer is put behind the old head, so it reads old logits instead of features.",
        "A new layer is added without removing the old one",
        _each(lambda m, n: m.requires_grad_(False), lambda m, n: setattr(
            m, "head", nn.Sequential(m.head, nn.Linear(m.head.out_features, n)))),
    ),
    StepMistake(
        "backbone weights changed",
        "The pretrained weights are initialized again.",
        "init_weights is called for the new head, but it covers the whole model",
        _each(lambda m, n: m.requires_grad_(False), _new_head, lambda m, n: m.init_weights()),
    ),
)  # fmt: skip

STEP_MISTAKES: dict[str, tuple[StepMistake, ...]] = {
    "training_step": TRAINING_STEP,
    "evaluate": EVALUATE,
    "replace_head": REPLACE_HEAD,
}
