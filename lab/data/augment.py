"""Augmentation of whole batches on the device where they train, each image with its own draw.

torchvision's transforms draw once for a batch, or work image by image on the CPU; here every image
of a batch gets its own parameters and the arithmetic is one call for all of them. What an
operation does is torchvision's definition, tested against it (tests/test_augment.py). All draws
come from one CPU generator, so that the same seed gives the same batch on any device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lab.core import UserError
from lab.data.preprocess import Preprocess


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image. Nothing, by default."""

    crop_padding: int = 0  # pixels: crop at random from the image padded by so much
    rrc_min_area: float = 0.0  # crop this share of the area or more and resize it; 0: off
    flip: bool = False  # left and right; never for digits or letters
    rotate: float = 0.0  # degrees to either side
    scale: float = 0.0  # 0.1: between 90 % and 110 % of the size
    translate: float = 0.0  # pixels to every side, in fractions too, unlike `crop_padding`
    auto_augment: Literal["none", "trivial"] = "none"  # TrivialAugment, Mueller and Hutter 2021
    random_erasing: float = 0.0  # probability of a rectangle of mean colour, Zhong et al. 2020

    def __post_init__(self) -> None:
        for name in ("rrc_min_area", "random_erasing", "scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name.upper()}={getattr(self, name)} must lie between 0 and 1")
        for name in ("crop_padding", "rotate", "translate"):
            if getattr(self, name) < 0:
                raise UserError(f"{name.upper()}={getattr(self, name)} cannot be negative")


def augment(images: Tensor, to: Preprocess, how: Augmentation, draw: "BatchRNG") -> Tensor:
    """uint8 images (B, C, H, W) to augmented floats in [0, 1], (B, C, S, S), S = `to.img_size`.

    Without random crops an image is resized and cut as for evaluation.
    """
    size = to.img_size
    flip = draw.uniform() < 0.5 if how.flip else None
    if how.crop_padding or (flip is not None and not how.rrc_min_area):
        dx, dy = (draw.integers(2 * how.crop_padding + 1) for _ in range(2))
        images, flip = shift(images, how.crop_padding, dx, dy, flip), None
    if how.rrc_min_area:
        x = warp(images.float() / 255, crop_boxes(draw, how.rrc_min_area, flip), size)
    else:
        x = center_crop(images, to)
    if how.rotate or how.scale or how.translate:
        angle = draw.uniform(-how.rotate, how.rotate) * (math.pi / 180)
        scale = draw.uniform(1 - how.scale, 1 + how.scale)
        maps = rotation(angle) / scale[:, None, None]
        # A pixel is 2 / size of the coordinates, which run from -1 to 1.
        reach = 2 * how.translate / size
        maps[:, :, 2] = torch.stack([draw.uniform(-reach, reach) for _ in range(2)], 1)
        x = warp(x, maps, size)
    return trivial_augment(x, draw) if how.auto_augment == "trivial" else x


def center_crop(images: Tensor, to: Preprocess) -> Tensor:
    """What evaluation sees: uint8 (B, C, H, H) resized to `to.resized` pixels, of that the centre.

    Returns floats in [0, 1], (B, C, S, S), S = `to.img_size`.
    """
    size = [to.img_size, to.img_size]
    if images.shape[-1] == to.resized:
        return V.center_crop(images, size).float() / 255
    x, side = images.float() / 255, (to.resized, to.resized)
    x = F.interpolate(x, side, mode=to.interpolation, antialias=True).clamp_(0, 1)
    return V.center_crop(x, size)


