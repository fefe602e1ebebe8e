"""A residual CNN to compare a ViT with, and the search for one of the same size.

    images -> stem -> stages of residual blocks, each stage at half the resolution -> mean -> head

Source: He et al. 2016 (basic blocks); He et al. 2019, "Bag of tricks" (average pooling in the
shortcut, last normalisation starts at zero). Names follow timm's ResNets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.core import UserError
from model import ConfigError, DropPath, ViTConfig

SMALL = 64  # pixels: up to here the stem keeps the resolution
CLOSE = 0.01  # how far the size of a twin may be from the ViT's


@dataclass(frozen=True)
class CNNConfig:
    """The shape of a ResidualCNN. Raises ConfigError."""

    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (64, 128, 256)  # channels of each stage
    blocks: int = 2  # residual blocks of a stage
    stem_stride: int = 1  # pixels a step of the first convolution: 1 for small images, else 4
    drop_rate: float = 0.0  # dropout in front of the head
    drop_path_rate: float = 0.0  # of the last block; block i of n drops i / (n - 1) of it

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))  # JSON gives a list
        for name in ("in_chans", "num_classes", "blocks", "stem_stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.dims or min(self.dims) < 1:
            raise ConfigError(f"dims={self.dims} must be channels of one stage or more")


class ResidualBlock(nn.Module):
    """x + two 3 x 3 convolutions, (B, C, H, W) -> (B, D, H / stride, W / stride)."""

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()
        self.drop_path = DropPath(drop_path)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_dim != dim:
            pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            conv = nn.Conv2d(in_dim, dim, 1, bias=False)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act(self.downsample(x) + self.drop_path(y))


class ResidualCNN(nn.Module):
    """The whole model: images (B, C, H, W), normalised, to logits (B, num_classes)."""

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = config
        step = config.stem_stride
        kernel, pad = (3, 1) if step == 1 else (step, 0)  # a stride over all pixels, or patches
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, config.dims[0], kernel, step, pad, bias=False),
            nn.BatchNorm2d(config.dims[0]),
            nn.ReLU(),
        )
        total = len(config.dims) * config.blocks
        rates = iter(torch.linspace(0, config.drop_path_rate, total, device="cpu").tolist())
        self.layers = nn.Sequential()
        in_dim = config.dims[0]
        for stage, dim in enumerate(config.dims):
            blocks = []
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                blocks.append(ResidualBlock(in_dim, dim, stride, next(rates)))
                in_dim = dim
            self.layers.append(nn.Sequential(*blocks))
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(in_dim, config.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions as He et al. 2015; each block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.bn2.weight)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Its layers in timm's language: the stem, every block, the head."""
        return {"stem": r"^stem", "blocks": r"^layers\.(\d+)\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last feature map (B, D, rows, columns)."""
        return self.layers(self.stem(x))

    def forward_head(self, features: Tensor) -> Tensor:
        """A feature map to logits (B, num_classes), by its mean over places."""
        return self.head(self.head_drop(features.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def matched_cnn(
    vit: ViTConfig, target: int, match: Literal["params", "macs"]
) -> tuple[CNNConfig, int]:
    """A CNN with a ViT's number of parameters, or multiply-adds, within 1 %, and that number.

    Stages are twice as wide as the one before, as far as whole numbers of channels allow: the
    width is found by bisection, then the stages, widest first, grow as far as the target allows.

    Raises: UserError, if there is none.
    """
    small = vit.img_size <= SMALL
    ratio = (1, 2, 4) if small else (1, 2, 4, 8)
    shape = {
        "in_chans": vit.in_chans, "num_classes": vit.num_classes, "stem_stride": 1 if small else 4,
        "drop_rate": vit.drop_rate, "drop_path_rate": vit.drop_path_rate,
    }  # fmt: skip

    def size(dims: Sequence[int]) -> int:
        with torch.device("meta"):  # counted without memory or arithmetic
            model = ResidualCNN(CNNConfig(dims=tuple(dims), **shape)).eval()
            if match == "params":
                return sum(p.numel() for p in model.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.zeros(1, vit.in_chans, vit.img_size, vit.img_size))
        return counter.get_total_flops() // 2

    width = bisect(lambda w: size([w * r for r in ratio]) <= target)
    dims = [width * r for r in ratio]
    for i in reversed(range(len(dims))):
        while dims[i] < (width + 1) * ratio[i] and size(wider(dims, i)) <= target:
            dims = wider(dims, i)
    # Narrow stages grow in coarse steps: if that is not close enough, all are tried together, the
    # least changed widths first.
    around = product(*(range(max(1, dim - 2), dim + 3) for dim in dims))

    def change(widths: tuple[int, ...]) -> float:
        return sum(abs(w - d) / r for w, d, r in zip(widths, dims, ratio, strict=True))

    for widths in sorted(around, key=change):
        found = size(widths)
        if abs(found / target - 1) <= CLOSE:
            return CNNConfig(dims=widths, **shape), found
    raise UserError(f"no CNN of this kind comes within 1 % of {target:,} {match}: near it, the "
                    "whole channels of its stages are too coarse. Take a larger ViT")  # fmt: skip


def wider(dims: list[int], stage: int) -> list[int]:
    """The same widths with one more channel in a stage."""
    return [dim + (i == stage) for i, dim in enumerate(dims)]


def bisect(fits: Callable[[int], bool]) -> int:
    """The largest whole number of at least 1 that fits; 1 if none does."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
