"""Attention with PyTorch's nn.MultiheadAttention."""

from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = nn.MultiheadAttention(
            config.embed_dim,
            config.num_heads,
            dropout=config.attn_drop_rate,
            bias=config.qkv_bias,
            batch_first=True,
        )

    def forward(self, x, return_weights=False):
        out, weights = self.attn(x, x, x, need_weights=True, average_attn_weights=False)
        return (out, weights) if return_weights else out