class BatchRNG:
    """Random numbers, one for each image of a batch, from a CPU generator onto the device.

    Of `world` processes each draws for the whole batch and keeps its own share, so that an image
    meets the same fate however many processes there are.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        self.rng = torch.Generator().manual_seed(seed)
        self.total, self.mine = count * world, slice(rank * count, (rank + 1) * count)
        self.device = device

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(self.total, generator=self.rng)[self.mine]
        return (low + (high - low) * values).to(self.device, non_blocking=True)

    def integers(self, high: int, on_cpu: bool = False) -> Tensor:
        values = torch.randint(high, (self.total,), generator=self.rng)[self.mine]
        return values if on_cpu else values.to(self.device, non_blocking=True)


def shift(images: Tensor, pad: int, dx: Tensor, dy: Tensor, flip: Tensor | None) -> Tensor:
    """Crops (B, C, H, W) out of its zero-padded self at (dy, dx), then flips where told."""
    B, C, H, W = images.shape
    device = images.device
    rows = dy[:, None] + torch.arange(H, device=device)  # (B, H)
    columns = torch.arange(W, device=device).expand(B, W)
    if flip is not None:
        columns = torch.where(flip[:, None], W - 1 - columns, columns)
    columns = dx[:, None] + columns  # (B, W)
    padded = F.pad(images, (pad, pad, pad, pad))
    b = torch.arange(B, device=device)[:, None, None, None]
    c = torch.arange(C, device=device)[None, :, None, None]
    return padded[b, c, rows[:, None, :, None], columns[:, None, None, :]]


def crop_boxes(draw: BatchRNG, least: float, flip: Tensor | None) -> Tensor:
    """Maps (B, 2, 3) of Inception-style crops: area in [least, 1], aspect ratio in [3/4, 4/3]."""
    area = draw.uniform(least, 1)
    ratio = torch.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide = (area * ratio).sqrt().clamp(max=1)
    high = (area / ratio).sqrt().clamp(max=1)
    x = (draw.uniform(-1, 1)) * (1 - wide)  # centre of the crop, in [-1, 1] coordinates
    y = (draw.uniform(-1, 1)) * (1 - high)
    if flip is not None:
        wide = torch.where(flip, -wide, wide)
    zero = torch.zeros_like(wide)
    return torch.stack([wide, zero, x, zero, high, y], 1).reshape(-1, 2, 3)


def rotation(angle: Tensor) -> Tensor:
    """Maps (B, 2, 3) that turn an image by `angle` (B,), in radians, about its centre."""
    sin, cos, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3)


def warp(x: Tensor, maps: Tensor, size: int | None = None) -> Tensor:
    """Samples (B, C, H, W) bilinearly where `maps` (B, 2, 3) send each output pixel; zeros outside.

    Coordinates run from -1 to 1 over the image, as for torch's `affine_grid`.
    """
    B, C, H, W = x.shape
    grid = F.affine_grid(maps, [B, C, size or H, size or W], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- TrivialAugment: one operation an image, its strength uniform; strengths m lie in [0, 1) ----


def trivial_augment(x: Tensor, draw: BatchRNG) -> Tensor:
    """TrivialAugmentWide: one of its 14 operations for each image of (B, C, H, W) in [0, 1].

    The draw stays on the CPU until the groups are known, so that no GPU has to wait for it.
    """
    which = draw.integers(len(OPERATIONS) + 1, on_cpu=True)  # the one beyond is the identity
    strength = draw.integers(31) / 30
    sign = draw.integers(2) * 2.0 - 1
    out = x.clone()
    for number, operation in enumerate(OPERATIONS):
        rows = (which == number).nonzero()[:, 0].to(x.device, non_blocking=True)
        if len(rows):
            out[rows] = operation(x[rows], strength[rows], sign[rows])
    return out


def shear(x: Tensor, m: Tensor, sign: Tensor, axis: int) -> Tensor:
    """Shear by up to 0.99, about the top left corner as torchvision has it."""
    H, W = x.shape[-2:]
    amount = sign * m * 0.99
    maps = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    ratio = H / W if axis == 0 else W / H
    maps[:, axis, 1 - axis] = maps[:, axis, 2] = amount * ratio
    return warp(x, maps)


def translate(x: Tensor, m: Tensor, sign: Tensor, axis: int) -> Tensor:
    """Moves by up to 32 pixels, whatever the size of the image, as TrivialAugmentWide does."""
    maps = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    maps[:, axis, 2] = -sign * (m * 32).floor() * 2 / x.shape[-1 - axis]
    return warp(x, maps)


def rotate(x: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    return warp(x, rotation(sign * m * (135 * math.pi / 180)))


def blend(x: Tensor, other: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    """Away from `other` (factor above 1) or towards it (below), as Pillow's enhancers do."""
    factor = (1 + sign * m * 0.99)[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def gray(x: Tensor) -> Tensor:
    return V.rgb_to_grayscale(x) if x.shape[1] == 3 else x


def blurred(x: Tensor) -> Tensor:
    """Pillow's smoothing: the centre counts 5, its eight neighbours 1; the border stays."""
    kernel = torch.ones(x.shape[1], 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    out = x.clone()
    if min(x.shape[-2:]) > 2:
        out[..., 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=x.shape[1])
    return out


def posterize(x: Tensor, m: Tensor) -> Tensor:
    """Keeps 8 to 2 of the 8 bits."""
    dropped = (m * 6).round()[:, None, None, None]
    step = 2**dropped
    return ((x * 255).round() / step).floor() * step / 255


def solarize(x: Tensor, m: Tensor) -> Tensor:
    return torch.where(x >= (1 - m)[:, None, None, None], 1 - x, x)


OPERATIONS = (
    lambda x, m, s: shear(x, m, s, 0),
    lambda x, m, s: shear(x, m, s, 1),
    lambda x, m, s: translate(x, m, s, 0),
    lambda x, m, s: translate(x, m, s, 1),
    rotate,
    lambda x, m, s: blend(x, torch.zeros_like(x), m, s),  # brightness
    lambda x, m, s: blend(x, gray(x), m, s),  # colour
    lambda x, m, s: blend(x, gray(x).mean((1, 2, 3), keepdim=True), m, s),  # contrast
    lambda x, m, s: blend(x, blurred(x), m, s),  # sharpness
    lambda x, m, s: posterize(x, m),
    lambda x, m, s: solarize(x, m),
    lambda x, m, s: V.autocontrast(x),
    lambda x, m, s: V.equalize(x),
)


def erase(x: Tensor, share: float, draw: BatchRNG) -> Tensor:
    """Random erasing on normalised images (B, C, H, W): a rectangle set to 0, the mean colour.

    Area in [0.02, 1/3] of the image and aspect ratio in [0.3, 3.3], for `share` of the images.
    """
    H, W = x.shape[-2:]
    hit = draw.uniform() < share
    area, ratio = draw.uniform(0.02, 1 / 3), draw.uniform(math.log(0.3), math.log(3.3)).exp()
    high, wide = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    top, left = draw.uniform() * (1 - high), draw.uniform() * (1 - wide)
    y = (torch.arange(H, device=x.device) + 0.5) / H
    x_ = (torch.arange(W, device=x.device) + 0.5) / W
    rows = (y >= top[:, None]) & (y < (top + high)[:, None]) & hit[:, None]  # (B, H)
    columns = (x_ >= left[:, None]) & (x_ < (left + wide)[:, None])  # (B, W)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
