"""Copies of the weights during training, in fp16, so that attention.html can replay a run.

    results/train/<run>/snapshots/epoch-000.safetensors  epoch-001.safetensors  ...

A snapshot is read with `lab.core.checkpoints.load_weights`; its header has `epoch` and, except for
the random weights of epoch 0, `val_accuracy`.
"""

from pathlib import Path

import numpy as np
from torch import nn

from lab.core import checkpoints, runtime
from model import VisionTransformer

_DEFAULT_COUNT = 10
_MAX_PARAMETERS = 500_000  # above that, snapshots are taken only on request


def snapshot_epochs(epochs: int, count: int) -> list[int]:
    """The epochs after which a snapshot is taken; 0 stands for the weights before training.

    The gaps between them grow, because a model changes most at the beginning.

    Args:
        epochs: number of epochs of the run.
        count: number of snapshots, if the run has enough epochs.

    Returns: 0, `epochs`, and numbers between them, in ascending order.
    """
    if count < 2:
        return [epochs][:count]
    chosen = [0]
    for target in np.geomspace(1, epochs, count - 1)[:-1]:
        chosen.append(max(chosen[-1] + 1, round(target)))
    return [epoch for epoch in chosen if epoch < epochs] + [epochs]


def resolve_count(count: int | None, model: nn.Module) -> int:
    """The number of snapshots. None becomes 10 for a ViT below 0.5M parameters, else 0."""
    if count is not None:
        return count
    size = sum(p.numel() for p in model.parameters())
    is_small = isinstance(model, VisionTransformer) and size < _MAX_PARAMETERS
    return _DEFAULT_COUNT if is_small else 0


def save_snapshot(
    folder: Path, model: nn.Module, epoch: int, val_accuracy: float | None = None
) -> None:
    """Writes the weights as fp16; only the main process does.

    Args:
        folder: the run's folder.
        model: the model that is validated.
        epoch: the number of epochs completed.
        val_accuracy: the accuracy on the validation split, if it was measured.

    Raises: UserError, if the file cannot be written.
    """
    if not runtime.is_main_process():
        return
    place = folder / "snapshots"
    with checkpoints.explain_write_errors(place):
        place.mkdir(exist_ok=True)
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    header = {"epoch": epoch, "val_accuracy": val_accuracy}
    checkpoints.save_weights(place / f"epoch-{epoch:03d}.safetensors", state, header)
