"""The library of mistakes in exercise/steps.py.

Each function is a program: words that are carried out one after another. A mistake is an edit of
the correct program, so several mistakes can be made together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.exercise.reference import named

PROGRAMS = {  # part: names of the arguments, correct program
    "training_step": ("model optimizer images labels",
                      "train forward loss clear backward step return_number"),
    "evaluate": ("model batches train_transform eval_transform",
                 "eval no_grad use_eval_transform predict return_fraction"),
    "replace_head": ("model num_classes", "freeze new_head"),
}  # fmt: skip


@dataclass(frozen=True)
class StepMistake:
    """A common mistake: an explanation, its usual cause, and an edit (old, new) that makes it.

    `old` must occur in the program; "" as `new` removes it.
    """

    says: str
    because: str
    edit: tuple[str, str]
    name: str = ""


def program(part: str, mistakes: tuple[StepMistake, ...] = ()) -> Callable | None:
    """The function of a part with some mistakes; None if they cannot be made together."""
    names, words = PROGRAMS[part]
    words = f" {words} "
    for mistake in mistakes:
        old, new = (f" {text} ".replace("  ", " ") for text in mistake.edit)
        if old not in words:
            return None
        words = words.replace(old, new)

    def function(*arguments):
        s = SimpleNamespace(**dict(zip(names.split(), arguments, strict=True)), returned=None)
        with torch.set_grad_enabled("no_grad" not in words):
            for word in words.split():
                WORDS[word](s)
        return s.returned

    return function


def _loss(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    return lambda s: vars(s).update(loss=function(s.logits, s.labels))


def _predict(s: SimpleNamespace, axis: int | None = 1) -> None:
    """For each batch, which images (B,) are predicted correctly."""
    transform = getattr(s, "transform", lambda x: x)
    s.hits = [s.model(transform(images)).argmax(axis) == labels for images, labels in s.batches]


def _accuracy(function: Callable[[list[Tensor]], Tensor]) -> Callable:
    return lambda s: vars(s).update(returned=float(function(s.hits)))


def _set_head(s: SimpleNamespace, behind: bool) -> None:
    old = s.model.head
    new = nn.Linear(old.out_features if behind else old.in_features, s.num_classes)
    s.model.head = nn.Sequential(old, new) if behind else new


WORDS: dict[str, Callable[[SimpleNamespace], object]] = {
    "train": lambda s: s.model.train(),
    "forward": lambda s: vars(s).update(logits=s.model(s.images)),
    "softmax": lambda s: vars(s).update(logits=s.logits.softmax(dim=1)),
    "loss": _loss(F.cross_entropy),
    "summed_loss": _loss(lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")),
    "squared_error": _loss(lambda x, labels: F.mse_loss(x, F.one_hot(labels, x.shape[1]).to(x))),
    "clear": lambda s: s.optimizer.zero_grad(),
    "backward": lambda s: s.loss.backward(),
    "step": lambda s: s.optimizer.step(),
    "return_number": lambda s: vars(s).update(returned=s.loss.item()),
    "return_tensor": lambda s: vars(s).update(returned=s.loss),
    "eval": lambda s: s.model.eval(),
    "no_grad": lambda s: None,  # see program
    "use_eval_transform": lambda s: vars(s).update(transform=s.eval_transform),
    "use_train_transform": lambda s: vars(s).update(transform=s.train_transform),
    "predict": _predict,
    "predict_one": lambda s: _predict(s, axis=None),
    "return_fraction": _accuracy(lambda hits: torch.cat(hits).double().mean()),
    "return_mean_of_batches": _accuracy(
        lambda hits: torch.stack([h.double().mean() for h in hits]).mean()
    ),
    "return_last": _accuracy(lambda hits: hits[-1].double().mean()),
    "return_percent": _accuracy(lambda hits: 100 * torch.cat(hits).double().mean()),
    "return_count": _accuracy(lambda hits: torch.cat(hits).sum()),
    "return_count_per_batch": _accuracy(lambda hits: torch.cat(hits).sum() / len(hits)),
    "freeze": lambda s: s.model.requires_grad_(False),
    "freeze_blocks": lambda s: s.model.blocks.requires_grad_(False),
    "unfreeze_head": lambda s: s.model.head.requires_grad_(True),
    "new_head": lambda s: _set_head(s, behind=False),
    "head_behind": lambda s: _set_head(s, behind=True),
    "init_weights": lambda s: s.model.init_weights(),
}


TRAINING_STEP = {
    "gradients not cleared": StepMistake(
        "zero_grad is missing, so every step also uses the gradients of all steps before it.",
        "PyTorch accumulates gradients, which is useful for large batches and easy to forget; "
        "zero_grad without () does nothing",
        ("clear", ""),
    ),
    "gradients cleared before the step": StepMistake(
        "zero_grad is called between backward and step, so the step has no gradient to use.",
        "The three calls are in the wrong order",
        ("clear backward", "backward clear"),
    ),
    "step before backward": StepMistake(
        "The optimizer steps before backward, so each gradient is used one batch too late.",
        "The three calls are in the wrong order",
        ("clear backward step", "step clear backward"),
    ),
    "step before backward, gradients cleared first": StepMistake(
        "The gradients are cleared and the optimizer steps before backward: nothing is learned.",
        "The three calls are in the wrong order",
        ("backward step", "step backward"),
    ),
    "no train mode": StepMistake(
        "The model stays in eval mode, so dropout and drop path are off while it trains.",
        "A new model is in train mode, but after the first validation it is not",
        ("train", ""),
    ),
    "softmax before the loss": StepMistake(
        "The cross-entropy gets probabilities and applies a second softmax, so the loss stays "
        "high and gradients are small.",
        "The loss is defined on probabilities, but PyTorch's takes logits",
        ("loss", "softmax loss"),
    ),
    "sum instead of mean": StepMistake(
        "The loss is summed over the batch, so the step grows with the batch size.",
        "reduction='sum' is set, or the losses are added up",
        ("loss", "summed_loss"),
    ),
    "squared error instead of cross-entropy": StepMistake(
        "The loss is the squared error to one-hot labels.",
        "Classification is treated as a regression of the labels",
        ("loss", "squared_error"),
    ),
    "no step": StepMistake(
        "The gradients are computed, but the optimizer never steps.",
        "backward is assumed to update the parameters; step without () does nothing",
        ("step", ""),
    ),
    "loss returned with its graph": StepMistake(
        "The loss is returned as a tensor with its graph, so adding up losses over an epoch keeps "
        "the activations of all batches in memory.",
        "A tensor prints like a number; .item() makes one",
        ("return_number", "return_tensor"),
    ),
    "loss after the update": StepMistake(
        "The loss that is returned was computed after the update.",
        "The model is called a second time to get the loss",
        ("return_number", "forward loss return_number"),
    ),
}

EVALUATE = {
    "no eval mode": StepMistake(
        "The model stays in train mode, so dropout and drop path are active during validation.",
        "torch.no_grad() is mistaken for eval mode; it only switches gradients off",
        ("eval", ""),
    ),
    "gradients computed": StepMistake(
        "Gradients are recorded, which costs memory and time.",
        "eval() is mistaken for no_grad(); it only changes dropout and norms",
        ("no_grad", ""),
    ),
    "augmented validation images": StepMistake(
        "The validation images are augmented at random, so the accuracy is too low and noisy.",
        "Train and validation splits share one dataset object and its transform",
        ("use_eval_transform", "use_train_transform"),
    ),
    "images not transformed": StepMistake(
        "The model gets raw images, without the normalization that it was trained with.",
        "The batches are assumed to be transformed already",
        ("use_eval_transform", ""),
    ),
    "argmax without axis": StepMistake(
        "The argmax is taken over the whole batch, so there is one number instead of a class for "
        "each image.",
        "argmax without dim flattens the logits (B, num_classes)",
        ("predict", "predict_one"),
    ),
    "mean of the batches' accuracies": StepMistake(
        "The accuracies of the batches are averaged, so images of a small last batch count more.",
        "All batches are assumed to have the same size",
        ("return_fraction", "return_mean_of_batches"),
    ),
    "accuracy of the last batch": StepMistake(
        "Only the last batch counts.",
        "The counters are set to zero inside the loop",
        ("return_fraction", "return_last"),
    ),
    "percent instead of a fraction": StepMistake(
        "The result is between 0 and 100.",
        "Accuracies are printed in percent",
        ("return_fraction", "return_percent"),
    ),
    "correct predictions not divided": StepMistake(
        "The number of correct predictions is returned instead of their fraction.",
        "The division at the end is missing",
        ("return_fraction", "return_count"),
    ),
    "divided by the number of batches": StepMistake(
        "The correct predictions are divided by the number of batches instead of images.",
        "len(loader) counts batches",
        ("return_fraction", "return_count_per_batch"),
    ),
}

REPLACE_HEAD = {
    "nothing frozen": StepMistake(
        "All layers stay trainable.",
        "model.requires_grad = False only sets an attribute of the model, or freezing is forgotten",
        ("freeze", ""),
    ),
    "new head frozen": StepMistake(
        "The head is frozen too, so nothing can be trained.",
        "The head is replaced first, and then all parameters are frozen",
        ("freeze new_head", "new_head freeze"),
    ),
    "only the blocks frozen": StepMistake(
        "The patch embedding, the tokens and the final norm stay trainable.",
        "Only the parameters of model.blocks are frozen",
        ("freeze", "freeze_blocks"),
    ),
    "head not replaced": StepMistake(
        "The old head is trained, with the old number of classes.",
        "Freezing seems to be enough",
        ("new_head", "unfreeze_head"),
    ),
    "new head behind the old one": StepMistake(
        "A layer is added after the old head, so it reads old logits instead of features.",
        "A new layer is added without removing the old one",
        ("new_head", "head_behind"),
    ),
    "backbone weights changed": StepMistake(
        "The pretrained weights are initialized again.",
        "init_weights is called for the new head, but it initializes the whole model",
        ("new_head", "new_head init_weights"),
    ),
}

STEP_MISTAKES: dict[str, tuple[StepMistake, ...]] = {
    "training_step": named(TRAINING_STEP),
    "evaluate": named(EVALUATE),
    "replace_head": named(REPLACE_HEAD),
}
