"""What is trained: the model, its moving average and its optimizer, on their devices."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import nn

from lab.checkpoints import load_strictly
from lab.errors import UserError
from lab.fit_config import FitConfig
from lab.sharded import check_supported, load_optimizer


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
        """Raises: UserError, for a way to divide the model over processes that does not work."""
        check_supported(accelerator, model, optimizer)
        if not accelerator.is_fsdp2:  # else only shards go there: all of it may not fit
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
            try:
                self.model, self.optimizer = accelerator.prepare(model, optimizer)
            except (ValueError, NotImplementedError) as error:
                if not accelerator.is_fsdp2:
                    raise
                raise UserError(
                    f"this model cannot be divided over the processes so: {error}\n"
                    "Change Accelerate's config, or run without FSDP."
                ) from error
        if self.ema and accelerator.is_fsdp2:
            fsdp2_prepare_model(accelerator, self.ema.module)

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
        load_strictly(self.plain, saved["model"], path)
        load_optimizer(self.optimizer, saved["optimizer"])
        if self.ema:
            load_strictly(self.ema.module, saved["ema"], path)
