"""Features of a frozen backbone, computed once and kept; a head trains on them in seconds.

Only the output layer is trained: on cached features, with a sweep over rate and weight decay.
"""

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.core import Run, UserError, checkpoints, runtime
from lab.data.augment import BatchRNG
from lab.data.loaders import Loaders, derive_seed
from lab.models.pretrained import classifier, pooled_features
from lab.models.profiling import profile_model
from lab.models.registry import save_model
from lab.training.config import FitConfig
from lab.training.evaluation import predict
from lab.training.loop import fit
from lab.training.optimizers import adamw
from lab.training.results import Predictions, write_results


class FeatureLoaders(Loaders):
    """Loaders whose batches are features (b, D), of the images that `loaders` would give.

    Args:
        loaders: of the images; order and seeds are theirs.
        features: `train` (views, N, D), `val` and `test` (N, D).
    """

    def __init__(self, loaders: Loaders, features: dict[str, Tensor]):
        self.features = features
        super().__init__(
            loaders.data, loaders.preprocess, loaders.batch_size, loaders.augmentation, loaders.seed
        )

    def to(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        super().to(device, rank, world)
        self.features = {split: value.to(device) for split, value in self.features.items()}
        self.labels = {s: getattr(self.data, s).labels.to(device) for s in self.features}

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches; each image shows one of its views, drawn anew every epoch."""
        views = len(self.features["train"])
        for step, index in enumerate(self.order(epoch, first_step), first_step):
            seed = derive_seed(self.seed, epoch, step)
            draw = BatchRNG(seed, len(index), self.device, self.rank, self.world)
            index = index.to(self.device)
            yield self.features["train"][draw.integers(views), index], self.labels["train"][index]

    def evaluation(self, split: str, view: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        mine = torch.arange(self.rank, len(self.labels[split]), self.world)
        for index in mine.split(8192):
            yield index, self.features[split][index], self.labels[split][index]


class Backbone(nn.Module):
    """A model up to what its output layer reads."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return pooled_features(self.model, images)


def cached_features(
    model: nn.Module, weights: str, loaders: Loaders, views: int, place: Path, precision: str
) -> tuple[FeatureLoaders, float]:
    """The features of all splits, from `place` where they were computed before.

    Args:
        model: on the CPU; its output layer plays no part.
        weights: fingerprint of the model's weights.
        loaders: the images, their transform and augmentation.
        views: augmented views of each training image; 0: one view, as evaluation sees it.
        place: a folder for the cache.
        precision: accelerate's word for it.

    Returns: loaders of features, and the seconds that computing them took.
    Raises: UserError, for a number of views that cannot be.
    """
    if views < 0:
        raise UserError(f"AUGMENT_VIEWS={views} must be 0 (no augmentation) or the number of views")
    accelerator = Accelerator(mixed_precision=precision)
    device, world = accelerator.device, accelerator.num_processes
    seen = {
        "weights": weights,
        "data": loaders.data.fingerprint,
        "preprocess": asdict(loaders.preprocess),
        "views": [views, asdict(loaders.augmentation), loaders.seed, world] if views else 0,
        "precision": [precision, device.type],
    }
    digest = hashlib.blake2b(json.dumps(seen, sort_keys=True).encode(), digest_size=8)
    path = place / f"features-{digest.hexdigest()}.safetensors"
    if path.exists():
        features, header = checkpoints.load_weights(path)
        return FeatureLoaders(loaders, features), header["seconds"]

    started = time.perf_counter()
    loaders.to(device, accelerator.process_index, world)
    backbone = Backbone(model.to(device))
    features = {s: predict(backbone, loaders, s, accelerator) for s in ("val", "test")}
    passes = range(1, views + 1) if views else [0]
    train = [predict(backbone, loaders, "train", accelerator, view) for view in passes]
    features["train"] = torch.stack(train)
    model.to("cpu")
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        checkpoints.save_weights(path, features, {**seen, "seconds": seconds})
    return FeatureLoaders(loaders, features), seconds


def train_linear_probe(
    model: nn.Module,
    loaders: FeatureLoaders,
    config: FitConfig,
    run: Run,
    sweep: tuple[list[float], list[float]],
    feature_seconds: float,
) -> None:
    """Trains one head for each rate and weight decay; validation chooses, the test split judges.

    Args:
        model: on the CPU, with the head to start from; in the end it has the chosen one.
        loaders: features of the frozen rest, and their labels.
        config: how each head is trained.
        run: the folder for the records; one that was stopped goes on with the heads left to do.
        sweep: rates, and weight decays.
        feature_seconds: what computing the features took, for the records.
    """
    data, start = loaders.data, classifier(model)
    if not isinstance(start, nn.Linear):
        raise UserError(f"the head is {type(start).__name__}, not linear: take MODE=top-k, TOP_K=1")
    main = runtime.process_state().is_main_process
    if main:
        width = start.in_features
        print(f"{data.describe()}\nfeatures of {width} numbers, {feature_seconds:.1f} s to compute")
    trials = []
    for rate, decay in itertools.product(*sweep):
        trial = Run(run.folder / "sweep" / f"rate{rate:g}-decay{decay:g}")
        trial.folder.mkdir(parents=True, exist_ok=True)
        head = copy.deepcopy(start)
        optimizer = adamw(head, rate, decay)
        rows = fit(head, optimizer, loaders, replace(config, trial=True), trial)
        best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
        trials.append((best["val_accuracy"], -best["val_loss"], trial, rows, best))
        if main:
            accuracy = 100 * best["val_accuracy"]
            print(f"rate {rate:g}, weight decay {decay:g}: validation {accuracy:.1f} %")
    *_, trial, rows, best = max(trials, key=lambda entry: entry[:2])
    path = trial.folder / "best.safetensors"
    checkpoints.load_strict(start, checkpoints.load_weights(path)[0], path)
    if not main:
        return
    logits = start(loaders.features["test"].cpu()).detach()
    save_model(run.folder / "best.safetensors", model, data.classes, loaders.preprocess, best)
    run.write_history(rows)
    extra = costs(model, loaders, [rows for *_, rows, _ in trials], feature_seconds)
    extra["chosen"] = trial.folder.name
    extra["sweep"] = {t.folder.name: accuracy for accuracy, _, t, *_ in trials}
    write_results(run, Predictions(logits, data.test.labels), data, rows, best["epoch"], extra)
    print(run.summary())


def costs(
    model: nn.Module, loaders: FeatureLoaders, histories: list[list[dict]], seconds: float
) -> dict:
    """Seconds and FLOPs of the features and all heads of the sweep together."""
    views, count, width = loaders.features["train"].shape
    head = profile_model(classifier(model), (width,))
    size = loaders.preprocess.img_size
    whole = profile_model(model, (len(loaders.preprocess.mean), size, size))
    seen = sum(row["images"] for rows in histories for row in rows)
    trained = sum(row["seconds"] for rows in histories for row in rows)
    return {
        "feature_seconds": round(seconds, 1),
        "sweep_seconds": round(trained, 1),
        "training_seconds": round(seconds + trained, 1),
        "training_flops": 2 * whole["macs"] * views * count + head["training_flops"] * seen,
    }
