"""Metrics of maps: do they find the object, and do they show what the model uses?

Localization compares maps with the segmentation masks (trimaps) of Oxford Pets, per image. Maps
are resized to the image bilinearly, scaled to a maximum of one, and scored on the pixels that the
outline labels animal or background. The border between them does not count.

Faithfulness removes or adds pixels in the order of the map and watches the predicted probability:
deletion and insertion (Petsiuk et al. 2018, RISE).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lab.attention.extraction import eval_mode
from lab.attention.score_report import CENTER, MEASURES
from lab.core import UserError, machine, stats
from lab.data import Dataset, Preprocess, datasets, images

BACKGROUND, ANIMAL, BORDER = 0, 1, 2
LEVELS = 50  # thresholds between 0 and 1


def load_outlines(
    data: Dataset, split: datasets.Split, data_dir: str, preprocess: Preprocess
) -> Tensor:
    """Labels ANIMAL, BACKGROUND or BORDER for every pixel that the model sees.

    Args:
        data: Oxford Pets, the only supported dataset with outlines ("trimaps").
        split: one of its splits.
        data_dir: the folder of downloaded datasets.

    Returns: uint8 (N, S, S), S = `preprocess.img_size`, in the order of the split.
    Raises: UserError if the dataset has no outlines, if some are missing, or if an outline and
        its image differ in size.
    """
    from torchvision.transforms.v2.functional import center_crop

    if data.name != "pets":
        raise UserError(
            f"{data.name} has no segmentation masks, so maps cannot be scored on it. Oxford "
            "Pets has masks: use --images pets"
        )
    base = Path(data_dir).expanduser() / "oxford-iiit-pet"
    folder = base / "annotations" / "trimaps"
    paths = [folder / f"{Path(name).stem}.png" for name in split.names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(paths)} segmentation masks are missing from {folder}: "
            f"{images.abbreviate(missing)}. They belong to annotations.tar.gz of Oxford Pets: "
            "delete the folder annotations and run the command again"
        )
    size = preprocess.resized
    out = np.empty((len(paths), size, size), np.uint8)
    for i, (path, name) in enumerate(zip(paths, split.names, strict=True)):
        try:
            with images.open_image(path) as trimap, images.open_image(base / name) as photograph:
                if trimap.size != photograph.size:
                    raise UserError(
                        f"{path} has {trimap.size} pixels, but its image has {photograph.size}"
                    )
                out[i] = np.asarray(images.square(trimap, size, Image.Resampling.NEAREST))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"cannot read the segmentation mask {path}: {error}") from error
    labels = np.array([BORDER, ANIMAL, BACKGROUND, BORDER], np.uint8)  # Pets has values 1, 2, 3
    if out.max(initial=0) >= len(labels):
        raise UserError(f"{folder} holds images that are not trimaps (pixel values 1, 2 and 3)")
    return center_crop(torch.from_numpy(labels[out]), [preprocess.img_size] * 2)


@dataclass(frozen=True)
class LocalizationScores:
    """Scores of the maps of N images, image by image."""

    mass: np.ndarray  # (N,)
    pointing: np.ndarray  # (N,)
    average_precision: np.ndarray  # (N,)
    ious: np.ndarray  # (N, LEVELS + 1), at each threshold

    def values(self, measure: str, level: int) -> np.ndarray:
        """One measure, (N,); "iou" is taken at threshold number `level`."""
        return self.ious[:, level] if measure == "iou" else getattr(self, measure)

    def best_level(self) -> int:
        """The number of the threshold with the highest mean IoU."""
        return int(self.ious.mean(0).argmax())


def resize_maps(maps: Tensor, size: int) -> Tensor:
    """Bilinear resizing of maps: (B, rows, columns) -> (B, size, size)."""
    maps = maps[:, None].float()
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)[:, 0]


def localization_scores(maps: Tensor, outlines: Tensor) -> LocalizationScores:
    """Compares maps (N, rows, columns), all >= 0, with the outlines (N, S, S) of `load_outlines`.

    mass: the fraction of the sum of the map that lies on the animal.
    pointing: whether the maximum lies on the animal (Zhang et al. 2018, without their margin); if
        several pixels share the maximum, the fraction of them on the animal.
    average_precision: of the pixels, as scikit-learn computes it.
    ious: intersection over union of {map >= t} and the animal, for t = 0, 1/LEVELS, ..., 1.
    """
    rows = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy sorts in parallel
        # All maps at the image size at once would need much memory.
        for some, labels in zip(maps.split(64), outlines.split(64), strict=True):
            values = resize_maps(some, outlines.shape[-1]).numpy()
            rows += pool.map(_score_image, values, labels.numpy())
    return LocalizationScores(*map(np.array, zip(*rows, strict=True)))


def _score_image(values: np.ndarray, outline: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """The four measures of one image from its map and its outline, (S, S) each."""
    counted = outline != BORDER
    values, is_animal = values[counted], outline[counted] == ANIMAL
    if values.max() <= 0:  # an all-zero map counts as a uniform one
        values = np.ones_like(values)
    precision = average_precision(values, is_animal)  # before scaling creates ties
    values = values / values.max()
    # The highest threshold that each pixel reaches; 1e-4 tolerates rounding errors.
    level = np.floor(values * LEVELS + 1e-4).astype(int)
    reached = [np.bincount(level[pixels], minlength=LEVELS + 1)[::-1].cumsum()[::-1]
               for pixels in (is_animal, ~is_animal)]  # fmt: skip
    return (
        float(values[is_animal].sum(dtype=float) / values.sum(dtype=float)),
        float(is_animal[values == values.max()].mean()),
        precision,
        reached[0] / (is_animal.sum() + reached[1]),
    )


def average_precision(values: np.ndarray, is_animal: np.ndarray) -> float:
    """The mean precision down to each hit, (n,) each; pixels with equal values count together.

    It equals scikit-learn's `average_precision_score`, which takes longer to check its arguments
    than to sort. There are 14 maps of two models for each of 4,000 images of Pets.
    """
    order = np.argsort(-values)
    hits, ranked = is_animal[order].cumsum(), values[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of each group of equals
    found = hits[last]
    return float((np.diff(found, prepend=0) * found / (last + 1)).sum() / max(1, found[-1]))


def baseline_maps(grid_size: tuple[int, int]) -> dict[str, Tensor]:
    """Maps (rows, columns) that do not depend on the image: uniform and a Gaussian at the center.

    The Gaussian's standard deviation is a quarter of the side. Only `mass` depends on it.
    """
    y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in grid_size)  # from the center, in sides
    squared = y[:, None] ** 2 + x[None] ** 2
    return {"uniform": torch.ones(grid_size), CENTER: torch.exp(-squared / (2 * 0.25**2))}


def summarize(
    scores: LocalizationScores, level: int, references: dict[str, tuple[LocalizationScores, int]]
) -> dict[str, dict[str, list[float]]]:
    """Means and paired differences over the images, with 95 % bootstrap intervals.

    Args:
        scores: of the test images.
        level: number of the threshold chosen on the validation images.
        references: by name, other scores of the same images, each with its own threshold.

    Returns: {"mean": [mean, low, high], reference: [difference, low, high], ...} per measure.
    """
    summary = {}
    for measure in MEASURES:
        values = scores.values(measure, level)
        summary[measure] = {"mean": stats.mean_interval(values)}
        for name, (reference, its_level) in references.items():
            difference = values - reference.values(measure, its_level)
            summary[measure][name] = stats.mean_interval(difference)
    return summary


@torch.no_grad()
def deletion_insertion(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int = 10
) -> dict[str, np.ndarray]:
    """Probability of the target class while pixels are deleted or inserted in the map's order.

    Pixels with the largest map values come first. A deleted pixel gets the mean color (zero after
    normalization). Insertion starts from a strongly blurred image (a Gaussian whose standard
    deviation is an eighth of the side), which has no sharp edges that could mislead the model.

    Args:
        images: (B, C, S, S), normalized.
        maps: (B, rows, columns); ties are broken row by row.
        targets: the class to explain for each image, (B,).

    Returns: "deletion" and "insertion", each (B, steps + 1): the probability after a fraction
        k / steps of the pixels. Runs in bf16 where that is faster, because it needs many forward
        passes.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    B, _, S, _ = images.shape
    device = images.device
    maps, targets = maps.to(device), targets.to(device)
    order = resize_maps(maps, S).flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # of each pixel
    kernel_size, sigma = 2 * (S // 4) + 1, [S / 8, S / 8]
    blurred = gaussian_blur(images, [kernel_size, 1], sigma)  # one axis at a time: the same result
    blurred = gaussian_blur(blurred, [1, kernel_size], sigma)  # in a hundredth of the time
    probabilities: dict[str, list[Tensor]] = {"deletion": [], "insertion": []}
    use_bf16 = machine.bf16_is_faster(device)
    with eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
        for step in range(steps + 1):
            selected = (rank < round(step / steps * S * S)).reshape(B, 1, S, S)
            changed = {
                "deletion": images.masked_fill(selected, 0),
                "insertion": torch.where(selected, images, blurred),
            }
            for kind, inputs in changed.items():
                probability = model(inputs).float().softmax(1).gather(1, targets[:, None])
                probabilities[kind].append(probability[:, 0])
    return {kind: torch.stack(parts, 1).cpu().numpy() for kind, parts in probabilities.items()}


def area_under(curves: np.ndarray) -> np.ndarray:
    """Area under each curve (N, steps + 1) on [0, 1], by the trapezoidal rule, (N,)."""
    return np.trapezoid(curves, dx=1 / (curves.shape[1] - 1), axis=1)
