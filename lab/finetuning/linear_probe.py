"""A linear probe: only the output layer is trained, on features of the frozen backbone.

The features are computed once and cached, so that a head takes seconds to train and several
learning rates and weight decays can be tried.
"""

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.core import Run, UserError, checkpoints, machine, runtime
from lab.data import Loaders
from lab.models import profile_model, registry, save_model
from lab.training import FitConfig, Predictions, fit, optimizers, predict, results


class FeatureLoaders(Loaders):
    """Batches of features (b, D) instead of images, in the order of `loaders`.

    Args:
        loaders: the loaders of the images, which also give seeds and batch size.
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
        """The batches of an epoch; one random view represents each image."""
        views = len(self.features["train"])
        order = self.epoch_indices(epoch, first_step)
        if order:  # one copy to the device per epoch, because each makes a GPU wait
            order = torch.stack(order).to(self.device)
        for step, index in enumerate(order, first_step):
            view = self.batch_rng(epoch, step, len(index)).integers(views)
            yield self.features["train"][view, index], self.labels["train"][index]

    def evaluation(
        self, split: str, view: int = 0, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        own = torch.arange(self.rank, len(self.labels[split]), self.world)
        for index in own[first:].split(8192):
            yield index, self.features[split][index], self.labels[split][index]


class Backbone(nn.Module):
    """A model without its output layer: images (B, C, H, W) to features (B, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return registry.pooled_features(self.model, images)


@dataclass(frozen=True)
class FeatureCosts:
    """What it cost to compute the features, maybe in an earlier run."""

    seconds: float
    peak_memory_mb: int | None  # None: not measured
    forward_passes: int  # of training images


def cached_features(
    model: nn.Module, weights: str, loaders: Loaders, views: int, cache_dir: Path, precision: str
) -> tuple[FeatureLoaders, FeatureCosts]:
    """The features of all splits, computed or read from the cache.

    Without augmentation, repeated training images (see `subsample`) are computed only once. One
    process that is interrupted resumes with the images that are left.

    The key of the cache is everything that determines the features, including the code (see
    `runtime.code_hashes`).

    Args:
        model: on the CPU; its output layer does not matter.
        weights: fingerprint of the model's weights.
        loaders: the images, their preprocessing and augmentation.
        views: augmented views per training image; 0: one view without augmentation.
        cache_dir: the folder of the cache.
        precision: Accelerate's name for it.

    Returns: loaders of the features, and what it cost to compute them.
    Raises: UserError, for a negative number of views, or too little memory.
    """
    if views < 0:
        raise UserError(f"AUGMENT_VIEWS={views} must be 0 (no augmentation) or the number of views")
    accelerator = runtime.make_accelerator(precision)
    device, world = accelerator.device, accelerator.num_processes
    key = {
        "code": runtime.code_hashes(Path(__file__)),
        "weights": weights,
        "data": loaders.data.fingerprint,
        "preprocess": asdict(loaders.preprocess),
        # The random numbers of a view depend on the batches.
        "views": [views, asdict(loaders.augmentation), loaders.seed, loaders.batch_size, world]
        if views
        else 0,
        "precision": [precision, device.type],
    }
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8)
    path = cache_dir / f"features-{digest.hexdigest()}.safetensors"
    if accelerator.is_main_process:
        print(loaders.data.describe(), flush=True)  # before the minutes that the features take
    rows = loaders.data.train.rows
    _, first, index = map(torch.from_numpy, np.unique(rows, return_index=True, return_inverse=True))
    if is_cached := path.exists():
        features, header = checkpoints.load_weights(path)
        seconds, peak_memory_mb = header["seconds"], header["peak_memory_mb"]
    else:
        if accelerator.is_main_process:
            print("computing the features of all images, which is done only once", flush=True)
        advice = f"Lower BATCH_SIZE (now {loaders.batch_size}) or use a smaller model."
        machine.reset_peak_memory(device)
        with checkpoints.explain_write_errors(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
        with runtime.explain_out_of_memory(advice):
            computed = copy.copy(loaders)
            if not views:
                computed.data = replace(loaders.data, train=loaders.data.train.select(first))
            computed.to(device, accelerator.process_index, world)
            features, seconds = _compute_features(model, computed, views, path, accelerator)
        peak_memory_mb = machine.peak_memory_mb(device)
        costs = {"seconds": seconds, "peak_memory_mb": peak_memory_mb}
        checkpoints.save_weights(path, features, {**key, **costs})
        for unfinished in cache_dir.glob(f"{path.stem}-*.unfinished"):
            unfinished.unlink(missing_ok=True)
    if accelerator.is_main_process:
        width = features["val"].shape[1]
        how = f"read from the cache {path}" if is_cached else f"computed in {seconds:.1f} s"
        print(f"{width} features per image, {how}", flush=True)
    costs = FeatureCosts(seconds, peak_memory_mb, features["train"].shape[:2].numel())
    if not views:
        features["train"] = features["train"][:, index]
    return FeatureLoaders(loaders, features), costs


def _compute_features(
    model: nn.Module, loaders: Loaders, views: int, path: Path, accelerator: Accelerator
) -> tuple[dict[str, Tensor], float]:
    """The features of all splits, and the seconds that they took.

    One process keeps unfinished features in files next to `path`, and resumes from them.
    """
    backbone = Backbone(model.to(accelerator.device))
    parts = [("val", 0), ("test", 0), *(("train", view) for view in range(1, views + 1) or [0])]
    files: dict[tuple[str, int], Path] = {}
    if accelerator.num_processes == 1:
        files = {
            (split, view): path.with_name(f"{path.stem}-{split}{view}.unfinished")
            for split, view in parts
        }
    headers = [checkpoints.load_weights(file)[1] for file in files.values() if file.exists()]
    started = time.perf_counter() - sum(header["seconds"] for header in headers)
    outputs = {
        (split, view): predict(
            backbone, loaders, split, accelerator, view, files.get((split, view))
        )
        for split, view in parts
    }
    model.to("cpu")
    features = {split: outputs[split, 0] for split in ("val", "test")}
    features["train"] = torch.stack([outputs[part] for part in parts[2:]])
    return features, time.perf_counter() - started


def train_linear_probe(
    model: nn.Module,
    loaders: FeatureLoaders,
    config: FitConfig,
    run: Run,
    sweep: tuple[list[float], list[float]],
    feature_costs: FeatureCosts,
) -> None:
    """Trains a head for each learning rate and weight decay; tests the best.

    The best head is the one with the highest validation accuracy.

    Args:
        model: on the CPU, with the head to start from; it ends up with the best head.
        loaders: features of the frozen backbone, and their labels.
        config: how to train each head.
        run: the folder for the records; a run that was stopped resumes with the remaining heads.
        sweep: learning rates, and weight decays.
        feature_costs: what it cost to compute the features, for the records.

    Raises: UserError, for a head that is not linear.
    """
    data, start = loaders.data, registry.classifier(model)
    if not isinstance(start, nn.Linear):
        raise UserError(
            f"MODE=head needs a linear head, but this model has {type(start).__name__}; use "
            "MODE=top-k with TOP_K=1"
        )
    is_main_process = runtime.process_state().is_main_process
    trials = []
    for rate, decay in itertools.product(*sweep):
        trial = Run(run.folder / "sweep" / f"rate{rate:g}-decay{decay:g}")
        trial.folder.mkdir(parents=True, exist_ok=True)
        head = copy.deepcopy(start)
        optimizer = optimizers.adamw(head, rate, decay)
        rows = fit(head, optimizer, loaders, replace(config, trial=True), trial)
        best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
        trials.append((best["val_accuracy"], -best["val_loss"], trial, rows, best))
        if is_main_process:
            print(
                f"learning rate {rate:g}, weight decay {decay:g}: validation accuracy "
                f"{100 * best['val_accuracy']:.1f} %"
            )
    *_, trial, rows, best = max(trials, key=lambda entry: entry[:2])
    path = trial.folder / "best.safetensors"
    checkpoints.load_strict(start, checkpoints.load_weights(path)[0], path)
    if not is_main_process:
        return
    logits = start(loaders.features["test"].cpu()).detach()
    save_model(run.folder / "best.safetensors", model, data.classes, loaders.preprocess, best)
    run.write_history(rows)
    extra = _costs(model, loaders, [rows for *_, rows, _ in trials], feature_costs)
    extra["chosen"] = trial.folder.name
    extra["sweep"] = {t.folder.name: accuracy for accuracy, _, t, *_ in trials}
    predictions = Predictions(logits, data.test.labels)
    results.write_results(run, predictions, data, rows, best["epoch"], extra)
    print(run.summary())


def _costs(
    model: nn.Module, loaders: FeatureLoaders, histories: list[list[dict]], features: FeatureCosts
) -> dict:
    """Seconds, operations and peak memory of the features and of all heads together."""
    head = profile_model(registry.classifier(model), loaders.features["train"].shape[2:])
    size = loaders.preprocess.img_size
    full_model = profile_model(model, (len(loaders.preprocess.mean), size, size))
    images = sum(row["images"] for rows in histories for row in rows)
    seconds = sum(row["seconds"] for rows in histories for row in rows)
    memory = [row["peak_memory_mb"] for rows in histories for row in rows]
    forward_flops = 2 * full_model["macs"] * features.forward_passes
    return {
        "feature_seconds": round(features.seconds, 1),
        "sweep_seconds": round(seconds, 1),
        "training_seconds": round(features.seconds + seconds, 1),
        "training_flops": forward_flops + head["training_flops"] * images,
        "peak_memory_mb": max(filter(None, [features.peak_memory_mb, *memory]), default=None),
    }
