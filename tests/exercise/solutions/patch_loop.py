"""PatchEmbed with two loops over the grid, and its own weight matrix."""

import torch
from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.dynamic_img_size = config.dynamic_img_size
        n = config.in_chans * config.patch_size * config.patch_size
        self.weight = nn.Parameter(torch.randn(n, config.embed_dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, x):
        P = self.patch_size
        tokens = []
        for i in range(x.shape[2] // P):
            for j in range(x.shape[3] // P):
                patch = x[:, :, i * P : (i + 1) * P, j * P : (j + 1) * P]
                tokens.append(patch.flatten(1) @ self.weight + self.bias)
        return torch.stack(tokens, dim=1)
