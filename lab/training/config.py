"""How to train: what `lab.training.loop.fit` is asked for, checked before anything runs."""

from dataclasses import dataclass
from typing import Literal

from lab.core import UserError, runtime
from lab.models.profiling import has_bf16
from lab.training.tensorboard import check_installed


@dataclass(frozen=True)
class FitConfig:
    """How to train. Epochs are passes over the training images."""

    epochs: int
    warmup_fraction: float = 0.0  # share of the run in which the rate rises to its peak
    lr_schedule: Literal["cosine", "linear", "none"] = "cosine"
    clip_grad: float = 0.0  # largest norm of all gradients together; 0: no limit
    accumulation_steps: int = 1  # parts that a batch is cut into to save memory
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of Zhang et al. 2018; 0: off
    cutmix: float = 0.0  # alpha of Yun et al. 2019; 0: off
    mix_probability: float = 1.0  # share of the batches that are mixed
    progressive_resize: float = 0.0  # of the epochs, the first ones, see smaller images
    small_size: int = 0  # pixels, of those images
    ema_decay: float = 0.0  # validate and keep a moving average of the weights; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    seed: int = 0
    tensorboard: bool = False
    trial: bool = False  # one of a sweep: it says nothing and leaves the test split alone

    def __post_init__(self) -> None:
        if self.progressive_resize and self.small_size < 1:
            raise UserError(
                "PROGRESSIVE_RESIZE needs two patches or more to a side: lower PATCH_SIZE"
            )
        if self.tensorboard:
            check_installed()
        for name in ("epochs", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        for name, top in (
            ("warmup_fraction", 1), ("label_smoothing", 1), ("mix_probability", 1.001),
            ("progressive_resize", 1), ("ema_decay", 1),
        ):  # fmt: skip
            if not 0 <= (value := getattr(self, name)) < top:
                raise UserError(f"{name.upper()}={value} must lie between 0 and 1")
        for name in ("clip_grad", "mixup", "cutmix"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name.upper()}={value} cannot be negative; 0 turns it off")

    @property
    def small_epochs(self) -> int:
        """How many epochs, the first ones, see smaller images; never the last."""
        return min(round(self.progressive_resize * self.epochs), self.epochs - 1)

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision; "auto" takes bf16 where the hardware has it."""
        if self.precision == "auto":
            return "bf16" if has_bf16(runtime.process_state().device) else "no"
        return "bf16" if self.precision == "bf16" else "no"
