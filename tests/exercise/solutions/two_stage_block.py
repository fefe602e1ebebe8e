"""Block with the two halves as methods, and its own stochastic depth."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, config, drop_path=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.self_attention = Attention(config)  # noqa: F821
        self.ln_2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = MLP(config)  # noqa: F821
        self.rate = drop_path
        self.scales = nn.ModuleList(
            [LayerScale(config) if config.init_values else nn.Identity() for _ in range(2)]  # noqa: F821
        )

    def maybe_drop(self, x):
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)

    def forward(self, inputs):
        x = self.self_attention(self.ln_1(inputs))
        inputs = inputs + self.maybe_drop(self.scales[0](x))
        x = self.mlp(self.ln_2(inputs))
        return inputs + self.maybe_drop(self.scales[1](x))
