"""The preprocessing that a model expects; it is saved with the weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lab.core import UserError
from lab.data.images import Reading, image_to_array, read_image

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in luminance (ITU-R BT.601)


@dataclass(frozen=True)
class Preprocess:
    """Size, crop and normalization of a model's input, with timm's names and meanings.

    For evaluation an image is resized to `img_size / crop_pct` pixels and its center is cropped.

    Raises: UserError for invalid values.
    """

    img_size: int  # pixels
    mean: list[float]  # per channel, for pixels in [0, 1]
    std: list[float]
    crop_pct: float = 1.0  # the crop's side as a fraction of the resized image's side
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if self.img_size < 1:
            raise UserError(
                f"IMG_SIZE={self.img_size} must be a positive number of pixels, such as 224"
            )
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct={self.crop_pct} must be greater than 0 and at most 1")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise UserError(
                f"mean {self.mean} and std {self.std} must have the same length, and every std "
                "must be positive"
            )

    @property
    def resized(self) -> int:
        """Side in pixels of the image from which the center is cropped."""
        return self.resized_size(self.img_size, self.crop_pct)

    @staticmethod
    def resized_size(img_size: int, crop_pct: float) -> int:
        """Side in pixels of the image from which `img_size` is cropped, rounded as in timm."""
        return math.floor(img_size / crop_pct)

    @property
    def reading(self) -> Reading:
        """How image files are read for this model."""
        return Reading(self.resized, self.interpolation)

    def __call__(self, image: str | Path | Image.Image) -> Tensor:
        """One image as the model expects it, (C, img_size, img_size).

        Args:
            image: the path of a file, or an image that Pillow has opened. Grayscale, CMYK, 16-bit
                and EXIF-rotated images are converted as in training.

        Raises: OSError or ValueError, for a file that is not an image.
        """
        if isinstance(image, str | Path):
            pixels, _ = read_image(Path(image), self.reading)
        else:
            pixels, _ = image_to_array(image, self.reading)
        return self.normalize(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]

    def normalize(self, images: Tensor) -> Tensor:
        """Resizes, crops and normalizes a batch on its device, as evaluation does.

        Args:
            images: uint8, (B, C, H, H). Color images are converted to grayscale for a grayscale
                model, and grayscale images are repeated for a color model.

        Returns: (B, C of the model, img_size, img_size).
        """
        x = self.center_crop(images)
        if x.shape[1] == 3 and len(self.mean) == 1:
            x = luma(x)
        mean, std = (x.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def center_crop(self, images: Tensor) -> Tensor:
        """Resizes images and crops their center, as evaluation does; does not normalize.

        Args:
            images: uint8, (B, C, H, H).

        Returns: floats in [0, 1], (B, C, img_size, img_size).
        """
        x, side = images, self.resized
        if x.shape[-1] != side:
            mode = self.interpolation
            x = F.interpolate(x.float() / 255, (side, side), mode=mode, antialias=True).clamp_(0, 1)
        start = round((side - self.img_size) / 2)  # as in torchvision's center_crop
        x = x[..., start : start + self.img_size, start : start + self.img_size]
        return x if x.is_floating_point() else x.float() / 255


def luma(images: Tensor) -> Tensor:
    """Color images (B, 3, H, W) as grayscale images of floats (B, 1, H, W)."""
    x = images.float()
    return (x * x.new_tensor(_LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
