"""MLP with the GELU written out through the error function."""

import math

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lin1 = nn.Linear(config.embed_dim, int(config.mlp_ratio * config.embed_dim))
        self.lin2 = nn.Linear(int(config.mlp_ratio * config.embed_dim), config.embed_dim)

    def gelu(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))

    def forward(self, x):
        x = self.lin1(x)
        x = self.gelu(x)
        x = self.lin2(x)
        return x
