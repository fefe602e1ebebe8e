"""How to train: the settings of `lab.training.fit`, checked before anything runs."""

from dataclasses import dataclass
from typing import Literal

from lab.core import UserError, constants
from lab.training.precision import mixed_precision
from lab.training.tensorboard import check_installed


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Raises: UserError, naming the constant that is invalid.
    """

    epochs: int  # passes over the training images
    warmup_fraction: float = 0.0  # fraction of all steps in which the learning rate rises
    lr_schedule: Literal["cosine", "linear", "none"] = "cosine"  # decay after the warm-up
    clip_grad: float = 0.0  # maximum norm of the gradient of all parameters; 0: no clipping
    accumulation_steps: int = 1  # parts into which each batch is split to save memory
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of Zhang et al. 2018; 0: off
    cutmix: float = 0.0  # alpha of Yun et al. 2019; 0: off
    mix_probability: float = 1.0  # fraction of the batches that mixup or cutmix mixes
    progressive_resize: float = 0.0  # train this first fraction of the epochs on smaller images
    small_size: int = 0  # side of those smaller images, in pixels
    ema_decay: float = 0.0  # validate and keep a moving average of the weights; 0: off
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # see precision.py
    compile: bool = False  # torch.compile
    tensorboard: bool = False
    snapshots: int | None = 0  # copies of the weights; None: 10 for a ViT below 0.5M parameters
    trial: bool = False  # a trial of a sweep: prints nothing and never uses the test split

    def __post_init__(self) -> None:
        constants.check_choices(self)
        if self.progressive_resize and self.small_size < 1:
            raise UserError(
                "PROGRESSIVE_RESIZE needs at least two patches per side: lower PATCH_SIZE"
            )
        if self.tensorboard:
            check_installed()
        mixed_precision(self.precision)  # raises for one that the hardware does not support
        for name in ("epochs", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        for name in ("warmup_fraction", "label_smoothing", "progressive_resize", "ema_decay"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"{name.upper()}={value} must lie in [0, 1)")
        if not 0 <= self.mix_probability <= 1:
            raise UserError(f"MIX_PROBABILITY={self.mix_probability} must lie in [0, 1]")
        for name in ("clip_grad", "mixup", "cutmix", "snapshots"):
            if (value := getattr(self, name) or 0) < 0:
                raise UserError(f"{name.upper()}={value} cannot be negative; 0 turns it off")

    @property
    def small_epochs(self) -> int:
        """Number of initial epochs on smaller images; the last epoch always uses the full size."""
        return min(round(self.progressive_resize * self.epochs), self.epochs - 1)

    @property
    def mixed_precision(self) -> str:
        """The precision as Accelerate names it: "bf16", "fp16" or "no"."""
        return mixed_precision(self.precision)
