"""What feeding costs: the time to make an epoch's batches, against the time to train on them.

    python -m benchmarks.data_feeding                              # digits
    python -m benchmarks.data_feeding --dataset path/to/images     # after the cache is made

Beside ours the usual way for the same augmentation: torchvision transforms, image by image, in a
DataLoader's workers, which stay alive from turn to turn. A turn is an epoch's batches, made and
dropped, so that nothing else runs in the meantime; when it is over the workers have nothing to do.
"""

import sys
from collections.abc import Iterable
from itertools import count, islice
from statistics import median

import torch
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

import train
from benchmarks import table
from benchmarks.peers import usual_step
from benchmarks.timing import alternate, hardware, seconds
from lab.core import constants, run_script, runtime
from lab.data import Augmentation, Dataset, Loaders, Preprocess, datasets, load_data
from lab.training import FitConfig
from model import VisionTransformer, ViTConfig

# --- What is measured ---
DATASET: str = "digits"  # a name or a folder, as in train.py
DATA_DIR: str = "data"  # where downloads are
# --- How it is measured ---
WORKERS: int = 2  # of the DataLoader that ours is compared with
BATCHES: int = 40  # of a turn at most; digits have 20 an epoch
REPEATS: int = 5  # the median over so many is reported, after one that is not
OUT: str = "benchmarks/local/data_feeding-{device}.md"  # where the table goes; empty: nowhere


class OneByOne(TorchDataset):
    """The usual pipeline: one image, one set of transforms."""

    def __init__(self, data: Dataset, how: Augmentation, size: int):
        self.images, self.labels = data.train.images(slice(None)), data.train.labels
        steps: list = [v2.RandomCrop(size, padding=how.crop_padding)] if how.crop_padding else []
        if how.rrc_min_area:
            steps.append(v2.RandomResizedCrop(size, scale=(how.rrc_min_area, 1)))
        steps += [v2.RandomHorizontalFlip()] if how.flip else []
        if how.rotate or how.scale or how.translate:
            move = (how.translate / size,) * 2
            scale = (1 - how.scale, 1 + how.scale)
            steps.append(v2.RandomAffine(how.rotate, translate=move, scale=scale))
        steps += [v2.TrivialAugmentWide()] if how.auto_augment == "trivial" else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
        steps += [v2.RandomErasing(how.random_erasing)] if how.random_erasing else []
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def drain(batches: Iterable, device: torch.device) -> None:
    """Takes every batch to the device, and drops it."""
    for images, labels in batches:
        images.to(device), labels.to(device)


def loaders_of_recipe() -> tuple[Loaders, dict]:
    """Our batches of the dataset, and the recipe of train.py for it."""
    size, recipe = datasets.native_size(DATASET), train.RECIPES[datasets.dataset_kind(DATASET)]
    crop_pct, size = (1.0, size) if size else (0.875, recipe["IMG_SIZE"])
    fields = (
        "CROP_PADDING",
        "RRC_MIN_AREA",
        "FLIP",
        "ROTATE",
        "SCALE",
        "TRANSLATE",
        "AUTO_AUGMENT",
        "RANDOM_ERASING",
    )
    how = Augmentation(*(recipe[name] for name in fields))
    data = load_data(DATASET, DATA_DIR, Preprocess.resized_size(size, crop_pct))
    loaders = Loaders(
        data, Preprocess(size, data.mean, data.std, crop_pct), recipe["BATCH_SIZE"], how
    )
    loaders.to(runtime.process_state().device)
    return loaders, recipe


def main() -> None:
    constants.override(sys.modules[__name__])
    loaders, recipe = loaders_of_recipe()
    data, size, device = loaders.data, loaders.preprocess.img_size, loaders.device
    batches, epochs = min(BATCHES, loaders.steps), count(1)
    usual = OneByOne(data, loaders.augmentation, size)
    images = batches * loaders.batch_size
    loader = DataLoader(
        usual, loaders.batch_size, sampler=RandomSampler(usual, num_samples=images),
        num_workers=WORKERS, persistent_workers=WORKERS > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    config = ViTConfig(
        size, recipe["PATCH_SIZE"], data.channels, len(data.classes), recipe["EMBED_DIM"],
        recipe["DEPTH"], recipe["NUM_HEADS"],
    )  # fmt: skip
    bf16 = FitConfig(1, precision=recipe["PRECISION"]).mixed_precision == "bf16"
    model = VisionTransformer(config).to(device)
    step = usual_step(model, *next(loaders.train(1)), bf16)
    theirs, kind = f"DataLoader, {WORKERS} workers", device.type
    times = alternate({
        table.OURS: lambda: seconds(
            lambda: drain(islice(loaders.train(next(epochs)), batches), device), kind
        ),
        theirs: lambda: seconds(lambda: drain(loader, device), kind),
        "step": lambda: batches * seconds(step, kind, times=5),
    }, REPEATS)  # fmt: skip

    rows = table.compared(f"data feeding, {data.name}", times, table.OURS, [theirs], images)
    cells, words = [], []
    for name in (table.OURS, theirs):
        share = median(f / (f + s) for f, s in zip(times[name], times["step"], strict=True))
        cells.append([name, f"{1e3 * median(times[name]) / batches:.2f}", f"{share:.1%}"])
        words.append(f"{name} {share:.1%}")
    notes = [
        f"Feeding's share of an epoch of {data.name}, if it does not overlap with training: "
        f"{'; '.join(words)}."
    ]
    lines = [
        f"{data.name}, {size} pixels, batch {loaders.batch_size}; a training step without feeding "
        f"takes {1e3 * median(times['step']) / batches:.2f} ms.  ",
        f"{hardware(kind)}. {table.versions(['torchvision'])}.  ",
        f"Medians of {REPEATS} repeats of {batches} batches, in turns.  ",
        f"`{table.command('data_feeding')}`", "",
        *table.in_markdown(["way", "ms a batch", "share of an epoch"], cells), "",
        *table.row_lines(rows),
    ]  # fmt: skip
    table.keep("data_feeding", lines, OUT.format(device=kind), rows, notes)


if __name__ == "__main__":
    run_script(main)
