"""Attention with PyTorch's fused kernel, and the weights computed only on request."""

import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.p = config.attn_drop_rate
        self.qkv = nn.Linear(config.embed_dim, config.embed_dim * 3, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x, return_weights=False):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        y = self.proj(y.transpose(1, 2).flatten(2))
        if return_weights:
            w = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            return y, w
        return y
