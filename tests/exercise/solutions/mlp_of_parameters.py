"""MLP with its own weight matrices, x @ W."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        H = int(D * config.mlp_ratio)
        self.W1 = nn.Parameter(torch.empty(D, H))
        self.b1 = nn.Parameter(torch.zeros(H))
        self.W2 = nn.Parameter(torch.empty(H, D))
        self.b2 = nn.Parameter(torch.zeros(D))
        nn.init.xavier_uniform_(self.W1)
        nn.init.xavier_uniform_(self.W2)

    def forward(self, x):
        return F.gelu(x @ self.W1 + self.b1) @ self.W2 + self.b2
