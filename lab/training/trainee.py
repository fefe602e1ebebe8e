"""What is trained: the model, its moving average and its optimizer, on their devices."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import nn

from lab.core import checkpoints
from lab.training.config import FitConfig


class Trainee:
    """A model and its optimizer, as Accelerate wants them for one process or for several.

    Attributes:
        plain: the model that is saved.
        model: the model that is called in training; around `plain`, or `plain` itself.
        judged: the model that is validated, kept and tested: the moving average, if there is one.
        optimizer: over the parameters of `plain`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: FitConfig,
        accelerator: Accelerator,
    ):
        model.to(accelerator.device)
        self.plain = self.judged = model
        self.ema = None
        if config.ema_decay:
            self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
            self.judged = self.ema.module
        if config.compile:
            # With two sizes of images, one compilation for all sizes would serve the large ones.
            model.compile(dynamic=False if config.small_epochs else None)
        if accelerator.distributed_type == DistributedType.NO:
            # No wrapper around the optimizer, which costs as much as the step of a small head.
            self.model, self.optimizer = accelerator.prepare(model), optimizer
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def agree(self) -> None:
        """What a batch norm knows of its own process's images gives way to the first process's."""
        for buffer in self.judged.buffers():
            broadcast(buffer)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }

    def load(self, saved: dict[str, Any], path: Path) -> None:
        """Takes up a `state`, whole, that was read from `path`."""
        checkpoints.load_strict(self.plain, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema:
            checkpoints.load_strict(self.ema.module, saved["ema"], path)


def train_mode(model: nn.Module) -> None:
    """Sets training mode, except for frozen modules: they stay in eval mode, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
