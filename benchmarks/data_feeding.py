"""The time to load an epoch's batches, compared with a DataLoader and with the training step.

    python -m benchmarks.data_feeding                              # digits
    python -m benchmarks.data_feeding --dataset path/to/images     # after the cache is made

Ours makes augmented batches on the device. The DataLoader applies torchvision's transforms for the
same augmentation image by image, in workers that stay alive. A measurement loads the batches of an
epoch and discards them, so nothing else runs meanwhile.
"""

import sys
from collections.abc import Iterable
from itertools import count, islice
from statistics import median

import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

import train
from benchmarks import libraries, table
from benchmarks.timing import alternate, seconds
from lab.core import constants, runtime
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.training import FitConfig
from model import VisionTransformer, ViTConfig

# --- What is measured ---
DATASET: str = "digits"  # a name or a folder, as in train.py
DATA_DIR: str = "data"  # folder for downloads
# --- How it is measured ---
WORKERS: int = 2  # processes of the DataLoader
BATCHES: int = 40  # per measurement, at most; digits has 20 per epoch
REPEATS: int = 5  # measurements, after one that does not count
OUT: str = "benchmarks/local/data_feeding-{device}.md"  # where the table goes; empty: nowhere


def torchvision_transform(augmentation: Augmentation, loaders: Loaders) -> v2.Transform:
    """The same augmentation and normalization for a single Pillow image."""
    size, a = loaders.preprocess.img_size, augmentation
    steps: list = [v2.ToImage()]
    steps += [v2.RandomCrop(size, padding=a.crop_padding)] if a.crop_padding else []
    if a.rrc_min_area:
        steps.append(v2.RandomResizedCrop(size, scale=(a.rrc_min_area, 1)))
    steps += [v2.RandomHorizontalFlip()] if a.flip else []
    if a.rotate or a.scale or a.translate:
        scale, translate = (1 - a.scale, 1 + a.scale), (a.translate / size,) * 2
        steps.append(v2.RandomAffine(a.rotate, translate=translate, scale=scale))
    steps += [v2.TrivialAugmentWide()] if a.auto_augment == "trivial" else []
    preprocess = loaders.preprocess
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)]
    return v2.Compose([*steps, *([v2.RandomErasing(a.random_erasing)] if a.random_erasing else [])])


def build_loaders() -> tuple[Loaders, dict]:
    """Our batches of the dataset, and the recipe of train.py for it."""
    size, recipe = datasets.native_size(DATASET), train.RECIPES[datasets.dataset_kind(DATASET)]
    crop_pct, size = (1.0, size) if size else (0.875, recipe["IMG_SIZE"])
    augmentation = Augmentation(**{
        name: recipe[name.upper()] for name in Augmentation.__dataclass_fields__
    })  # fmt: skip
    data = load_data(DATASET, DATA_DIR, Preprocess.resized_size(size, crop_pct))
    preprocess = Preprocess(size, data.mean, data.std, crop_pct)
    loaders = Loaders(data, preprocess, recipe["BATCH_SIZE"], augmentation)
    loaders.to(runtime.process_state().device)
    return loaders, recipe


def load(batches: Iterable, device: torch.device) -> None:
    """Moves every batch to the device, and discards it."""
    for images, labels in batches:
        images.to(device), labels.to(device)


def main() -> None:
    constants.override(sys.modules[__name__])
    loaders, recipe = build_loaders()
    data, size, device = loaders.data, loaders.preprocess.img_size, loaders.device
    batches, epochs = min(BATCHES, loaders.steps), count(1)
    images = libraries.Images(data.train.images(slice(None)), data.train.labels)
    images.transform = torchvision_transform(loaders.augmentation, loaders)
    images.mode = "L" if data.channels == 1 else "RGB"
    loader = DataLoader(
        images, loaders.batch_size, num_workers=WORKERS, persistent_workers=WORKERS > 0,
        sampler=RandomSampler(images, num_samples=batches * loaders.batch_size),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model = VisionTransformer(ViTConfig(
        size, recipe["PATCH_SIZE"], data.channels, len(data.classes), recipe["EMBED_DIM"],
        recipe["DEPTH"], recipe["NUM_HEADS"],
    )).to(device)  # fmt: skip
    precision = FitConfig(1, precision=recipe["PRECISION"]).mixed_precision.replace("no", "fp32")
    step = libraries.plain_step(model, *next(loaders.train(1)), precision)
    theirs, kind = f"DataLoader, {WORKERS} workers", device.type
    times = alternate({
        table.OURS: lambda: seconds(
            lambda: load(islice(loaders.train(next(epochs)), batches), device), kind
        ),
        theirs: lambda: seconds(lambda: load(loader, device), kind),
        "step": lambda: batches * seconds(step, kind, times=5),
    }, REPEATS)  # fmt: skip

    workload, count_ = f"data feeding, {data.name}", batches * loaders.batch_size
    rows = table.compare(workload, times, table.OURS, [theirs], count_)
    notes = [f"A training step without loading takes {1e3 * median(times['step']) / batches:.2f} "
             "ms."]  # fmt: skip
    for name in (table.OURS, theirs):
        pairs = zip(times[name], times["step"], strict=True)
        fraction = median(load / (load + step) for load, step in pairs)
        notes.append(f"Loading takes {fraction:.1%} of an epoch ({name}) if it does not overlap "
                     "with training.")  # fmt: skip
    title = (
        f"Batches of {data.name}, {size} pixels, batch {loaders.batch_size}; medians of {REPEATS} "
        f"repeats of {batches} batches."
    )
    table.save(OUT, title, rows, notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)
