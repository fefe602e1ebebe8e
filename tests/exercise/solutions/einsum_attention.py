"""Attention with einsum only, which keeps its weights to draw them later."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.h = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.attn_drop = nn.Dropout(config.attn_drop_rate)

    def forward(self, x, return_weights=False):
        b, n, d = x.shape
        q, k, v = torch.chunk(self.qkv(x), 3, dim=-1)
        q = q.reshape(b, n, self.h, d // self.h)
        k = k.reshape(b, n, self.h, d // self.h)
        v = v.reshape(b, n, self.h, d // self.h)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (d // self.h) ** 0.5
        weights = torch.softmax(scores, dim=-1)
        self.last_weights = weights.detach()
        out = torch.einsum("bhij,bjhd->bihd", self.attn_drop(weights), v).reshape(b, n, d)
        out = self.proj(out)
        return (out, weights) if return_weights else out
