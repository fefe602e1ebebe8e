"""The images of a split, and fixed ways to divide and measure them.

Validation is always a fixed stratified part of the training split; no seed of a run changes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lab.core import UserError
from lab.data.images import abbreviate

SPLIT_SEED = 2024  # of the validation split, and of the test split of data that has none
CHUNK_BYTES = 64 * 3 * 256**2  # pixels held at once when a whole split is read


@dataclass(frozen=True)
class Split:
    """Labeled images: `rows` selects them from a store, which may be larger and lie on disk.

    Args:
        store: uint8 (M, C, H, W).
        rows: int64 (N,), indices into the store.
        labels: int64 (N,).
        names: of the N images.
        read_ahead: for a store on disk, starts to read the given rows in the background.
        whole: for training photographs, the same images for random resized crops: larger, and
            resized to squares without keeping the aspect ratio, instead of center-cropped.
        aspect_ratios: width / height of the originals, (M,), if the store has whole images.
        unreadable: skipped files, with the reasons; after a split, both parts list all of them.
    """

    store: Tensor
    rows: Tensor
    labels: Tensor
    names: list[str]
    read_ahead: Callable[[list[int]], None] | None = None
    whole: "Split | None" = None
    aspect_ratios: Tensor | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | slice) -> Tensor:
        """Some images of the split, uint8 (n, C, H, W)."""
        self.prefetch(indices)
        return self.store[self.rows[indices]]

    def prefetch(self, indices: Tensor | slice) -> None:
        """Starts to read some images in the background if the store is on disk."""
        if self.read_ahead:
            self.read_ahead(self.rows[indices].reshape(-1).tolist())

    def select(self, keep: Tensor) -> "Split":
        """The split of some images, given by a mask (N,) or indices (n,); it shares the store."""
        names = [self.names[i] for i in torch.arange(len(self))[keep].tolist()]
        whole = self.whole and self.whole.select(keep)
        return replace(
            self, rows=self.rows[keep], labels=self.labels[keep], names=names, whole=whole
        )


def full_split(store: Tensor, labels: Tensor, names: list[str]) -> Split:
    """The split of all images of a store."""
    return Split(store, torch.arange(len(store)), labels, names)


def stratified_split(split: Split, fraction: float, classes: list[str]) -> tuple[Split, Split]:
    """Moves a fixed random `fraction` of every class to a second split.

    Both splits contain at least one image of each class.

    Raises: UserError that names the classes with a single image.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    labels = split.labels.numpy()
    moved = np.zeros(len(labels), dtype=bool)
    too_small = []
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        moved[members[: min(max(1, count), len(members) - 1)]] = True
        too_small += [name] if len(members) == 1 else []
    if too_small:
        raise UserError(
            "these classes have only one image left for training, so none can be set aside for "
            f"validation or testing: {abbreviate(too_small)}. Each class needs 3 images, or 2 if "
            "there is a folder test/ or val/. Add some, or remove the class."
        )
    mask = torch.from_numpy(moved)
    return split.select(~mask), split.select(mask)


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], of up to 10,000 evenly spaced images."""
    sample = torch.arange(0, len(split), -(-len(split) // 10_000))
    counts = torch.zeros(split.store.shape[1], 256, dtype=torch.float64)  # histogram per channel
    for part in sample.split(chunk_size(split, 64)):
        for channel, pixels in enumerate(split.images(part).transpose(0, 1)):
            counts[channel] += pixels.reshape(-1).bincount(minlength=256)
    weights, values = counts / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    square = (values - mean[:, None]).square()
    std = (weights * square).sum(1).clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()


def chunk_size(split: Split, limit: int) -> int:
    """How many images of a split to hold at once: `limit`, or fewer if they are large."""
    return max(1, min(limit, CHUNK_BYTES // split.store[0].nbytes))


def missing_classes(split: Split, classes: list[str]) -> list[str]:
    """The classes without images in a split."""
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]
