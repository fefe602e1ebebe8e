"""Mixup and cutmix, which also work when several processes share a batch."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.training.config import FitConfig


class Mixing:
    """Mixes a random fraction of the batches, each by mixup or cutmix, as torchvision does."""

    def __init__(self, config: FitConfig, classes: int, accelerator: Accelerator):
        self._accelerator, self._probability = accelerator, config.mix_probability
        self._transforms: list[nn.Module] = []
        if config.mixup or config.cutmix:
            from torchvision.transforms import v2  # slow to import

            if config.mixup:
                self._transforms.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
            if config.cutmix:
                self._transforms.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (b, C, H, W) and labels (b,), or returns them unchanged.

        All random numbers come from PyTorch's global generator, which must be in the same state in
        all processes.

        Returns: images, and labels (b,) or, if the batch was mixed, probabilities (b, classes).
        """
        if not self._transforms or torch.rand(()) >= self._probability:
            return images, labels
        mix = self._transforms[torch.randint(len(self._transforms), ())]
        if self._accelerator.num_processes == 1:
            return mix(images, labels)
        # Each image is mixed with the one before it in the batch. The image before this process's
        # first one is the last one of another process.
        previous = self._accelerator.process_index - 1
        images, labels = (
            torch.cat([self._accelerator.gather(x[-1:])[previous][None], x])
            for x in (images, labels)
        )
        images, targets = mix(images, labels)
        return images[1:], targets[1:]
