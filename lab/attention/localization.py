"""Oxford Pets' outlines of the animals, cut to the squares that the model sees.

Is the map where the animal is? Maps against outlines, image by image.

All maps are brought to the image's size bilinearly, scaled to a largest value of one, and judged
on the pixels that the outline calls animal or background; its border is left out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lab.core import UserError, stats
from lab.data.datasets import Dataset, Split
from lab.data.images import abbreviate, square
from lab.data.preprocess import Preprocess

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
            f"{len(lost)} of {len(paths)} outlines are missing from {folder}: {abbreviate(lost)}. "
            "They are in annotations.tar.gz of Oxford Pets: delete the folder annotations and "
            "run again"
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


CENTRE = "centre Gaussian"
LEVELS = 50  # thresholds that the validation images choose from
MEASURES = {
    "mass": "share of the map's mass on the animal",
    "pointing": "the largest value lies on the animal",
    "average_precision": "average precision, pixels ranked by the map",
    "iou": "overlap (IoU) at the best threshold of the validation images",
}


@dataclass(frozen=True)
class Judged:
    """What one method's maps of N images are worth, image by image."""

    mass: np.ndarray  # (N,)
    pointing: np.ndarray  # (N,)
    average_precision: np.ndarray  # (N,)
    overlaps: np.ndarray  # (N, LEVELS + 1), IoU at each threshold

    def of(self, measure: str, level: int) -> np.ndarray:
        """One measure, (N,); `level` is the threshold's number, for "iou"."""
        return self.overlaps[:, level] if measure == "iou" else getattr(self, measure)

    def best_level(self) -> int:
        return int(self.overlaps.mean(0).argmax())


def upsample(maps: Tensor, size: int) -> Tensor:
    """Maps (B, rows, columns) at the images' size, bilinearly, (B, size, size)."""
    shape = (size, size)
    return F.interpolate(maps[:, None].float(), shape, mode="bilinear", align_corners=False)[:, 0]


def judge(maps: Tensor, outlines: Tensor) -> Judged:
    """Scores maps (N, rows, columns), at least zero, against outlines (N, S, S) of lab/trimaps.

    mass: share of the map's sum that lies on the animal.
    pointing: whether the largest value does (Zhang et al. 2018, without their margin); of several
        largest values the share that does.
    average_precision: of the pixels, as scikit-learn computes it.
    overlaps: intersection over union of {map >= t} and the animal, t = 0, 1/LEVELS, ..., 1.
    """
    rows = []
    for i in range(len(maps)):  # one by one: at the image's size all maps would fill the memory
        values = upsample(maps[i : i + 1], outlines.shape[-1])[0]
        judged = outlines[i] != BORDER
        rows.append(judge_one(values[judged].numpy(), (outlines[i][judged] == ANIMAL).numpy()))
    mass, pointing, precision, overlaps = zip(*rows, strict=True)
    return Judged(np.array(mass), np.array(pointing), np.array(precision), np.array(overlaps))


def judge_one(values: np.ndarray, animal: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """The four measures of one image: values (n,) and whether each pixel is animal (n,)."""
    if values.max() <= 0:  # a map that says nothing says it everywhere alike
        values = np.ones_like(values)
    precision = float(average_precision_score(animal, values))  # scaling first would tie values
    values = values / values.max()
    # The largest threshold, by number, that a pixel reaches; a float just below counts as there.
    level = np.floor(values * LEVELS + 1e-4).astype(int)
    reached = [np.bincount(level[part], minlength=LEVELS + 1)[::-1].cumsum()[::-1]
               for part in (animal, ~animal)]  # fmt: skip
    return (
        float(values[animal].sum(dtype=float) / values.sum(dtype=float)),
        float(animal[values == values.max()].mean()),
        precision,
        reached[0] / (animal.sum() + reached[1]),
    )


def baselines(grid: tuple[int, int]) -> dict[str, Tensor]:
    """Maps (rows, columns) that know nothing of the image: uniform, and a Gaussian at the centre.

    The Gaussian's deviation is a quarter of the side; only `mass` depends on it.
    """
    down, right = ((torch.arange(n) + 0.5) / n - 0.5 for n in grid)  # in sides, from the centre
    squared = down[:, None] ** 2 + right[None] ** 2
    return {"uniform": torch.ones(grid), CENTRE: torch.exp(-squared / (2 * 0.25**2))}


def summarise(
    test: Judged, level: int, rivals: dict[str, tuple[Judged, int]]
) -> dict[str, dict[str, list[float]]]:
    """Means with 95 % bootstrap intervals over the images, and differences to rivals.

    Args:
        test: of the test images.
        level: the threshold that the validation images chose.
        rivals: by name, others' scores on the same images, each with its own threshold.

    Returns: for each measure {"mean": [mean, low, high], name of rival: [difference, low, high]}.
    """

    out = {}
    for measure in MEASURES:
        values = test.of(measure, level)
        out[measure] = {"mean": stats.mean_interval(values)}
        for name, (rival, its) in rivals.items():
            out[measure][name] = stats.mean_interval(values - rival.of(measure, its))
    return out
