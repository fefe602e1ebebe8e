"""Oxford Pets' outlines of the animals, cut to the squares that the model sees."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lab.data import Dataset
from lab.errors import UserError
from lab.images import some, square
from lab.preprocess import Preprocess
from lab.sources import Split

BACKGROUND, ANIMAL, BORDER = 0, 1, 2


def trimaps(data: Dataset, split: Split, data_dir: str, preprocess: Preprocess) -> Tensor:
    """For every pixel that the model sees: ANIMAL, BACKGROUND, or BORDER (not judged).

    Args:
        data: Oxford Pets, the only dataset here that has outlines.
        split: of it.
        data_dir: where Pets lies.

    Returns: uint8 (N, S, S), S = `preprocess.img_size`, in the split's order.
    Raises: UserError, for a dataset without outlines, or outlines that are missing or of another
        size than their image.
    """
    if data.name != "pets":
        raise UserError(
            f"{data.name} has no outlines that say where the animal is, so maps cannot be scored "
            "on it. Oxford Pets has them: --images pets"
        )
    base = Path(data_dir).expanduser() / "oxford-iiit-pet"
    folder = base / "annotations" / "trimaps"
    paths = [folder / f"{Path(name).stem}.png" for name in split.names]
    if lost := [path.name for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(lost)} of {len(paths)} outlines are missing from {folder}: {some(lost)}. They "
            "are in annotations.tar.gz of Oxford Pets: delete the folder annotations and run again"
        )
    size = preprocess.resized
    out = np.empty((len(paths), size, size), np.uint8)
    for i, (path, name) in enumerate(zip(paths, split.names, strict=True)):
        with Image.open(path) as trimap, Image.open(base / name) as photograph:
            if trimap.size != photograph.size:
                raise UserError(f"{path} has {trimap.size} pixels, its image {photograph.size}")
            out[i] = np.asarray(square(trimap, size, Image.Resampling.NEAREST))
    kinds = np.array([BORDER, ANIMAL, BACKGROUND, BORDER], np.uint8)  # of Pets' numbers 1, 2, 3
    if out.max(initial=0) >= len(kinds):
        raise UserError(f"{folder} holds no trimaps: their pixels are 1, 2 or 3")
    return V.center_crop(torch.from_numpy(kinds[out]), [preprocess.img_size] * 2)
