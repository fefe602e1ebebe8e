"""Mixup and cutmix, of the whole batch that several processes share."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms import v2

from lab.training.config import FitConfig


class Mixing:
    """Mixes a share of the batches by mixup or cutmix, torchvision's, one of them at random."""

    def __init__(self, config: FitConfig, classes: int, accelerator: Accelerator):
        self.accelerator, self.share = accelerator, config.mix_probability
        self.ways: list[nn.Module] = []
        if config.mixup:
            self.ways.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            self.ways.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, C, S, S) and targets: labels (b,) as they were, or shares (b, classes).

        All draws come from torch's generator, which must be in the same state in all processes.
        """
        if not self.ways or torch.rand(()) >= self.share:
            return images, labels
        way = self.ways[torch.randint(len(self.ways), ())]
        if self.accelerator.num_processes == 1:
            return way(images, labels)
        # Each image is mixed with the one before it: the first with the last of another process.
        before = self.accelerator.process_index - 1
        with_one_more = [
            torch.cat([self.accelerator.gather(x[-1:])[before][None], x]) for x in (images, labels)
        ]
        images, targets = way(*with_one_more)
        return images[1:], targets[1:]
