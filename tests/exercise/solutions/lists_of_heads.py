"""Attention with three lists of layers, one layer for each head, and fused q and k in each head."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, bias = config.embed_dim, config.qkv_bias
        self.d = D // config.num_heads
        heads = range(config.num_heads)
        self.qk_heads = nn.ModuleList([nn.Linear(D, 2 * self.d, bias=bias) for _ in heads])
        self.v_heads = nn.ModuleList([nn.Linear(D, self.d, bias=bias) for _ in heads])
        self.attn_drop = nn.Dropout(config.attn_drop_rate)
        self.proj = nn.Linear(D, D)

    def forward(self, x, return_weights=False):
        q, k = torch.stack([qk(x) for qk in self.qk_heads], dim=1).chunk(2, dim=-1)
        v = torch.stack([v(x) for v in self.v_heads], dim=1)
        weights = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1)
        out = torch.cat((self.attn_drop(weights) @ v).unbind(1), dim=-1)
        out = self.proj(out)
        return (out, weights) if return_weights else out
