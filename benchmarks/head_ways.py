"""Ways to train the head of a frozen ViT: ours and others', on the same images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.transforms import v2

from benchmarks import peers
from lab.core import Run, runtime
from lab.data import Loaders
from lab.finetuning import cached_features
from lab.training import FitConfig, fit, optimizers
from model import VisionTransformer


@dataclass(frozen=True)
class Task:
    """What all ways are given."""

    model: VisionTransformer  # with a head of zeros, on the CPU; every way takes a copy
    loaders: Loaders  # of the training images, without augmentation
    recipe: peers.Recipe
    folder: Path  # for what a way writes

    def fit(self, model: nn.Module, loaders: Loaders) -> None:
        """As lab.finetuning.linear_probe trains one head: no test split, no pictures."""
        r = self.recipe
        how = FitConfig(r.epochs, r.warmup, clip_grad=r.clip_grad, trial=True,
                        precision="bf16" if r.bf16 else "fp32")  # fmt: skip
        optimizer = optimizers.adamw(model, r.learning_rate, r.weight_decay)
        fit(model, optimizer, loaders, how, Run(self.folder))

    def pictures(self, transform: Callable | None = None) -> peers.Pictures:
        train = self.loaders.data.train
        return peers.Pictures(train.images(slice(None)), train.labels, transform)


def freeze(model: nn.Module, head: nn.Module) -> None:
    model.requires_grad_(False)
    head.requires_grad_(True)


# Each way gets ready and returns what is timed, which returns the head, and the seconds that
# computing features took.
Work = Callable[[], tuple[nn.Module, float]]


def cached(task: Task) -> Work:
    model = copy.deepcopy(task.model)

    def work() -> tuple[nn.Module, float]:
        features, spent = cached_features(
            model, "the same", task.loaders, 0, task.folder, "bf16" if task.recipe.bf16 else "no"
        )
        task.fit(model.head, features)
        return model.head, spent

    return work


def uncached(task: Task) -> Work:
    model = copy.deepcopy(task.model)
    freeze(model, model.head)

    def work() -> tuple[nn.Module, float]:
        task.fit(model, task.loaders)
        return model.head, 0.0

    return work


def timms(task: Task) -> Work:
    device, how, pictures = runtime.process_state().device, task.loaders.preprocess, task.pictures()
    size = (len(how.mean), how.img_size, how.img_size)
    seen = {"mean": how.mean, "std": how.std, "crop_pct": how.crop_pct}
    seen["interpolation"] = how.interpolation
    batches = timm.data.create_loader(
        pictures, size, task.recipe.batch_size, is_training=True, no_aug=True,
        num_workers=task.recipe.workers, pin_memory=device.type == "cuda", device=device, **seen,
    )  # fmt: skip
    # Here no way augments: training images are seen as test images are.
    pictures.transform = timm.data.create_transform(size, use_prefetcher=True, **seen)
    model = peers.in_timm(task.model.config, task.model.state_dict()).to(device)
    freeze(model, model.get_classifier())
    epoch = peers.timm_training(model, batches, task.recipe)

    def work() -> tuple[nn.Module, float]:
        for _ in range(task.recipe.epochs):
            epoch()
        return model.get_classifier(), 0.0

    return work


def transformers(task: Task) -> Work:
    how = task.loaders.preprocess
    transform = v2.Compose([
        v2.Resize(how.resized, v2.InterpolationMode(how.interpolation)),
        v2.CenterCrop(how.img_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(how.mean, how.std),
    ])  # fmt: skip
    model = peers.in_transformers(task.model.config, task.model.state_dict())
    freeze(model, model.classifier)
    trainer = peers.transformers_trainer(
        model, task.pictures(transform), task.recipe, str(task.folder)
    )

    def work() -> tuple[nn.Module, float]:
        trainer.train()
        return model.classifier, 0.0

    return work


WAY = {"cached": cached, "uncached": uncached, "timm": timms, "transformers": transformers}
OURS = ("cached", "uncached")
