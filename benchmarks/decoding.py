"""Decoding photographs into the cache, compared with DataLoaders that decode the same photographs.

    python -m benchmarks.decoding --images data/oxford-iiit-pet/images

Ours is the first start on a folder of photographs: every image is decoded, resized and cropped to
a square, and written to the cache. The DataLoaders do the same with Pillow or torchvision in their
workers and discard the images, in every epoch. The table also lists the size of the cache.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image, read_file
from torchvision.transforms import v2

from benchmarks import table
from benchmarks.timing import alternate, seconds
from lab.core import UserError, constants, runtime
from lab.data import Augmentation, Preprocess, cache, images

# --- What is measured ---
IMAGES: str = ""  # a folder of photographs; its images count, also those in subfolders
IMG_SIZE: int = 224  # pixels of the model's input
CROP_PCT: float = 0.875  # the input as a fraction of the stored image
# --- How it is measured ---
WORKERS: int = 2  # processes of each DataLoader
REPEATS: int = 5  # measurements, after one that does not count
OUT: str = "benchmarks/local/decoding.md"  # where the table goes; empty: nowhere

MIN_AREAS = (1.0, 0.3, 0.08)  # of random resized crops, for the size of the cache


class Photographs(Dataset):
    """Photographs as uint8 tensors (3, size, size)."""

    def __init__(self, paths: list[Path], read: Callable[[Path], Tensor], size: int):
        self.paths, self.read = paths, read
        resize = v2.Resize(size, v2.InterpolationMode.BICUBIC)
        self.transform = v2.Compose([resize, v2.CenterCrop(size), v2.ToImage()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.read(self.paths[i]))


def read_pillow(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def read_torchvision(path: Path) -> Tensor:
    return decode_image(read_file(str(path)), mode="RGB")


def main() -> None:
    constants.override(sys.modules[__name__])
    found = sorted(Path(IMAGES or "?").rglob("*"))
    paths = [path for path in found if path.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"IMAGES={IMAGES!r} must be a folder with JPEG photographs")
    size = Preprocess.resized_size(IMG_SIZE, CROP_PCT)

    def fill_cache() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache.decode(paths, images.Reading(size, "bicubic"), Path(folder, "cache"))

    workloads = {table.OURS: fill_cache}
    for name, read in (("Pillow", read_pillow), ("torchvision", read_torchvision)):
        loader = DataLoader(Photographs(paths, read, size), 64, num_workers=WORKERS)
        workloads[f"DataLoader, {name}"] = lambda loader=loader: [None for _ in loader]
    times = alternate(
        {name: lambda work=work: seconds(work, "cpu") for name, work in workloads.items()}, REPEATS
    )
    rows = table.compare("decoding photographs", times, table.OURS, [*workloads], len(paths))
    notes = [f"The cache takes {3 * size**2 / 1e3:.0f} kB per image."]
    for area in MIN_AREAS:
        side = Augmentation(rrc_min_area=area).crop_size(IMG_SIZE)
        notes.append(
            f"Random resized crops from {area:.0%} of the area add {3 * side**2 / 1e3:.0f} kB per "
            f"training image ({side} pixels)."
        )
    title = (
        f"{len(paths):,} photographs to squares of {size} pixels, DataLoaders with {WORKERS} "
        f"workers; medians of {REPEATS} repeats."
    )
    table.save(OUT, title, rows, notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)
