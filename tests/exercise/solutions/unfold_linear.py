"""PatchEmbed with unfold and a linear layer, as the sheet suggests."""

import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.dynamic_img_size = config.dynamic_img_size
        self.proj = nn.Linear(config.in_chans * config.patch_size**2, config.embed_dim)

    def forward(self, x):
        patches = F.unfold(x, kernel_size=self.patch_size, stride=self.patch_size)
        return self.proj(patches.transpose(1, 2))
