"""What changes while a run trains: its position, its history, and the average of its weights."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

History = list[dict[str, Any]]  # the rows of history.csv


@dataclass
class TrainState:
    """The position of a run. With the weights and the optimizer, all that resuming needs."""

    epoch: int = 1  # the current epoch, counted from 1
    step: int = 0  # steps completed in it
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, correct, images
    seconds: float = 0.0  # training time of the current epoch
    history: History = field(default_factory=list)
    best_epoch: int = 0

    def finish_epoch(self, row: dict[str, Any]) -> bool:
        """Adds the row of the current epoch to the history, and begins the next epoch.

        Returns: whether its validation accuracy is the best so far. If epochs tie, the last one
            wins: a small validation split cannot separate them, and later weights were trained
            at lower learning rates.
        """
        is_best = all(row["val_accuracy"] >= other["val_accuracy"] for other in self.history)
        self.history.append(row)
        if is_best:
            self.best_epoch = self.epoch
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.totals = [0.0, 0.0, 0.0]
        return is_best


class EMA:
    """An exponential moving average of a model's weights and buffers.

    Equals timm's `ModelEmaV3(use_warmup=True)`: the decay rises over the first steps, so that the
    average soon forgets the random weights.

    Attributes:
        model: the averaged copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates the average with the weights after optimizer step `step`, counted from 0."""
        decay = min(1 - (1 + max(0, step - 1)) ** (-2 / 3), self.decay)
        averages, values = [], []
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        for average, value in pairs:
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:  # a counter of batch norm
                average.copy_(value)
        torch._foreach_lerp_(averages, values, weight=1.0 - decay)
