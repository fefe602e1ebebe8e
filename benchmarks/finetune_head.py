"""Training the head on cached features, compared with training it through the frozen model.

    python -m benchmarks.finetune_head              # our small weights on digits: about 6 minutes
    python -m benchmarks.finetune_head --pretrained vit_base_patch16_224.augreg_in21k --dataset pets

Three libraries train the head of the same frozen model, from zeros, with the same images, batch
size and AdamW:

- ours: what finetune.py --mode head does for one learning rate and one weight decay. It computes
  the features of every image once, then trains the head on them.
- timm: a forward pass of the frozen model in every epoch, with its loader and the loop of its
  train.py.
- transformers: the same with ViTForImageClassification and Trainer.

Only training is timed, not validation and testing, which are the same for all. The libraries
alternate in one process.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Literal

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torchvision.transforms import v2

import finetune
from benchmarks import libraries, table
from benchmarks.timing import alternate, seconds
from lab.core import Run, constants, runtime
from lab.data import Augmentation, Loaders, load_data
from lab.finetuning import cached_features
from lab.finetuning.linear_probe import Backbone
from lab.models import load_pretrained
from lab.training import FitConfig, Predictions, fit, optimizers, predict
from model import VisionTransformer

# --- What is measured ---
PRETRAINED: str = "weights/vit_128x6_cifar10.safetensors"  # as in finetune.py, but a plain ViT
IMG_SIZE: int | None = None  # pixels; None: the size that the weights were trained at
DATASET: str = "digits"  # as in finetune.py
DATA_DIR: str = "data"  # folder for downloads
LIBRARIES: str = "ours,timm,transformers"  # in the order of the table
# --- Training ---
EPOCHS: int = 10  # passes over the training images
BATCH_SIZE: int = 64  # images per step
LEARNING_RATE: float = 3e-2  # peak learning rate of AdamW; the rest is as in finetune.py
WEIGHT_DECAY: float = 0.0  # of the head's weights
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 in hardware
# --- How it is measured ---
REPEATS: int = 5  # measurements with different seeds, after one that does not count
WORKERS: int | None = None  # processes of the others' DataLoaders; None: one per core, at most 16
OUT: str = "benchmarks/local/finetune_head-{device}.md"  # where the table goes; empty: nowhere

# A library's preparation, which is not timed. It returns what is timed, which returns the head.
Training = Callable[[], nn.Module]


def ours(model: VisionTransformer, loaders: Loaders, recipe: libraries.Recipe) -> Training:
    precision = recipe.precision.replace("fp32", "no")

    def train() -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            features, _ = cached_features(model, "", loaders, 0, Path(folder), precision)
            optimizer = optimizers.adamw(model.head, recipe.learning_rate, recipe.weight_decay)
            config = FitConfig(recipe.epochs, recipe.warmup_fraction, clip_grad=recipe.clip_grad,
                               precision=recipe.precision, trial=True)  # fmt: skip
            fit(model.head, optimizer, features, config, Run(Path(folder)))
        return model.head

    return train


def in_timm(model: VisionTransformer, loaders: Loaders, recipe: libraries.Recipe) -> Training:
    device, how, train = loaders.device, loaders.preprocess, loaders.data.train
    size = (len(how.mean), how.img_size, how.img_size)
    kwargs = {"mean": how.mean, "std": how.std, "crop_pct": how.crop_pct,
              "interpolation": how.interpolation}  # fmt: skip
    images = libraries.Images(train.images(slice(None)), train.labels)
    batches = timm.data.create_loader(
        images, size, recipe.batch_size, is_training=True, no_aug=True, num_workers=recipe.workers,
        pin_memory=device.type == "cuda", device=device, **kwargs,
    )  # fmt: skip
    # No library augments: training images are preprocessed like test images.
    images.transform = timm.data.create_transform(size, use_prefetcher=True, **kwargs)
    other = libraries.timm_model(model.config, model.state_dict()).to(device)
    other.requires_grad_(False).head.requires_grad_(True)
    epoch = libraries.timm_epoch(other, batches, recipe)

    def train_head() -> nn.Module:
        for _ in range(recipe.epochs):
            epoch()
        return other.head

    return train_head


def in_transformers(
    model: VisionTransformer, loaders: Loaders, recipe: libraries.Recipe
) -> Training:
    how, train = loaders.preprocess, loaders.data.train
    transform = v2.Compose([
        v2.Resize(how.resized, v2.InterpolationMode(how.interpolation)),
        v2.CenterCrop(how.img_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(how.mean, how.std),
    ])  # fmt: skip
    other = libraries.transformers_model(model.config, model.state_dict())
    other.requires_grad_(False).classifier.requires_grad_(True)
    images = libraries.Images(train.images(slice(None)), train.labels, transform)
    folder = tempfile.TemporaryDirectory()
    trainer = libraries.transformers_trainer(other, images, recipe, folder.name)

    def train_head() -> nn.Module:
        with folder:
            trainer.train()
        return other.classifier

    return train_head


PREPARE = {"ours": ours, "timm": in_timm, "transformers": in_transformers}


def main() -> None:
    constants.override(sys.modules[__name__])
    names, notes = table.installed_libraries(LIBRARIES.split(","), PREPARE)
    pretrained = load_pretrained(PRETRAINED, IMG_SIZE, plain_only=True)
    preprocess = pretrained.preprocess
    data = load_data(DATASET, DATA_DIR, preprocess.resized, interpolation=preprocess.interpolation)
    pretrained.reset_classifier(data.classes)
    model = pretrained.model
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)

    workers = min(os.cpu_count() or 1, 16) if WORKERS is None else WORKERS
    precision = FitConfig(1, precision=PRECISION).mixed_precision.replace("no", "fp32")
    one = data.val.select(torch.arange(len(data.val)) == 0)  # replaces what is not timed
    loaders = Loaders(replace(data, val=one, test=one), preprocess, BATCH_SIZE, Augmentation())
    loaders.to(runtime.process_state().device)
    recipe = libraries.Recipe(
        EPOCHS, loaders.steps, loaders.batch_size, LEARNING_RATE, WEIGHT_DECAY,
        finetune.WARMUP_FRACTION, finetune.CLIP_GRAD, precision, workers,
    )  # fmt: skip
    heads: dict[str, list[nn.Module]] = {name: [] for name in names}

    def measure(name: str) -> float:
        seed = len(heads[name])
        torch.manual_seed(seed)
        train = PREPARE[name](copy.deepcopy(model), replace(loaders, seed=seed), recipe)
        return seconds(lambda: heads[name].append(train()), loaders.device.type)

    times = alternate({name: lambda name=name: measure(name) for name in names}, REPEATS)
    rows = table.compare(f"head-only fine-tuning, {EPOCHS} epochs", times, table.OURS, names)
    accelerator = Accelerator(mixed_precision=precision.replace("fp32", "no"))
    loaders = replace(loaders, data=data)
    loaders.to(accelerator.device)
    backbone = Backbone(model.eval().to(accelerator.device))
    features = predict(backbone, loaders, "test", accelerator)
    for name in names:
        logits = [head.cpu().float()(features).detach() for head in heads[name][1:]]
        accuracies = [100 * Predictions(x, data.test.labels).accuracy for x in logits]
        notes.append(f"{name}: mean test accuracy {mean(accuracies):.2f} %.")
    title = (
        f"The head of {Path(PRETRAINED).stem}, {preprocess.img_size} pixels, trained on {data.name}"
        f": {EPOCHS} epochs of {len(data.train):,} images, batch {BATCH_SIZE}, {precision}, "
        f"DataLoaders with {workers} workers; medians of {REPEATS} repeats."
    )
    table.save(OUT, title, rows, notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)
