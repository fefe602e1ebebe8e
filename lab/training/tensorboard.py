"""TensorBoard files beside a run's records, for those who want to watch live."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lab.core import UserError


def check_installed() -> None:
    """Raises: UserError, where TensorBoard is not installed; the lab itself does not need it."""
    if find_spec("tensorboard") is None:
        raise UserError("TENSORBOARD=True needs TensorBoard: pip install tensorboard, then "
                        "tensorboard --logdir results")  # fmt: skip


class TensorBoardLogger:
    """Scalars of a run by epoch, in `<run>/tensorboard/`.

    Args:
        folder: the run's.
        epoch: the first one to come; what an interrupted run has written from there on is void.
    """

    def __init__(self, folder: Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom wanted

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def add(self, row: dict[str, Any]) -> None:
        """A row of history.csv: `train_loss` and `val_loss` share the panel group `loss`."""
        for name, value in row.items():
            part, _, rest = name.partition("_")
            tag = f"{rest}/{part}" if part in ("train", "val") else f"run/{name}"
            if value is not None and name != "epoch":
                self.writer.add_scalar(tag, value, row["epoch"])
        self.writer.flush()  # a kill must not lose what the epoch has written
