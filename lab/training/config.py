"""How to train: the settings of `lab.training.fit`, checked before anything runs."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from lab.core import UserError, constants, machine, runtime


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
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # see `mixed_precision`
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
        if self.tensorboard and find_spec("tensorboard") is None:
            raise UserError(
                "TENSORBOARD=True needs TensorBoard, which is not installed: pip install "
                "tensorboard"
            )
        if self.compile and not machine.has_compiler():
            raise UserError(
                "COMPILE=True needs a C++ compiler, such as g++: install one, or set COMPILE=False"
            )
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
        """The precision as Accelerate names it."""
        return mixed_precision(self.precision)


def precision_name(mixed_precision: str) -> str:
    """The PRECISION constant for Accelerate's name of a precision."""
    return "fp32" if mixed_precision == "no" else mixed_precision


def mixed_precision(precision: str) -> str:
    """The PRECISION constant as Accelerate names it: "bf16", "fp16" or, for fp32, "no".

    "auto" selects bf16 where it is faster, else fp16 on a CUDA GPU, else fp32. Accelerate scales
    the loss for fp16, because small gradients would round to zero.

    Raises: UserError, for a precision that this hardware does not support.
    """
    device = runtime.process_state().device
    is_cuda, has_bf16 = device.type == "cuda", machine.has_bf16(device)
    if precision == "auto":
        return "bf16" if machine.bf16_is_faster(device) else "fp16" if is_cuda else "no"
    if precision == "bf16" and is_cuda and not has_bf16:
        raise UserError(
            f"PRECISION=bf16: {torch.cuda.get_device_name(device)} has no bf16 hardware and would "
            "emulate it slowly. Set PRECISION=fp16 or auto"
        )
    if precision == "fp16" and not is_cuda:
        raise UserError(
            f"PRECISION=fp16 needs a CUDA GPU, and this is a {device.type} device. Set "
            "PRECISION=auto, bf16 or fp32"
        )
    return "no" if precision == "fp32" else precision
