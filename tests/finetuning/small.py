"""A small ViT, loaders and run folders that the tests of fine-tuning share."""

import timm
import torch

from lab.core import Run
from lab.data import Augmentation, Loaders, Preprocess
from lab.models import profile_model
from lab.training import FitConfig
from model import VisionTransformer, ViTConfig

CONFIG = ViTConfig(
    img_size=8, patch_size=4, in_chans=3, num_classes=10, embed_dim=32, depth=3, num_heads=2
)
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 2),
        "num_heads": (1, 2), "num_classes": 10}  # fmt: skip
FP32 = FitConfig(epochs=3, warmup_fraction=0.1, precision="fp32")


def vit(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return VisionTransformer(config)


def timms_vit(config=CONFIG):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=config.embed_dim,
        depth=config.depth, num_heads=config.num_heads, num_classes=10,
    )  # fmt: skip


def open_run(folder, model, data, **constants):
    facts = {"model": profile_model(model, (3, 8, 8)), "dataset": data.summary()}
    return Run.open(folder, "run", constants, facts, overwrite=False)


def gray_loaders(data, augmentation=None, batch_size=64):
    return Loaders(data, Preprocess(8, [0.3] * 3, [0.4] * 3), batch_size,
                   augmentation or Augmentation())  # fmt: skip
