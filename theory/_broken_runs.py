"""The measurements behind broken_recipes.md: pretrained weights, training and fine-tuning, broken.

python theory/_broken_runs.py pretrained             # about a minute on one CPU core
python theory/_broken_runs.py training               # about 10 minutes
python theory/_broken_runs.py forgetting --cifar data/cifar10-jpeg     # about 10 minutes

Each writes a record to theory/broken/, with five seeds for every mistake. The CIFAR-10 test images
are a folder test/<class>/*.jpg, or the name of the torchvision dataset, cifar10.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from _text import ROOT
from torch import Tensor, nn

from lab.core import runtime
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.finetuning import default_learning_rate
from lab.models import Pretrained, load_pretrained, registry
from lab.training import optimizers
from model import Attention, VisionTransformer, ViTConfig

RECORDS = ROOT / "theory" / "broken"
WEIGHTS = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
SEEDS = range(5)

# --- Pretrained weights, broken code: a linear classifier on the features of the frozen ViT ---

TRAIN_DIGITS = 600
RIDGE = 1.0  # strength of the penalty, on standardized features


def written_out(scale: float | None, axis: int) -> Callable[[Attention, Tensor], Tensor]:
    """`Attention.forward` of model.py written out, with what two mistakes change.

    Args:
        scale: the factor of the scores; None: 1 / sqrt(d), as in model.py.
        axis: of the softmax: -1 sums to one over the keys, -2 over the queries.
    """

    def forward(self: Attention, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        scores = (q @ k.transpose(-2, -1)) * (self.scale if scale is None else scale)
        out = scores.softmax(axis) @ v
        return self.proj(out.transpose(1, 2).reshape(B, N, D))

    return forward


def without_positions(self: VisionTransformer, x: Tensor) -> Tensor:
    """`VisionTransformer.embed` of model.py without the position embeddings."""
    x = self.patch_embed(x)
    return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


BROKEN_CODE: dict[str, tuple | None] = {  # what is replaced by what
    "intact": None,
    "no-scale": (Attention, "forward", written_out(1.0, -1)),
    "wrong-axis": (Attention, "forward", written_out(None, -2)),
    "no-positions": (VisionTransformer, "embed", without_positions),
    "pixels-not-normalized": None,
}


def broken(name: str) -> ExitStack:
    """A context in which model.py has this mistake."""
    stack = ExitStack()
    if replacement := BROKEN_CODE[name]:
        stack.enter_context(patch.object(*replacement))
    return stack


@torch.no_grad()
def features(pretrained: Pretrained, images: Tensor, normalized: bool = True) -> Tensor:
    """Features of the frozen ViT, (N, D), for uint8 images."""
    mean, std = (
        torch.tensor(v).reshape(1, -1, 1, 1)
        for v in (pretrained.preprocess.mean, pretrained.preprocess.std)
    )
    found = []
    for batch in images.split(128):
        x = pretrained.preprocess.center_crop(batch)
        x = (x - mean) / std if normalized else (255 * x).expand(-1, 3, -1, -1)
        found.append(registry.pooled_features(pretrained.model.eval(), x))
    return torch.cat(found)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression from features (N, D) onto one-hot labels (N,): mean, deviation, weights."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    a = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], dim=1).double()
    penalty = RIDGE * torch.eye(a.shape[1], dtype=a.dtype)
    return mean, std, torch.linalg.solve(a.T @ a + penalty, a.T @ F.one_hot(y).double())


def ridge_accuracy(fitted: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    mean, std, weights = fitted
    a = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], dim=1).double()
    return ((a @ weights).argmax(1) == y).double().mean().item()


def measure_pretrained() -> dict[str, Any]:
    """Test accuracy on digits with five draws of the training digits, for each mistake.

    `kept`: the classifier was fitted on intact features, and the mistake came later. `refitted`:
    the classifier was fitted on the features of the broken model.
    """
    data = load_data("digits")
    images = torch.cat([split.images(slice(None)) for split in (data.train, data.val, data.test)])
    labels = torch.cat([split.labels for split in (data.train, data.val, data.test)])
    pretrained = load_pretrained(str(WEIGHTS))
    found = {}
    for name in BROKEN_CODE:
        with broken(name):
            found[name] = features(pretrained, images, name != "pixels-not-normalized")
    accuracies: dict[str, dict] = {
        kind: {name: [] for name in found} for kind in ("kept", "refitted")
    }
    for seed in SEEDS:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
        intact = ridge(found["intact"][train], labels[train])
        for name, x in found.items():
            for kind, fitted in (("kept", intact), ("refitted", ridge(x[train], labels[train]))):
                accuracies[kind][name].append(ridge_accuracy(fitted, x[test], labels[test]))
    return {
        "train_images": TRAIN_DIGITS,
        "test_images": len(images) - TRAIN_DIGITS,
        "test_accuracy": rounded(accuracies),
    }


# --- Training from scratch with mistakes that students make ---

TITLES = {
    "healthy": "healthy",
    "double-softmax": "softmax before cross-entropy",
    "no-zero-grad": "missing zero_grad()",
    "no-eval": "missing eval()",
    "shuffled-labels": "shuffled labels",
    "test-in-training": "test images in training",
    "no-warmup": "no warm-up",
    "high-rate": "learning rate too high",
    "wrong-normalization": "other mean and std in testing",
}
IN_EVALUATION = ("healthy", "no-eval", "wrong-normalization")  # they share the trained weights
EPOCHS, BATCH_SIZE, LEARNING_RATE, WARMUP, WEIGHT_DECAY = 50, 128, 2e-3, 0.1, 0.05
HIGH_RATE = 10  # times LEARNING_RATE
LABEL_SMOOTHING = 0.1
OTHER_MEAN, OTHER_STD = 0.449, 0.226  # ImageNet's, averaged over the colors
AUGMENTATION = Augmentation(rotate=10, scale=0.1, translate=0.5)


def train(mistake: str, seed: int) -> dict[str, dict[str, Any]]:
    """Trains a small ViT on digits with one mistake.

    Returns: by name of the mistake losses by epoch, and accuracies of the final weights on the test
        images and on images that were in no training set. A healthy run is also evaluated with the
        mistakes that concern only evaluation, and says what its training loss consists of.
    """
    data = load_data("digits", val_fraction=0.25)  # the validation split: images nobody uses
    if mistake == "test-in-training":
        data = replace(data, train=with_images(data.train, data.test))
    if mistake == "shuffled-labels":
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        data = replace(data, train=replace(data.train, labels=data.train.labels[order]))
    loaders = Loaders(data, Preprocess(8, data.mean, data.std), BATCH_SIZE, AUGMENTATION, seed)
    torch.manual_seed(seed)
    config = ViTConfig(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=4,
        drop_rate=0.1, drop_path_rate=0.1,
    )  # fmt: skip
    model = VisionTransformer(config)
    peak = LEARNING_RATE * (HIGH_RATE if mistake == "high-rate" else 1)
    optimizer = optimizers.adamw(model, peak, WEIGHT_DECAY)
    steps = EPOCHS * loaders.steps
    warmup_steps = 0 if mistake == "no-warmup" else round(WARMUP * steps)
    schedule = optimizers.Schedule(steps, warmup_steps, "cosine")
    evaluated = IN_EVALUATION if mistake == "healthy" else (mistake,)
    train_losses, test_losses = [], {name: [] for name in evaluated}

    for epoch in range(EPOCHS):
        model.train()
        losses = []
        for step, (images, labels) in enumerate(loaders.train(epoch), epoch * loaders.steps):
            torch.manual_seed(1000 * seed + step)  # equal dropout, whatever evaluation draws
            schedule.set_lr(optimizer, step)
            if mistake != "no-zero-grad":
                optimizer.zero_grad()
            logits = model(images)
            if mistake == "double-softmax":
                logits = logits.softmax(-1)
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        train_losses.append(np.mean(losses))
        for name in evaluated:
            test_losses[name].append(evaluate(model, loaders, "test", name)[0])
    records = {
        name: {
            "train_loss": train_losses,
            "test_loss": test_losses[name],
            "test_accuracy": evaluate(model, loaders, "test", name)[1],
            "unused_accuracy": evaluate(model, loaders, "val", name)[1],
        }
        for name in evaluated
    }
    if mistake == "healthy":
        records["healthy"]["final_loss"] = final_losses(model, loaders)
    return rounded(records)


def with_images(split: datasets.Split, other: datasets.Split) -> datasets.Split:
    """A split with the images of another one as well."""
    images = torch.cat([split.images(slice(None)), other.images(slice(None))])
    labels = torch.cat([split.labels, other.labels])
    return datasets.Split(images, torch.arange(len(images)), labels, split.names + other.names)


@torch.no_grad()
def evaluate(model: nn.Module, loaders: Loaders, split: str, mistake: str) -> tuple[float, float]:
    """Loss and accuracy on a split, with the mistakes that concern evaluation."""
    model.train(mistake == "no-eval")
    data = getattr(loaders.data, split)
    images = loaders.normalize(data.images(slice(None)))
    if mistake == "wrong-normalization":
        images = (images * loaders.std + loaders.mean - OTHER_MEAN) / OTHER_STD
    logits = model(images)
    if mistake == "double-softmax":
        logits = logits.softmax(-1)
    loss = F.cross_entropy(logits, data.labels).item()
    return loss, (logits.argmax(1) == data.labels).double().mean().item()


@torch.no_grad()
def final_losses(model: nn.Module, loaders: Loaders) -> dict[str, float]:
    """The loss of the final weights on the training images, taking one thing away after another."""
    found = {}
    for name, training, view, smoothing in (
        ("as in training", True, 1, LABEL_SMOOTHING),
        ("without dropout", False, 1, LABEL_SMOOTHING),
        ("without augmentation", False, 0, LABEL_SMOOTHING),
        ("without label smoothing", False, 0, 0.0),
    ):
        model.train(training)
        batches = loaders.evaluation("train", view)
        losses = [
            F.cross_entropy(model(x), y, label_smoothing=smoothing, reduction="none")
            for _, x, y in batches
        ]
        found[name] = torch.cat(losses).mean().item()
    return found


# --- Fine-tuning with a learning rate that is too high: what does the model forget? ---

FORGET_STEPS, FORGET_BATCH = 32, 16
FORGET_AT = (0, 1, 2, 4, 8, 16, 32)  # optimizer steps
RATES = {"usual": 1, "high": 10, "far too high": 100}  # times the usual rate of finetune.py
CIFAR_IMAGES = 300


def finetune_and_forget(factor: float, seed: int, cifar: Tensor, labels: Tensor) -> dict[str, Any]:
    """Fine-tunes the CIFAR-10 ViT on digits; what is left of its CIFAR-10 accuracy?

    The body is fine-tuned with a new head for digits. The old head is kept aside, unchanged, and
    put on the fine-tuned body to classify CIFAR-10 images.

    Args:
        factor: the learning rate, relative to the usual one.
        seed: of the new head, the order and the augmentation.
        cifar, labels: normalized CIFAR-10 images (N, 3, 32, 32) and their classes.
    """
    data = load_data("digits")
    pretrained = load_pretrained(str(WEIGHTS))
    old_head = pretrained.model.head
    torch.manual_seed(seed)
    pretrained.reset_classifier(data.classes)
    model = pretrained.model
    peak = factor * default_learning_rate(model, "full")
    augmentation = Augmentation(rotate=10, scale=0.1, translate=0.5)
    loaders = Loaders(data, pretrained.preprocess, FORGET_BATCH, augmentation, seed)
    optimizer = optimizers.adamw(model, peak, WEIGHT_DECAY, head_lr_mult=10)
    schedule = optimizers.Schedule(FORGET_STEPS, round(WARMUP * FORGET_STEPS), "cosine")
    batches = itertools.chain.from_iterable(loaders.train(epoch) for epoch in itertools.count())
    kept, losses = [], []

    def forgotten() -> None:
        model.eval()
        with torch.no_grad():
            correct = old_head(registry.pooled_features(model, cifar)).argmax(1) == labels
        kept.append(correct.double().mean().item())

    for step in range(FORGET_STEPS):
        if step in FORGET_AT:
            forgotten()
        model.train()
        images, targets = next(batches)
        schedule.set_lr(optimizer, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    forgotten()
    model.eval()
    with torch.no_grad():
        test = loaders.normalize(data.test.images(slice(None)))
        accuracy = (model(test).argmax(1) == data.test.labels).double().mean().item()
    return rounded({"cifar_accuracy": kept, "train_loss": losses, "test_accuracy": accuracy})


def rounded(record: Any) -> Any:
    """Numbers with five decimals, which keeps the records small."""
    if isinstance(record, dict):
        return {key: rounded(value) for key, value in record.items()}
    if isinstance(record, list):
        return [rounded(value) for value in record]
    return round(float(record), 5)


def measure_training() -> dict[str, Any]:
    runs: dict[str, list] = {name: [] for name in TITLES}
    for mistake, seed in itertools.product(TITLES, SEEDS):
        if mistake != "healthy" and mistake in IN_EVALUATION:
            continue
        for name, record in train(mistake, seed).items():
            runs[name].append(record)
            print(name, seed, record["test_accuracy"], record["unused_accuracy"], flush=True)
    return {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
            "high_rate": HIGH_RATE, "label_smoothing": LABEL_SMOOTHING, "runs": runs}  # fmt: skip


def measure_forgetting(cifar: str) -> dict[str, Any]:
    preprocess = load_pretrained(str(WEIGHTS)).preprocess
    data = load_data(cifar, size=32)
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    chosen = chosen[:CIFAR_IMAGES]
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    images = (preprocess.center_crop(data.test.images(chosen)) - mean) / std
    labels = data.test.labels[chosen]
    runs = {}
    for name, factor in RATES.items():
        runs[name] = [finetune_and_forget(factor, seed, images, labels) for seed in SEEDS]
        print(name, [run["cifar_accuracy"] for run in runs[name]], flush=True)
    return {"steps": list(FORGET_AT), "cifar_images": CIFAR_IMAGES, "rates": RATES, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pretrained", "training", "forgetting"])
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10: a folder or a dataset's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = runtime.provenance()
    measured = {
        "pretrained": measure_pretrained,
        "training": measure_training,
        "forgetting": lambda: measure_forgetting(options.cifar),
    }[options.what]()
    facts["command"] = f"python theory/_broken_runs.py {' '.join(sys.argv[1:])}"
    keep = ("command", "started", "commit", "versions", "hardware")
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{options.what}.json"
    path.write_text(json.dumps({key: facts[key] for key in keep} | measured, indent=1) + "\n")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    runtime.run_script(main)
