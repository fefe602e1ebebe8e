"""What a model wants its images to be like; it goes with the weights wherever they go."""

import math
from dataclasses import dataclass
from typing import Literal

from lab.core import UserError


@dataclass(frozen=True)
class Preprocess:
    """Size, crop and normalisation of a model's input, with timm's names and meanings.

    An image is resized to `img_size / crop_pct` pixels and its centre cut out: this is what
    evaluation sees. Raises UserError for values that cannot be.
    """

    img_size: int  # pixels
    mean: list[float]  # of each channel, pixels counted in [0, 1]
    std: list[float]
    crop_pct: float = 1.0  # share of the resized image's side that the model sees
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if self.img_size < 1:
            raise UserError(f"IMG_SIZE={self.img_size} must be a number of pixels, such as 224")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct={self.crop_pct} must be a share of the side, in (0, 1]")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise UserError(f"mean {self.mean} and std {self.std} are no normalisation")

    @property
    def resized(self) -> int:
        """Side in pixels of the image that the centre is cut out of."""
        return resized(self.img_size, self.crop_pct)


def resized(img_size: int, crop_pct: float) -> int:
    """Side in pixels of which `img_size` is the share `crop_pct`, rounded as timm does."""
    return math.floor(img_size / crop_pct)
