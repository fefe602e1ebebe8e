"""The optimizer, its parameter groups, and the learning rate over a run."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from lab.errors import UserError

NO_DECAY = ("cls_token", "pos_embed")  # beside biases, norms and LayerScale, which are 1-d


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused; decay on weight matrices alone.

    Raises: UserError, for a rate or decay that cannot be right.
    """
    if not 0 < learning_rate < 1:
        raise UserError(f"LEARNING_RATE={learning_rate} must lie in (0, 1); ViTs like 5e-4 to 3e-3")
    if weight_decay < 0:
        raise UserError(f"WEIGHT_DECAY={weight_decay} must be 0 or above, such as 0.05")
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=NO_DECAY)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of its peak: a linear warm-up, then a decay, step by step."""

    steps: int  # of the whole run
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "none"] = "cosine"
    floor: float = 0.0  # share of the peak that is left at the end

    def __call__(self, step: int) -> float:
        """The share at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = {
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "none": 1.0,
        }[self.decay]
        return self.floor + (1 - self.floor) * left

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Gives every group its rate for this step: peak x share x the group's own `lr_scale`."""
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * self(step) * group.get("lr_scale", 1.0)
