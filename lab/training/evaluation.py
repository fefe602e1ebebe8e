"""A model's outputs on a split, every image once, whatever the number of processes."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.core import UserError
from lab.data.loaders import Loaders
from lab.training.results import Predictions


@torch.no_grad()
def predict(
    model: nn.Module, loaders: Loaders, split: str, accelerator: Accelerator, view: int = 0
) -> Tensor:
    """What the model gives for each image of a split, (N, ...) in the split's order, on the CPU.

    view: 0 for the images as evaluation sees them; 1, 2, ... for the augmented views of that
        number, always the same ones.

    Raises: UserError, for fewer images than processes.
    """
    model.eval()
    size, out = len(getattr(loaders.data, split)), None
    if size < accelerator.num_processes:
        raise UserError(
            f"{split} has {size} images for {accelerator.num_processes} processes: start at most "
            f"{size}"
        )
    for index, images, _ in loaders.evaluation(split, view):
        with accelerator.autocast():
            values = model(images).float()
        if out is None:
            out = torch.zeros(size, *values.shape[1:], device=accelerator.device)
        out[index.to(out.device)] = values
    return accelerator.reduce(out).cpu()  # the other processes' rows are zero


def evaluate(
    model: nn.Module, loaders: Loaders, split: str, accelerator: Accelerator
) -> Predictions:
    """Logits and labels of every image of a split, each exactly once, in the split's order."""
    logits = predict(model, loaders, split, accelerator)
    return Predictions(logits, getattr(loaders.data, split).labels)
