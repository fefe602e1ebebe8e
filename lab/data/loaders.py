"""Batches for training and evaluation: gathered, augmented and normalized on the device.

All randomness of a batch is derived from (seed, epoch, step). A run that is stopped anywhere
therefore resumes with exactly the batches it would have seen, and the number of processes changes
nothing: each process takes its part of the same global batch.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.core import UserError
from lab.data.augment import (
    Augmentation,
    BatchRNG,
    augment,
    erase,
    to_device,
)
from lab.data.datasets import Dataset
from lab.data.preprocess import Preprocess
from lab.data.splits import Split

_FRACTION = 0.4  # a split stays on the device if it needs less than this fraction of free memory


def derive_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from several numbers, such as (seed, epoch, step).

    Zeros at the end do not change it, because numpy's `SeedSequence` pads up to four numbers with
    zeros: (seed, epoch) and (seed, epoch, 0) give the same seed.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class SplitLoader:
    """Batches of one split, from device memory if the split fits there, else prefetched."""

    def __init__(self, split: Split, device: torch.device, store: Tensor | None = None):
        """`store`: the split's store on the device, if another split has already copied it."""
        self.split, self.device, self.labels = split, device, split.labels.to(device)
        self.store = store
        # On the CPU this copies nothing: a store on disk stays there, and is read page by page.
        if store is None and _fits_on(device, split):
            self.store = split.store.to(device)
        self.rows = split.rows.to(device)

    def batches(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and labels for each tensor of indices; the next batch is prefetched."""
        if self.store is None:
            yield from self._pinned_batches(indices)
            return
        on_disk = self.store is self.split.store
        for i, index in enumerate(indices):
            if on_disk:  # the system reads the next batch from disk while this one is in use
                for upcoming in indices[i + (i > 0) : i + 2]:
                    self.split.prefetch(upcoming)
            index = to_device(index, self.device)
            yield self.store[self.rows[index]], self.labels[index]

    def aspect_ratios(self, index: Tensor) -> Tensor | None:
        """Width / height of the originals (b,), if the images are uncropped photographs."""
        ratios = self.split.aspect_ratios
        return None if ratios is None else to_device(ratios[self.split.rows[index]], self.device)

    def _pinned_batches(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for a split that does not fit on the GPU: a thread gathers the next batch."""

        def gather(index: Tensor) -> Tensor:
            images = self.split.images(index)
            return images.pin_memory() if self.device.type == "cuda" else images

        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(gather, indices[0]) if indices else None
            for i, index in enumerate(indices):
                images = upcoming.result()
                if i + 1 < len(indices):
                    upcoming = pool.submit(gather, indices[i + 1])
                labels = self.labels[to_device(index, self.device)]
                yield to_device(images, self.device), labels


def _fits_on(device: torch.device, split: Split) -> bool:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        return True
    return split.store.nbytes < _FRACTION * free


@dataclass
class Loaders:
    """Training, validation and test batches of one dataset.

    Args:
        data: the dataset.
        preprocess: the model's input; grayscale images are repeated to its number of channels.
        batch_size: images per optimizer step, over all processes.
        augmentation: of training images; other images are only cropped and normalized.
        seed: of the order of the images and of the augmentation.

    Raises: UserError, if the batch size is not positive, the channels do not match, or the padding
        is larger than the images.
    """

    data: Dataset
    preprocess: Preprocess
    batch_size: int
    augmentation: Augmentation
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"BATCH_SIZE={self.batch_size} must be at least 1, such as 128")
        padding, side = self.augmentation.crop_padding, self.data.train.store.shape[-1]
        if padding > side:
            raise UserError(
                f"CROP_PADDING={padding} is larger than the images ({side} pixels), so some crops "
                f"would be empty: use at most {side}, usually {max(1, side // 8)}"
            )
        # Every step has the same number of images; the skipped images change with the epoch.
        self.batch_size = min(self.batch_size, len(self.data.train))
        if self.data.channels not in (1, len(self.preprocess.mean)):
            kind = "color" if self.data.channels == 3 else "grayscale"
            raise UserError(
                f"the images of {self.data.name} have {self.data.channels} channels, but the model "
                f"expects {len(self.preprocess.mean)}: choose weights (PRETRAINED or MODEL) of a "
                f"model for {kind} images"
            )
        self.steps = len(self.data.train) // self.batch_size  # per epoch
        self.to(torch.device("cpu"))

    def to(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Moves the data to a device; this is process `rank` of `world`."""
        if self.batch_size % world:
            closest = self.batch_size - self.batch_size % world or world
            raise UserError(
                f"BATCH_SIZE={self.batch_size} cannot be divided by the {world} processes: "
                f"use {closest}"
            )
        self.device, self.rank, self.world = device, rank, world
        self._splits: dict[tuple[str, bool], SplitLoader] = {}
        shape = (1, len(self.preprocess.mean), 1, 1)
        self.mean = torch.tensor(self.preprocess.mean, device=device).reshape(shape)
        self.std = torch.tensor(self.preprocess.std, device=device).reshape(shape)

    def batch_rng(self, epoch: int, step: int, count: int) -> BatchRNG:
        """The random numbers of one training step, for this process's `count` images."""
        return BatchRNG(self.step_seed(epoch, step), count, self.device, self.rank, self.world)

    def step_seed(self, epoch: int, step: int, *extra: int) -> int:
        """A seed for other randomness of a step, such as dropout; `extra`: e.g. the rank."""
        return derive_seed(self.seed, epoch, step, *extra)

    def epoch_indices(self, epoch: int, first_step: int) -> list[Tensor]:
        """Indices of this process's training images, one tensor per step."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.data.train), generator=generator)
        count = self.batch_size // self.world
        starts = range(first_step * self.batch_size, self.steps * self.batch_size, self.batch_size)
        return [order[start + self.rank * count :][:count] for start in starts]

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch from `first_step` on: normalized images (b, C, S, S), labels (b,)."""
        indices = self.epoch_indices(epoch, first_step)
        loader = self._split("train", for_crops=True)
        batches = zip(indices, loader.batches(indices), strict=True)
        for step, (index, (images, labels)) in enumerate(batches, first_step):
            rng = self.batch_rng(epoch, step, len(images))
            yield self._augment(images, rng, loader.aspect_ratios(index)), labels

    def evaluation(
        self, split: str, view: int = 0, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's part of a split, each image once: indices, normalized images, labels.

        Args:
            split: train, val or test.
            view: 0 for images without augmentation; 1, 2, ... for fixed augmented views.
            first: how many of this process's images to leave out; whole batches of a view.
        """
        images = torch.arange(self.rank, len(getattr(self.data, split)), self.world)
        size = max(1, 2 * self.batch_size // self.world)
        indices = [index for index in images[first:].split(size) if len(index)]
        loader = self._split(split, for_crops=view > 0)
        batches = loader.batches(indices)
        numbered = enumerate(zip(indices, batches, strict=True), first // size)
        for step, (index, (images, labels)) in numbered:
            if view:
                seed = derive_seed(self.seed, view, step, self.rank)
                rng = BatchRNG(seed, len(images), self.device)
                yield index, self._augment(images, rng, loader.aspect_ratios(index)), labels
            else:
                yield index, self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, H) as evaluation sees them: resized, cropped and normalized."""
        return (self.preprocess.center_crop(images.to(self.device)) - self.mean) / self.std

    def _augment(self, images: Tensor, rng: BatchRNG, aspect_ratios: Tensor | None) -> Tensor:
        images = augment(images, self.preprocess, self.augmentation, rng, aspect_ratios)
        images = (images - self.mean) / self.std
        probability = self.augmentation.random_erasing
        return erase(images, probability, rng) if probability else images

    def _split(self, name: str, for_crops: bool = False) -> SplitLoader:
        """A split's loader, created at first use; splits that share a store copy it once.

        `for_crops`: the loader of whole photographs, if the split has them and crops are used.
        """
        split = getattr(self.data, name)
        for_crops = for_crops and split.whole is not None and self.augmentation.rrc_min_area > 0
        if (key := (name, for_crops)) not in self._splits:
            split = split.whole if for_crops else split
            shared = (s.store for s in self._splits.values() if s.split.store is split.store)
            self._splits[key] = SplitLoader(split, self.device, next(shared, None))
        return self._splits[key]
