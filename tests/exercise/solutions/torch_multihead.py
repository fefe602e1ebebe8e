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
        out, _ = self.attn(x, x, x, need_weights=False)
        if not return_weights:
            return out
        training = self.attn.training
        self.attn.eval()  # in training mode the layer returns weights after dropout
        _, weights = self.attn(x, x, x, average_attn_weights=False)
        self.attn.train(training)
        return out, weights
