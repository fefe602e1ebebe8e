"""Parameters with more than two axes, which einsum applies to the input."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = p = config.patch_size
        self.weight = nn.Parameter(torch.randn(p, p, config.in_chans, config.embed_dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, x):
        B, C, H, W = x.shape
        p = self.patch_size
        x = x.reshape(B, C, H // p, p, W // p, p)
        return torch.einsum("bchpwq,pqcd->bhwd", x, self.weight).flatten(1, 2) + self.bias


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, h, self.p = config.embed_dim, config.num_heads, config.attn_drop_rate
        d = D // h
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(D, h, d)) for _ in "qkv")
        self.bias = nn.Parameter(torch.zeros(3, h, 1, d)) if config.qkv_bias else None
        self.w_o = nn.Parameter(torch.randn(h, d, D))
        self.b_o = nn.Parameter(torch.zeros(D))

    def forward(self, x, return_weights=False):
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        if self.bias is not None:
            q, k, v = q + self.bias[0], k + self.bias[1], v + self.bias[2]
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out = F.dropout(weights, self.p, self.training) @ v
        out = torch.einsum("bhnd,hde->bne", out, self.w_o) + self.b_o
        return (out, weights) if return_weights else out
