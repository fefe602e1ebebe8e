"""Attention with its own matrices W_q, W_k, W_v, W_o, as in the formulas of the lecture."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.h = config.embed_dim, config.num_heads
        self.W_q = nn.Parameter(torch.randn(D, D) / D**0.5)
        self.W_k = nn.Parameter(torch.randn(D, D) / D**0.5)
        self.W_v = nn.Parameter(torch.randn(D, D) / D**0.5)
        self.W_o = nn.Parameter(torch.randn(D, D) / D**0.5)
        self.b_q = self.b_k = self.b_v = 0
        if config.qkv_bias:
            self.b_q = nn.Parameter(torch.zeros(D))
            self.b_k = nn.Parameter(torch.zeros(D))
            self.b_v = nn.Parameter(torch.zeros(D))
        self.b_o = nn.Parameter(torch.zeros(D))
        self.drop = nn.Dropout(config.attn_drop_rate)

    def heads(self, x):
        return x.unflatten(2, (self.h, -1)).transpose(1, 2)

    def forward(self, x, return_weights=False):
        q = self.heads(x @ self.W_q + self.b_q)
        k = self.heads(x @ self.W_k + self.b_k)
        v = self.heads(x @ self.W_v + self.b_v)
        w = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        y = (self.drop(w) @ v).transpose(1, 2).flatten(2) @ self.W_o + self.b_o
        return (y, w) if return_weights else y
