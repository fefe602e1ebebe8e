"""Where a run stands between two steps, and how its epochs are told."""

from dataclasses import dataclass, field
from typing import Any

History = list[dict[str, Any]]  # the rows of history.csv


@dataclass
class TrainState:
    """Where a run stands; with weights and optimizer it is all that a resumed run needs."""

    epoch: int = 1  # the running one
    step: int = 0  # steps done of it
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, correct, images
    seconds: float = 0.0  # spent on it
    history: History = field(default_factory=list)
    best_epoch: int = 0

    def close_epoch(self, row: dict[str, Any]) -> bool:
        """Takes a finished epoch's row into the history; whether it is the best so far.

        Of epochs that are equal on the validation images the last counts: few images cannot tell
        them apart, and later weights have seen the lower rates.
        """
        better = all(row["val_accuracy"] >= other["val_accuracy"] for other in self.history)
        self.history.append(row)
        if better:
            self.best_epoch = self.epoch
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.totals = [0.0, 0.0, 0.0]
        return better


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """A row of the history for the terminal."""
    return (
        f"epoch {row['epoch']:>3}/{epochs}"
        f"  train loss {row['train_loss']:.3f} acc {100 * row['train_accuracy']:5.1f} %"
        f"  val loss {row['val_loss']:.3f} acc {100 * row['val_accuracy']:5.1f} %"
        f"  rate {row['learning_rate']:.1e}  {row['images_per_second']:,.0f} images/s"
    )
