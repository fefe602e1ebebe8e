"""A small ViT, and a run that trains it, for the tests of training."""

import dataclasses

import torch

from lab.core import Run
from lab.data import Augmentation, Loaders, Preprocess
from lab.models import profile_model
from lab.training import FitConfig, fit, optimizers
from model import VisionTransformer, ViTConfig

CONFIG = ViTConfig(
    img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2
)
FP32 = FitConfig(epochs=2, warmup_fraction=0.2, precision="fp32")


def train(data, folder, config=FP32, augmentation=None, model_config=CONFIG):
    """Trains a small ViT on digits, or resumes. Returns: history, weights, the run's folder."""
    torch.manual_seed(0)
    model = VisionTransformer(model_config)
    facts = {"model": profile_model(model, (1, 8, 8)), "dataset": data.summary()}
    run = Run.open(folder, "run", dataclasses.asdict(config), facts, overwrite=False)
    preprocess = Preprocess(8, data.mean, data.std)
    loaders = Loaders(data, preprocess, 100, augmentation or Augmentation())
    history = fit(model, optimizers.adamw(model, 3e-3, 0.05), loaders, config, run)
    return history, last_state(run.folder)["model"], run.folder


def last_state(folder):
    """The state of a run in last.pt."""
    return torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
