"""Does the map show what the model uses? Deletion and insertion (Petsiuk et al. 2018, RISE)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from lab.attention.extraction import as_evaluated
from lab.attention.localization import upsample
from lab.models.profiling import has_bf16


@dataclass(frozen=True)
class Curves:
    """Probability of the explained class as pixels go (deletion) or come (insertion).

    Both (N, steps + 1): after the share k / steps of the pixels, in the map's order.
    """

    deletion: np.ndarray
    insertion: np.ndarray

    @staticmethod
    def area(curve: np.ndarray) -> np.ndarray:
        """Area under each curve, (N,): low is good for deletion, high for insertion."""
        return np.trapezoid(curve, dx=1 / (curve.shape[1] - 1), axis=1)


@torch.no_grad()
def curves(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int = 10
) -> Curves:
    """Takes the pixels with the largest values first.

    Deleted pixels become the mean colour (zero, normalised); insertion starts from the image
    blurred beyond recognition (a Gaussian of an eighth of the side), which has no sharp edges that
    a model could mistake for something.

    Args:
        images: (B, C, S, S), normalised.
        maps: (B, rows, columns); equal values are taken row by row.
        targets: the class that is explained, (B,).

    In bf16 where it is in hardware, as in training: there are many forward passes.
    """
    B, _, S, _ = images.shape
    device = images.device
    maps, targets = maps.to(device), targets.to(device)
    order = upsample(maps, S).flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(S * S, device=device).expand(B, -1)
    )
    width, sigma = 2 * (S // 4) + 1, [S / 8, S / 8]
    blurred = V.gaussian_blur(images, [width, 1], sigma)  # one axis after the other: the same
    blurred = V.gaussian_blur(blurred, [1, width], sigma)  # as at once, in a hundredth of the time
    found: list[list[Tensor]] = [[], []]
    with (
        as_evaluated(model),
        torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)),
    ):
        for step in range(steps + 1):
            taken = (rank < round(step / steps * S * S)).reshape(B, 1, S, S)
            deleted = images.masked_fill(taken, 0)
            inserted = torch.where(taken, images, blurred)
            for part, changed in zip(found, (deleted, inserted), strict=True):
                sure = model(changed).float().softmax(1).gather(1, targets[:, None])
                part.append(sure[:, 0])
    deletion, insertion = (torch.stack(part, 1).cpu().numpy() for part in found)
    return Curves(deletion, insertion)
