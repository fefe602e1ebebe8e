"""Attention with three linear layers, as in the Transformer paper."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.n_heads = config.num_heads
        self.head_dim = D // config.num_heads
        self.query = nn.Linear(D, D, bias=config.qkv_bias)
        self.key = nn.Linear(D, D, bias=config.qkv_bias)
        self.value = nn.Linear(D, D, bias=config.qkv_bias)
        self.out = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.attn_drop_rate)

    def split(self, x):
        B, N, _ = x.shape
        return x.view(B, N, self.n_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x, return_weights=False):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        attn = torch.matmul(q, k.transpose(-1, -2)) * self.head_dim**-0.5
        attn = attn.softmax(-1)
        y = torch.matmul(self.dropout(attn), v).permute(0, 2, 1, 3).contiguous()
        y = self.out(y.view(y.shape[0], y.shape[1], -1))
        if return_weights:
            return y, attn
        return y
