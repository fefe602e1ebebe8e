"""A model's outputs on a whole split, in one process or several."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lab.core import UserError, runtime
from lab.data import Loaders, to_device
from lab.training.results import Predictions


@torch.no_grad()
def predict(
    model: nn.Module, loaders: Loaders, split: str, accelerator: Accelerator, view: int = 0
) -> Tensor:
    """The model's output for each image of a split, (N, ...), in the split's order, on the CPU.

    A progress bar appears after two seconds.

    Args:
        model: maps images (B, C, H, W) to (B, ...); left in evaluation mode.
        loaders: the batches, on the accelerator's device.
        split: "train", "val" or "test".
        accelerator: processes and precision.
        view: 0 for the images as evaluation sees them; 1, 2, ... for fixed augmented views.

    Raises: UserError, if there are fewer images than processes.
    """
    model.eval()
    size, world, outputs = len(getattr(loaders.data, split)), accelerator.num_processes, None
    if size < world:
        raise UserError(
            f"the {split} split has only {size} images for {world} processes: start at most {size} "
            "processes"
        )
    bar = tqdm(
        desc=f"{split} images", total=len(range(accelerator.process_index, size, world)),
        delay=2, leave=False, disable=None if accelerator.is_main_process else True, unit=" images",
    )  # fmt: skip
    with bar:
        for index, images, _ in loaders.evaluation(split, view):
            with accelerator.autocast(), runtime.allow_tf32(accelerator.device):
                values = model(images).float()
            if outputs is None:
                outputs = torch.zeros(size, *values.shape[1:], device=accelerator.device)
            outputs[to_device(index, outputs.device)] = values
            bar.update(len(images))
    return accelerator.reduce(outputs).cpu()  # a sum: each row is zero in all processes but one


def evaluate(
    model: nn.Module, loaders: Loaders, split: str, accelerator: Accelerator
) -> Predictions:
    """Logits and labels of each image of a split, exactly once, in the split's order."""
    logits = predict(model, loaders, split, accelerator)
    return Predictions(logits, getattr(loaders.data, split).labels)
