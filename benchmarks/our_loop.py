"""This project's training loop on synthetic images, to be timed."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.libraries import Recipe
from lab.core import Run
from lab.data import Dataset, Loaders, datasets
from lab.training import FitConfig, loop, optimizers
from lab.training.state import TrainState


def synthetic_data(count: int, size: int, classes: int = 10) -> Dataset:
    """Random images (count, 3, size, size) and labels, in all three splits."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    split = datasets.full_split(
        images, torch.randint(classes, (count,), generator=rng), [str(i) for i in range(count)]
    )
    names = [str(i) for i in range(classes)]
    return Dataset("synthetic", names, split, split, split, [0.5] * 3, [0.5] * 3, [])


def training_epoch(
    model: nn.Module, loaders: Loaders, recipe: Recipe, compiled: bool = False
) -> Callable[[], None]:
    """An epoch of `lab.training.loop`; it writes nothing and can be repeated."""
    config = FitConfig(
        recipe.epochs, recipe.warmup_fraction, clip_grad=recipe.clip_grad,
        precision=recipe.precision, compile=compiled, trial=True,
    )  # fmt: skip
    optimizer = optimizers.adamw(model, recipe.learning_rate, recipe.weight_decay)
    trainer = loop.Trainer(model, optimizer, loaders, config, Run(Path()))

    def epoch() -> None:
        trainer.state = TrainState()
        loop.train_one_epoch(trainer)

    return epoch
