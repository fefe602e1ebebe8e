"""Augmentation of whole batches on the training device; every image draws its own parameters.

torchvision's transforms either draw one set of parameters per batch or process image by image on
the CPU. Here each image of a batch gets its own parameters, and one call augments all of them. Each
operation follows torchvision's definition and is tested against it (tests/data/test_augment.py).
All random numbers come from one CPU generator, so the same seed gives the same batch on any device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core import UserError, constants
from lab.data.preprocess import Preprocess


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; by default they are not."""

    crop_padding: int = 0  # pixels of zero padding before a random crop to the original size
    rrc_min_area: float = 0.0  # minimum area of a random resized crop, as a fraction; 0: no crop
    flip: bool = False  # flip half of the images left-right; wrong for digits and letters
    rotate: float = 0.0  # maximum angle in degrees, in either direction
    scale: float = 0.0  # 0.1 scales to between 90 % and 110 %
    translate: float = 0.0  # maximum shift in pixels, which unlike `crop_padding` may be fractional
    auto_augment: Literal["none", "trivial"] = "none"  # TrivialAugment, Müller and Hutter 2021
    random_erasing: float = 0.0  # probability; Zhong et al. 2020, filled with the mean color

    def __post_init__(self) -> None:
        constants.check_choices(self)
        for name in ("rrc_min_area", "random_erasing", "scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name.upper()}={getattr(self, name)} must be between 0 and 1")
        for name in ("crop_padding", "rotate", "translate"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name.upper()}={getattr(self, name)} must not be negative")

    def crop_size(self, img_size: int) -> int:
        """Side in pixels of the stored photographs from which random resized crops are cut.

        The smallest crop then has as many pixels as the model's input. The result is at most twice
        the input size, which limits disk use: at 224 pixels and areas from 30 %, a photograph takes
        0.5 MB. Returns 0 without random resized crops.
        """
        if not self.rrc_min_area:
            return 0
        return min(2 * img_size, math.ceil(img_size / math.sqrt(self.rrc_min_area)))


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copies a tensor to a device, without waiting for the copy on CUDA.

    On MPS an asynchronous copy may read a temporary tensor after it has been freed, which silently
    corrupts the batch (pytorch issues 139550 and 189690).
    """
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


class BatchRNG:
    """Random numbers for a batch, one per image, drawn on the CPU and copied to the device.

    Each of `world` processes draws the numbers of the whole batch and keeps its own part, so an
    image is augmented in the same way for any number of processes.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        """`count`: the number of images in this process's part of the batch."""
        self._generator = torch.Generator().manual_seed(seed)
        self._total, self._part = count * world, slice(rank * count, (rank + 1) * count)
        self._device = device

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Floats in [low, high), (count,)."""
        values = torch.rand(self._total, generator=self._generator)[self._part]
        return to_device(low + (high - low) * values, self._device)

    def integers(self, high: int, on_cpu: bool = False) -> Tensor:
        """Integers in [0, high), int64 (count,)."""
        values = torch.randint(high, (self._total,), generator=self._generator)[self._part]
        return values if on_cpu else to_device(values, self._device)


def augment(
    images: Tensor,
    preprocess: Preprocess,
    augmentation: Augmentation,
    rng: BatchRNG,
    aspect_ratios: Tensor | None = None,
) -> Tensor:
    """Crops, flips, rotates, scales, translates and recolors a batch.

    Random erasing comes after normalization: see `erase`. Without a random resized crop, images
    are resized and cropped as for evaluation.

    Args:
        images: uint8, (B, C, H, H).
        aspect_ratios: width / height of the originals, (B,), if they were resized to squares;
            None if the aspect ratio was kept.

    Returns: floats in [0, 1], (B, C, S, S), S = `preprocess.img_size`.
    """
    size, padding = preprocess.img_size, augmentation.crop_padding
    flip = rng.uniform() < 0.5 if augmentation.flip else None
    if padding or (flip is not None and not augmentation.rrc_min_area):
        dx, dy = (rng.integers(2 * padding + 1) for _ in range(2))
        images, flip = _shift(images, padding, dx, dy, flip), None
    if augmentation.rrc_min_area:
        theta = _crop_boxes(rng, augmentation.rrc_min_area, flip, aspect_ratios)
        # Bilinear sampling reads 2 x 2 pixels, which alone would alias when it shrinks by more.
        scale = 2 if images.shape[-1] > 1.5 * size else 1
        x = F.avg_pool2d(_warp(images.float() / 255, theta, size * scale), scale)
    else:
        x = preprocess.center_crop(images)
    if augmentation.rotate or augmentation.scale or augmentation.translate:
        angle = rng.uniform(-augmentation.rotate, augmentation.rotate) * (math.pi / 180)
        scale = rng.uniform(1 - augmentation.scale, 1 + augmentation.scale)
        theta = _rotation(angle) / scale[:, None, None]
        # Coordinates run from -1 to 1, so one pixel is 2 / size.
        limit = 2 * augmentation.translate / size
        theta[:, :, 2] = torch.stack([rng.uniform(-limit, limit) for _ in range(2)], 1)
        x = _warp(x, theta, size)
    return _trivial_augment(x, rng) if augmentation.auto_augment == "trivial" else x


def erase(x: Tensor, probability: float, rng: BatchRNG) -> Tensor:
    """Random erasing: sets a rectangle of normalized images (B, C, H, W) to 0, the mean color.

    The rectangle covers 2 % to 33 % of the image; its aspect ratio is between 0.3 and 3.3.
    """
    H, W = x.shape[-2:]
    erased = rng.uniform() < probability
    area, ratio = rng.uniform(0.02, 1 / 3), rng.uniform(math.log(0.3), math.log(3.3)).exp()
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    top, left = rng.uniform() * (1 - height), rng.uniform() * (1 - width)
    row = (torch.arange(H, device=x.device) + 0.5) / H
    column = (torch.arange(W, device=x.device) + 0.5) / W
    rows = (row >= top[:, None]) & (row < (top + height)[:, None]) & erased[:, None]  # (B, H)
    columns = (column >= left[:, None]) & (column < (left + width)[:, None])  # (B, W)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


# --- Geometry: theta (B, 2, 3) are affine maps as in torch's `affine_grid` -----------------------


def _shift(images: Tensor, padding: int, dx: Tensor, dy: Tensor, flip: Tensor | None) -> Tensor:
    """Pads (B, C, H, W) with zeros, crops H x W at (dy, dx), and flips images where `flip`."""
    B, C, H, W = images.shape
    device = images.device
    rows = dy[:, None] + torch.arange(H, device=device)  # (B, H)
    columns = torch.arange(W, device=device).expand(B, W)
    if flip is not None:
        columns = torch.where(flip[:, None], W - 1 - columns, columns)
    columns = dx[:, None] + columns  # (B, W)
    padded = F.pad(images, (padding, padding, padding, padding))
    b = torch.arange(B, device=device)[:, None, None, None]
    c = torch.arange(C, device=device)[None, :, None, None]
    return padded[b, c, rows[:, None, :, None], columns[:, None, None, :]]


def _crop_boxes(
    rng: BatchRNG, min_area: float, flip: Tensor | None, aspect_ratios: Tensor | None = None
) -> Tensor:
    """Inception crops: area in [min_area, 1], aspect ratio in [3/4, 4/3]; theta (B, 2, 3)."""
    area = rng.uniform(min_area, 1)
    ratio = torch.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    if aspect_ratios is not None:  # in the resized image, the crop has a different aspect ratio
        ratio = ratio / aspect_ratios
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    x = (rng.uniform(-1, 1)) * (1 - width)  # center of the crop, in [-1, 1]
    y = (rng.uniform(-1, 1)) * (1 - height)
    if flip is not None:
        width = torch.where(flip, -width, width)
    zero = torch.zeros_like(width)
    return torch.stack([width, zero, x, zero, height, y], 1).reshape(-1, 2, 3)


def _rotation(angle: Tensor) -> Tensor:
    """Rotations about the center by `angle` (B,), in radians; theta (B, 2, 3)."""
    sin, cos, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3)


def _warp(x: Tensor, theta: Tensor, size: int | None = None) -> Tensor:
    """Applies affine maps to (B, C, H, W), bilinear, with zeros outside of the image."""
    B, C, H, W = x.shape
    grid = F.affine_grid(theta, [B, C, size or H, size or W], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- TrivialAugment: one operation per image with a magnitude m in [0, 1] and a sign -------------

_OPERATIONS = (
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize", "identity",
)  # fmt: skip


def _trivial_augment(x: Tensor, rng: BatchRNG) -> Tensor:
    """TrivialAugmentWide: one of 14 operations per image of (B, C, H, W) in [0, 1]."""
    choice = rng.integers(len(_OPERATIONS), on_cpu=True)
    m = rng.integers(31, on_cpu=True) / 30
    sign = rng.integers(2, on_cpu=True) * 2.0 - 1
    return _apply_operations(x, choice, m, sign)


def _apply_operations(x: Tensor, choice: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    """Applies to each image the operation with the number `choice`.

    Choices and magnitudes are on the CPU, so a GPU never has to wait for them. Images are sorted by
    operation: each operation then works on a slice, the five geometric ones share one warp, and the
    four that blend two images share one blend. This halves the number of kernels.
    """
    order = choice.argsort(stable=True)
    choice, m, sign = choice[order], m[order], sign[order]
    on_device = to_device(order, x.device)
    x = x[on_device]
    counts = choice.bincount(minlength=len(_OPERATIONS)).tolist()
    parts = []
    start = 0
    for first, last, operation in _GROUPS:
        end = start + sum(counts[first : last + 1])
        if start < end:
            rows = slice(start, end)
            parts.append(operation(x[rows], choice[rows] - first, m[rows], sign[rows]))
        start = end
    out = torch.empty_like(x)
    out[on_device] = torch.cat(parts)
    return out


def _geometric(x: Tensor, kind: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    """Shears by up to 0.99 about the top left corner, translates, or rotates by up to 135 degrees.

    Translation is by up to 32 pixels for any image size, as in TrivialAugmentWide.
    """
    H, W = x.shape[-2:]
    theta = _rotation(sign * m * (135 * math.pi / 180) * (kind == 4))
    shear, shift = sign * m * 0.99, -sign * (m * 32).floor() * 2
    for axis, (size, other) in enumerate([(W, H), (H, W)]):
        sheared = shear * (other / size) * (kind == axis)
        theta[:, axis, 1 - axis] += sheared
        theta[:, axis, 2] += sheared + shift / size * (kind == 2 + axis)
    return _warp(x, to_device(theta, x.device))


def _blend(x: Tensor, kind: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    """Brightness, color, contrast or sharpness, like Pillow's ImageEnhance.

    Each moves an image away from another one (positive sign) or towards it: from black, the
    grayscale image, its mean, or the smoothed image. `kind` is sorted.
    """
    others = torch.zeros_like(x)
    black, color, contrast, _ = kind.bincount(minlength=4).tolist()
    gray, smooth = slice(black, black + color + contrast), slice(black + color + contrast, None)
    if color + contrast:
        others[gray] = _grayscale(x[gray])
        means = others[black + color : black + color + contrast]
        means[:] = _grayscale(x[gray][color:]).mean((1, 2, 3), keepdim=True)
    if smooth.start < len(x):
        others[smooth] = _smooth(x[smooth])
    factor = to_device((1 + sign * m * 0.99)[:, None, None, None], x.device)
    return (factor * x + (1 - factor) * others).clamp(0, 1)


def _grayscale(x: Tensor) -> Tensor:
    """Luminance of RGB images, (B, 1, H, W), with torchvision's weights."""
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _smooth(x: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: the center has weight 5, its neighbors 1; the border is kept."""
    kernel = torch.ones(x.shape[1], 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    out = x.clone()
    if min(x.shape[-2:]) > 2:
        out[..., 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=x.shape[1])
    return out


def _posterize(x: Tensor, kind: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    """Keeps the highest 8 to 2 of the 8 bits."""
    step = to_device(2 ** (m * 6).round()[:, None, None, None], x.device)
    return ((x * 255).round() / step).floor() * step / 255


def _solarize(x: Tensor, kind: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    threshold = to_device((1 - m)[:, None, None, None], x.device)
    return torch.where(x >= threshold, 1 - x, x)


def _autocontrast(x: Tensor, *_: Tensor) -> Tensor:
    # torchvision takes a while to import, and only TrivialAugment needs it.
    from torchvision.transforms.v2.functional import autocontrast

    return autocontrast(x)


def _equalize(x: Tensor, *_: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(x)


_GROUPS = (  # first and last operation, and the function for them
    (0, 4, _geometric),
    (5, 8, _blend),
    (9, 9, _posterize),
    (10, 10, _solarize),
    (11, 11, _autocontrast),
    (12, 12, _equalize),
    (13, 13, lambda x, *_: x),
)
