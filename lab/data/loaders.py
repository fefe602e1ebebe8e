"""Batches for training and evaluation: gathered, augmented and normalised on the device.

Everything random about a batch follows from (seed, epoch, step) alone. A run that stops anywhere
goes on with the very batches that it would have seen, and the number of processes changes nothing:
each takes its share of the same global batch.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.core import UserError
from lab.data.augment import Augmentation, BatchRNG, augment, center_crop, erase
from lab.data.datasets import Dataset, Split
from lab.data.preprocess import Preprocess

RESIDENT_SHARE = 0.4  # of the free memory of a GPU that the images may take


def derive_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed for a tuple of numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class SplitLoader:
    """Images of one split by index: from the device's memory if they fit, else sent in advance."""

    def __init__(self, split: Split, device: torch.device, store: Tensor | None = None):
        """`store`: the split's store, where another split has brought it to the device already."""
        self.split, self.device, self.labels = split, device, split.labels.to(device)
        self.store = store
        # On a CPU this copies nothing: the store may be mapped from disk, its pages come and go.
        if store is None and (device.type != "cuda" or fits(split)):
            self.store = split.store.to(device)
        self.rows = split.rows.to(device)

    def batches(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and labels for each tensor of indices, the next one fetched meanwhile."""
        if self.store is not None:
            on_disk = self.split.ask is not None and self.store is self.split.store
            for i, index in enumerate(indices):
                if on_disk:  # the system reads the next batch while this one is used
                    for coming in indices[i + (i > 0) : i + 2]:
                        self.split.ahead(coming)
                index = index.to(self.device, non_blocking=True)
                yield self.store[self.rows[index]], self.labels[index]
            return

        def fetch(index: Tensor) -> Tensor:
            return self.split.images(index).pin_memory()

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(fetch, indices[0]) if indices else None
            for i, index in enumerate(indices):
                images = ahead.result()
                if i + 1 < len(indices):
                    ahead = pool.submit(fetch, indices[i + 1])
                labels = self.labels[index.to(self.device, non_blocking=True)]
                yield images.to(self.device, non_blocking=True), labels


def fits(split: Split) -> bool:
    free, _ = torch.cuda.mem_get_info()
    return split.store.nbytes < RESIDENT_SHARE * free


@dataclass
class Loaders:
    """Train, validation and test batches of one dataset.

    Args:
        data: the dataset.
        preprocess: what the model takes; grayscale images become as many channels as it has.
        batch_size: images of one optimizer step, over all processes.
        augmentation: what training images go through; others are only cropped and normalised.
        seed: of the order and the augmentation.

    Raises: UserError, for a batch size that is not positive.
    """

    data: Dataset
    preprocess: Preprocess
    batch_size: int
    augmentation: Augmentation
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"BATCH_SIZE={self.batch_size} must be at least 1, such as 128")
        # Every step has the same number of images; the few left over change from epoch to epoch.
        self.batch_size = min(self.batch_size, len(self.data.train))
        if self.data.channels not in (1, len(self.preprocess.mean)):
            raise UserError(
                f"images of {self.data.channels} channels do not fit a model that takes "
                f"{len(self.preprocess.mean)}"
            )
        self.steps = len(self.data.train) // self.batch_size
        self.to(torch.device("cpu"))

    def to(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Places the data; this process takes share `rank` of `world`."""
        if self.batch_size % world:
            fits = self.batch_size - self.batch_size % world or world
            raise UserError(
                f"BATCH_SIZE={self.batch_size} does not divide over {world} processes: take {fits}"
            )
        self.device, self.rank, self.world = device, rank, world
        self.feeds: dict[str, SplitLoader] = {}
        shape = (1, len(self.preprocess.mean), 1, 1)
        self.mean = torch.tensor(self.preprocess.mean, device=device).reshape(shape)
        self.std = torch.tensor(self.preprocess.std, device=device).reshape(shape)

    def feed(self, split: str) -> SplitLoader:
        """A split's feed, made at first use."""
        if split not in self.feeds:
            part = getattr(self.data, split)
            same = (f.store for f in self.feeds.values() if f.split.store is part.store)
            self.feeds[split] = SplitLoader(part, self.device, next(same, None))
        return self.feeds[split]

    def order(self, epoch: int, first_step: int) -> list[Tensor]:
        """This process's share of the training images, step by step."""
        order = torch.randperm(
            len(self.data.train),
            generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch)),
        )
        share = self.batch_size // self.world
        starts = range(first_step * self.batch_size, self.steps * self.batch_size, self.batch_size)
        return [order[i + self.rank * share :][:share] for i in starts]

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches from `first_step` on: normalised images (b, C, S, S), labels (b,)."""
        batches = self.feed("train").batches(self.order(epoch, first_step))
        for step, (images, labels) in enumerate(batches, first_step):
            seed = derive_seed(self.seed, epoch, step)
            draw = BatchRNG(seed, len(images), self.device, self.rank, self.world)
            yield self.augmented(images, draw), labels

    def evaluation(self, split: str, view: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's share of a split, each image once: indices, images, labels.

        view: 0 is without any drawing; 1, 2, ... are augmented views, each always the same.
        """
        mine = torch.arange(self.rank, len(getattr(self.data, split)), self.world)
        indices = list(mine.split(max(1, 2 * self.batch_size // self.world)))
        batches = self.feed(split).batches(indices)
        for step, (index, (images, labels)) in enumerate(zip(indices, batches, strict=True)):
            if view:
                draw = BatchRNG(
                    derive_seed(self.seed, view, step, self.rank), len(images), self.device
                )
                yield index, self.augmented(images, draw), labels
            else:
                yield index, self.normalised(images), labels

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images to what evaluation sees: resized, the centre cut out, normalised."""
        return (center_crop(images.to(self.device), self.preprocess) - self.mean) / self.std

    def augmented(self, images: Tensor, draw: BatchRNG) -> Tensor:
        """uint8 images to augmented and normalised ones."""
        images = augment(images, self.preprocess, self.augmentation, draw)
        images = (images - self.mean) / self.std
        share = self.augmentation.random_erasing
        return erase(images, share, draw) if share else images
