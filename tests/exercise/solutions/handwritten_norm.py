"""Block with a LayerNorm written by hand, and the modules registered in an unusual order."""

import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        var = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


class Block(nn.Module):
    def __init__(self, config, drop_path=0.0):
        super().__init__()
        self.mlp = MLP(config)  # noqa: F821
        self.attn = Attention(config)  # noqa: F821
        self.norm1 = Norm(config.embed_dim, config.norm_eps)
        self.norm2 = Norm(config.embed_dim, config.norm_eps)
        self.ls = config.init_values is not None
        if self.ls:
            self.ls1 = LayerScale(config)  # noqa: F821
            self.ls2 = LayerScale(config)  # noqa: F821
        self.drop_path = DropPath(drop_path)  # noqa: F821

    def forward(self, x):
        y = self.attn(self.norm1(x))
        if self.ls:
            y = self.ls1(y)
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        if self.ls:
            y = self.ls2(y)
        return x + self.drop_path(y)
