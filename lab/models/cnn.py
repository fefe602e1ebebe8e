"""A residual CNN to compare a ViT with, and the search for one of the same size.

    images -> stem -> stages of residual blocks, each at half the resolution -> mean -> head

Sources: He et al. 2016 (basic blocks); He et al. 2019, "Bag of tricks" (average pooling in the
shortcut, last batch norm starts at zero). Names follow timm's ResNets.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from lab.core import UserError
from model import ConfigError, DropPath, ViTConfig

_SMALL = 64  # pixels: up to this image size the stem keeps the resolution
TOLERANCE = 0.01  # maximum relative difference in size between a matched CNN and the ViT


@dataclass(frozen=True)
class CNNConfig:
    """The shape of a ResidualCNN. Raises ConfigError."""

    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (64, 128, 256)  # channels of each stage
    blocks: int = 2  # residual blocks per stage
    stem_stride: int = 1  # stride in pixels of the first convolution: 1 for small images, else 4
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # rate in the last block; increases linearly from 0 in the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))  # JSON gives a list
        for name in ("in_chans", "num_classes", "blocks", "stem_stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.dims or min(self.dims) < 1:
            raise ConfigError(f"dims={self.dims} must be at least one number of channels")


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
    """The whole model: normalized images (B, C, H, W) to logits (B, num_classes)."""

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = config
        step = config.stem_stride
        kernel, pad = (3, 1) if step == 1 else (step, 0)  # full resolution, or patches
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
        """Initializes convolutions as He et al. 2015 do; each block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.bn2.weight)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into layers, as in timm; the head is the last layer."""
        return {"stem": r"^stem", "blocks": r"^layers\.(\d+)\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last feature map (B, D, rows, columns)."""
        return self.layers(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A feature map to logits (B, num_classes), or with `pre_logits` to features (B, D)."""
        features = self.head_drop(x.mean((2, 3)))
        return features if pre_logits else self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def matched_cnn(
    vit: ViTConfig, target: int, match: Literal["params", "macs"]
) -> tuple[CNNConfig, int]:
    """A CNN whose number of parameters or multiply-adds matches a ViT's within 1 %.

    Each stage is about twice as wide as the one before. Bisection finds the width of the first;
    then the stages, widest first, grow channel by channel as far as the target allows.

    Args:
        vit: gives image size, channels, classes and drop rates.
        target: the number to match.
        match: what it counts.

    Returns: the config, and the number that its model has.
    Raises: UserError, if no CNN comes close enough.
    """
    small = vit.img_size <= _SMALL
    ratio = (1, 2, 4) if small else (1, 2, 4, 8)
    shape = {
        "in_chans": vit.in_chans, "num_classes": vit.num_classes, "stem_stride": 1 if small else 4,
        "drop_rate": vit.drop_rate, "drop_path_rate": vit.drop_path_rate,
    }  # fmt: skip

    def count(dims: Sequence[int]) -> int:
        parameters, macs = _size(CNNConfig(dims=tuple(dims), **shape), vit.img_size)
        return parameters if match == "params" else macs

    # The convolutions of the first stage alone have more than width^2 weights.
    tried = range(1, int(target**0.5) + 2)
    width = max(1, bisect_right(tried, target, key=lambda w: count([w * r for r in ratio])))
    dims = [width * r for r in ratio]
    for i in reversed(range(len(dims))):
        while dims[i] < (width + 1) * ratio[i] and count(_wider(dims, i)) <= target:
            dims = _wider(dims, i)
    # A channel of a narrow stage can be a large step. Try all widths nearby, closest first.
    nearby = product(*(range(max(1, dim - 2), dim + 3) for dim in dims))

    def change(widths: tuple[int, ...]) -> float:
        return sum(abs(w - d) / r for w, d, r in zip(widths, dims, ratio, strict=True))

    for widths in sorted(nearby, key=change):
        found = count(widths)
        if abs(found / target - 1) <= TOLERANCE:
            return CNNConfig(dims=widths, **shape), found
    raise UserError(
        f"no CNN of this kind matches {target:,} {match} to within 1 %, because at this size a "
        "single channel changes the number by more than 1 %. Use a larger ViT"
    )


def _size(config: CNNConfig, img_size: int) -> tuple[int, int]:
    """Parameters of a ResidualCNN, and its multiply-adds per image, without building it."""
    kernel = 3 if config.stem_stride == 1 else config.stem_stride
    side = img_size // config.stem_stride
    # Channels in and out, kernel, and height of the output in pixels.
    convolutions = [(config.in_chans, config.dims[0], kernel, side)]
    in_dim = config.dims[0]
    for stage, dim in enumerate(config.dims):
        side = -(-side // 2) if stage else side
        for block in range(config.blocks):
            convolutions += [(in_dim, dim, 3, side), (dim, dim, 3, side)]
            if in_dim != dim or (stage and not block):
                convolutions.append((in_dim, dim, 1, side))
            in_dim = dim
    head = in_dim * config.num_classes
    weights = [i * o * k**2 for i, o, k, _ in convolutions]
    batch_norms = sum(2 * o for _, o, _, _ in convolutions)
    parameters = sum(weights) + batch_norms + head + config.num_classes
    macs = sum(w * s**2 for w, (_, _, _, s) in zip(weights, convolutions, strict=True)) + head
    return parameters, macs


def _wider(dims: list[int], stage: int) -> list[int]:
    """The same widths with one more channel in one stage."""
    return [dim + (i == stage) for i, dim in enumerate(dims)]
