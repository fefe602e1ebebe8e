"""Three steps that every training script needs, on any model that maps images to logits.

They are short, and most of what goes wrong in training scripts goes wrong here: gradients that
pile up, a model left in the wrong mode, a loss on probabilities, layers that stay trainable.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """Updates the model once on one batch and returns the loss of that batch.

    Args:
        model: images (B, C, H, W) to logits (B, num_classes); it may still be in eval mode.
        optimizer: over the model's parameters. This function is called for every batch.
        images: (B, C, H, W), ready for the model.
        labels: (B,) class numbers, int64.

    Returns: the mean cross-entropy over the batch, before the update.
    """
    model.train()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    train_transform: Callable[[Tensor], Tensor],
    eval_transform: Callable[[Tensor], Tensor],
) -> float:
    """Returns the model's accuracy on a validation split, a number from 0 to 1.

    Args:
        model: images (B, C, H, W) to logits (B, num_classes); it may still be in train mode.
        batches: pairs of raw images (B, C, H, W) and labels (B,); the last batch may be smaller.
        train_transform: raw images to the model's input, with random augmentation.
        eval_transform: raw images to the model's input, without augmentation.
    """
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in batches:
            predictions = model(eval_transform(images)).argmax(dim=1)
            correct += (predictions == labels).sum().item()
            total += len(labels)
    return correct / total


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Prepares a pretrained model for training only a new output layer (a linear probe).

    Args:
        model: a VisionTransformer whose output layer is `model.head`, an nn.Linear. Afterwards
            `model.head` is a new nn.Linear with `num_classes` outputs, and only it is trainable.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.head = nn.Linear(model.head.in_features, num_classes)
