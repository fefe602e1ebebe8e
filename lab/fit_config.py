"""How to train: what `lab.engine.fit` is asked for, checked before anything runs."""

from dataclasses import dataclass
from typing import Literal

from accelerate import PartialState

from lab.compute import has_bf16
from lab.errors import UserError


@dataclass(frozen=True)
class FitConfig:
    """How to train. Epochs are passes over the training images."""

    epochs: int
    warmup: float = 0.0  # share of the run in which the rate rises to its peak
    decay: Literal["cosine", "linear", "none"] = "cosine"
    lr_floor: float = 0.0  # share of the peak rate that is left at the end
    clip_grad: float | None = None  # norm of all gradients together
    accumulation_steps: int = 1  # parts that a batch is cut into to save memory
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of Zhang et al. 2018; 0: off
    cutmix: float = 0.0  # alpha of Yun et al. 2019; 0: off
    mix_probability: float = 1.0  # share of the batches that are mixed
    ema_decay: float | None = None  # validate and keep a moving average of the weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        for name, top in (
            ("warmup", 1), ("label_smoothing", 1), ("mix_probability", 1.001), ("ema_decay", 1),
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and not 0 <= value < top:
                raise UserError(f"{name.upper()}={value} must lie between 0 and 1")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise UserError(f"CLIP_GRAD={self.clip_grad} must be above 0, or none")

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision; "auto" takes bf16 where the hardware has it."""
        if self.precision == "auto":
            return "bf16" if has_bf16(PartialState().device) else "no"
        return "bf16" if self.precision == "bf16" else "no"
