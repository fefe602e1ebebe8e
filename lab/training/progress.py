"""Tracks loss and accuracy during an epoch, and decides after each step whether to stop."""

import math
import time

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lab.core import UserError
from lab.training.trainer import Trainer


class Progress:
    """Averages loss and accuracy over an epoch, shows a progress bar, and checks the loss."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        state, accelerator = trainer.state, trainer.accelerator
        self._single = accelerator.num_processes == 1
        self._check_every = _check_interval(accelerator)
        # A resumed epoch has totals of all processes already; only the main one counts them.
        before = state.totals if accelerator.is_main_process else [0.0, 0.0, 0.0]
        self._totals = torch.tensor(before, device=accelerator.device)
        self._unchecked: list[Tensor] = []  # losses of the steps since the last check
        self._start_step()
        self._started = time.perf_counter() - state.seconds
        self._bar = tqdm(
            desc=f"epoch {state.epoch}/{trainer.config.epochs}", total=trainer.loaders.steps,
            initial=state.step, leave=False, disable=trainer.config.trial or None, unit=" steps",
        )  # fmt: skip

    def _start_step(self) -> None:
        self._loss = self._correct = torch.zeros((), device=self._totals.device)
        self._images = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds a part of a batch: its part of the mean loss, and its correct predictions."""
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self._loss = self._loss + loss.detach()
        self._correct = self._correct + (logits.argmax(1) == labels).sum()
        self._images += len(logits)

    def finish_step(self) -> bool:
        """Completes a step. Returns whether the epoch must stop here, as after Ctrl-C.

        Raises: UserError, if the loss of a step since the last check is not finite.
        """
        state, n = self._trainer.state, self._images
        images = torch.full_like(self._loss, n)
        self._totals += torch.stack([self._loss * n, self._correct, images])
        self._unchecked.append(self._loss)
        self._start_step()
        self._bar.update()
        # Several processes stop together, so they decide together, at the same steps.
        stop = self._single and bool(self._trainer.signals)
        if stop or state.step % self._check_every == 0 or state.step == self._trainer.loaders.steps:
            stop = self._check()
        return stop

    def _check(self) -> bool:
        """Returns whether any process received a signal; raises UserError for a bad loss."""
        losses = self._unchecked
        values = torch.stack([*losses, torch.full_like(losses[0], bool(self._trainer.signals))])
        if not self._single:
            values = self._trainer.accelerator.reduce(values)
        *values, signaled = values.tolist()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            steps_ago = len(losses) - bad - 1
            if (self._trainer.state.epoch, self._trainer.state.step - steps_ago) == (1, 1):
                raise UserError(
                    f"the loss is {values[bad]} in the first step, before any weight was updated, "
                    "so the learning rate is not the cause: look for a division by zero, a "
                    "logarithm or a square root in the model"
                )
            raise UserError(f"the loss became {values[bad]} {self._where(steps_ago)}")
        losses.clear()
        return signaled > 0

    def _where(self, steps_ago: int) -> str:
        state, group = self._trainer.state, self._trainer.optimizer.param_groups[0]
        rate = group["lr"] / group.get("lr_scale", 1)
        return (
            f"in epoch {state.epoch}, step {state.step - steps_ago}, at learning rate {rate:.2g}. "
            "Lower LEARNING_RATE or raise WARMUP_FRACTION"
            + ("." if self._trainer.config.clip_grad else ", or set CLIP_GRAD to 1.")
        )

    def close(self) -> None:
        """Stores the totals of all processes and the time in the run's state.

        Raises: UserError, if weights are not finite, which the loss of the last step cannot show.
        """
        self._bar.close()
        finite = [p.detach().isfinite().all() for p in self._trainer.model.parameters()]
        if not torch.stack(finite).all():
            raise UserError(f"weights became NaN or infinite {self._where(0)}")
        state = self._trainer.state
        state.totals = self._trainer.accelerator.reduce(self._totals).tolist()
        state.seconds = time.perf_counter() - self._started


def _check_interval(accelerator: Accelerator) -> int:
    """Steps between checks of the loss and of the signals that other processes received."""
    if accelerator.device.type == "cpu":
        return 1
    # A check makes a GPU wait for the CPU. But launchers kill processes within 30 s of a signal.
    return 50 if accelerator.num_processes == 1 else 10
