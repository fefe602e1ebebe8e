"""Writes a run's history to TensorBoard files, to watch it live."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lab.core import UserError


def check_installed() -> None:
    """Raises UserError if TensorBoard, which is optional, is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError(
            "TENSORBOARD=True needs TensorBoard, which is not installed: pip install tensorboard"
        )


class TensorBoardLogger:
    """Writes the scalars of each epoch to `<run>/tensorboard/`.

    Args:
        folder: the run's folder.
        epoch: the next epoch. Points of this and later epochs, which an interrupted run may have
            written, are discarded.
    """

    def __init__(self, folder: Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row of history.csv; `train_loss` and `val_loss` share the group `loss`."""
        for name, value in row.items():
            part, _, rest = name.partition("_")
            tag = f"{rest}/{part}" if part in ("train", "val") else f"run/{name}"
            if value is not None and name != "epoch":
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()  # so that a kill loses nothing
