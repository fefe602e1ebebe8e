"""MLP that processes all tokens as one long list."""

import torch.nn as nn


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.hidden = int(config.embed_dim * config.mlp_ratio)
        self.layers = nn.ModuleList(
            [nn.Linear(config.embed_dim, self.hidden), nn.Linear(self.hidden, config.embed_dim)]
        )
        self.activation = nn.GELU(approximate="none")

    def forward(self, x):
        b, n, d = x.shape
        x = x.contiguous().view(b * n, d)
        x = self.layers[0](x)
        x = self.activation(x)
        x = self.layers[1](x)
        return x.view(b, n, d)
