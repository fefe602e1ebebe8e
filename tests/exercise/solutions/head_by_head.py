"""Attention with one module per head, whose results are concatenated."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Head(nn.Module):
    def __init__(self, dim, head_dim, bias, dropout):
        super().__init__()
        self.q = nn.Linear(dim, head_dim, bias=bias)
        self.k = nn.Linear(dim, head_dim, bias=bias)
        self.v = nn.Linear(dim, head_dim, bias=bias)
        self.head_dim = head_dim
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        w = F.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(self.head_dim), dim=-1)
        return torch.bmm(self.dropout(w), v), w


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.embed_dim // config.num_heads
        self.layers = nn.ModuleList(
            [
                Head(config.embed_dim, d, config.qkv_bias, config.attn_drop_rate)
                for _ in range(config.num_heads)
            ]
        )
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x, return_weights=False):
        results = [head(x) for head in self.layers]
        out = self.proj(torch.cat([r[0] for r in results], dim=-1))
        if return_weights:
            return out, torch.stack([r[1] for r in results], dim=1)
        return out
