"""Features of a frozen backbone, computed once and kept; a head trains on them in seconds."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.augment import Draw
from lab.checkpoints import load_weights, save_weights
from lab.errors import UserError
from lab.evaluation import outputs
from lab.loaders import Loaders, seed_of
from lab.weights import pooled


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
            seed = seed_of(self.seed, epoch, step)
            draw = Draw(seed, len(index), self.device, self.rank, self.world)
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
        return pooled(self.model, images)


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
        features, header = load_weights(path)
        return FeatureLoaders(loaders, features), header["seconds"]

    started = time.perf_counter()
    loaders.to(device, accelerator.process_index, world)
    backbone = Backbone(model.to(device))
    features = {s: outputs(backbone, loaders, s, accelerator) for s in ("val", "test")}
    passes = range(1, views + 1) if views else [0]
    train = [outputs(backbone, loaders, "train", accelerator, view) for view in passes]
    features["train"] = torch.stack(train)
    model.to("cpu")
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        save_weights(path, features, {**seen, "seconds": seconds})
    return FeatureLoaders(loaders, features), seconds
