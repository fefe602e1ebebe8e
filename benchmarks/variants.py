"""The models of the race: the ViT of model.py, and variants of it, which come from timm."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLU
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from lab.data import Loaders
from model import VisionTransformer, ViTConfig


class SquaredReLU(nn.Module):
    """relu(x) ** 2, elementwise. Source: So et al. 2021, "Primer"."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


# Arguments of timm's ViT. SwiGLU has three matrices instead of two, so its hidden width is 2/3.
MLPS = {
    "gelu": {"mlp_layer": Mlp, "act_layer": nn.GELU},
    "relu2": {"mlp_layer": Mlp, "act_layer": SquaredReLU},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 4 * 2 / 3},
}


class SkippedBlocks(nn.Sequential):
    """Blocks that are skipped in training, each with probability `rate`, by the whole batch.

    Unlike drop path, which decides for each image, this saves the time of the skipped blocks.
    """

    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if not (self.training and torch.rand((), device="cpu") < self.rate):
                x = block(x)
        return x


def build_model(c: SimpleNamespace, loaders: Loaders) -> nn.Module:
    """A ViT without a class token for images of the loaders' size, and for smaller ones.

    c: the constants of benchmarks/speedrun.py.
    """
    shape = {
        "img_size": loaders.preprocess.img_size, "patch_size": c.PATCH_SIZE,
        "embed_dim": c.EMBED_DIM, "depth": c.DEPTH, "num_heads": c.NUM_HEADS,
        "in_chans": loaders.data.channels, "num_classes": len(loaders.data.classes),
        "class_token": False, "global_pool": "avg", "dynamic_img_size": True,
    }  # fmt: skip
    if c.MLP == "gelu" and not (c.QK_NORM or c.REG_TOKENS or c.PATCH_DROP_RATE):
        model: nn.Module = VisionTransformer(ViTConfig(**shape))
    else:  # timm's ViT computes the same, and has these options
        model = TimmVisionTransformer(
            **shape, **MLPS[c.MLP], qk_norm=c.QK_NORM, reg_tokens=c.REG_TOKENS,
            no_embed_class=True, patch_drop_rate=c.PATCH_DROP_RATE,
        )  # fmt: skip
    if c.LAYER_DROP_RATE:
        model.blocks = SkippedBlocks(*model.blocks)
    return model


def set_dropping(model: nn.Module, c: SimpleNamespace, active: bool) -> None:
    """Drops patches and layers at the rates of `c`, or none."""
    if c.PATCH_DROP_RATE:
        model.patch_drop.prob = c.PATCH_DROP_RATE * active
    if c.LAYER_DROP_RATE:
        model.blocks.rate = c.LAYER_DROP_RATE * active
