"""What feeding costs: the time to make an epoch's batches, against the time to train on them.

    python -m benchmarks.data_feeding                              # digits
    python -m benchmarks.data_feeding --dataset path/to/images     # after the cache is made

Beside ours the usual way for the same augmentation: torchvision transforms, image by image, in a
DataLoader's workers. Batches are made and dropped, so that nothing else runs in the meantime.
"""

import statistics
import sys
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

import train
from lab import constants
from lab.augment import Augmentation
from lab.compute import has_bf16
from lab.data import Dataset, load_data
from lab.errors import run_script
from lab.loaders import Loaders
from lab.optim import adamw
from lab.preprocess import Preprocess, resized
from lab.sources import kind_of, native_size
from model import VisionTransformer, ViTConfig

# --- What is measured ---
DATASET: str = "digits"  # a name or a folder, as in train.py
DATA_DIR: str = "data"  # where downloads are
WORKERS: int = 2  # of the DataLoader that ours is compared with
BATCHES: int = 40  # timed of each; the median is reported


class OneByOne(TorchDataset):
    """The usual pipeline: one image, one set of transforms."""

    def __init__(self, data: Dataset, how: Augmentation, size: int):
        self.images, self.labels = data.train.images(slice(None)), data.train.labels
        steps: list = [v2.RandomCrop(size, padding=how.shift)] if how.shift else []
        if how.resized_crop:
            steps.append(v2.RandomResizedCrop(size, scale=(how.resized_crop, 1)))
        steps += [v2.RandomHorizontalFlip()] if how.flip else []
        if how.rotate or how.zoom or how.translate:
            move = (how.translate / size,) * 2
            scale = (1 - how.zoom, 1 + how.zoom)
            steps.append(v2.RandomAffine(how.rotate, translate=move, scale=scale))
        steps += [v2.TrivialAugmentWide()] if how.policy == "trivial" else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
        steps += [v2.RandomErasing(how.erasing)] if how.erasing else []
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def seconds_a_batch(batches: Iterable, device: torch.device) -> float:
    """The median time to the next batch, the first ones left out."""
    times, iterator = [], iter(batches)
    for _ in range(BATCHES):
        started = time.perf_counter()
        if next(iterator, None) is None:
            break
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def seconds_a_step(
    model: VisionTransformer, loaders: Loaders, device: torch.device, bf16: bool
) -> float:
    """The median time of a training step on one batch that stays where it is."""
    optimizer = adamw(model.to(device), 1e-4, 0.05)
    images, labels = next(loaders.train(1))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> None:
    constants.override(sys.modules[__name__])
    size = native_size(DATASET)
    recipe = train.RECIPES[kind_of(DATASET)]
    size = size or recipe["IMG_SIZE"]
    fields = ("SHIFT", "RESIZED_CROP", "FLIP", "ROTATE", "ZOOM", "TRANSLATE", "POLICY", "ERASING")
    how = Augmentation(*(recipe[name] for name in fields))
    started = time.perf_counter()
    crop_pct = 1.0 if native_size(DATASET) else 0.875
    data = load_data(DATASET, DATA_DIR, resized(size, crop_pct))
    loading = time.perf_counter() - started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocess = Preprocess(size, data.mean, data.std, crop_pct)
    loaders = Loaders(data, preprocess, recipe["BATCH_SIZE"], how)
    loaders.to(device)
    config = ViTConfig(
        size, recipe["PATCH_SIZE"], data.channels, len(data.classes), recipe["EMBED_DIM"],
        recipe["DEPTH"], recipe["NUM_HEADS"],
    )  # fmt: skip
    bf16 = recipe["PRECISION"] != "fp32" and has_bf16(device)
    step = seconds_a_step(VisionTransformer(config), loaders, device, bf16)
    ours = seconds_a_batch(loaders.train(1), device)
    usual = DataLoader(
        OneByOne(data, how, size), loaders.batch_size, shuffle=True, num_workers=WORKERS
    )
    theirs = seconds_a_batch(usual, device)
    print(f"{data.name}: {len(data.train):,} training images, loaded in {loading:.1f} s; {device}")
    print(f"training step without feeding, {loaders.batch_size} images: {1e3 * step:.2f} ms")
    for name, cost in (("ours", ours), (f"DataLoader, {WORKERS} workers", theirs)):
        share = 100 * cost / (cost + step)
        print(f"{name:>22}: {1e3 * cost:7.2f} ms a batch, {share:4.1f} % of an epoch")


if __name__ == "__main__":
    run_script(main)
