"""Block with a small helper module for norm and residual connection."""

from torch import nn


class Residual(nn.Module):
    def __init__(self, config, branch, drop_path):
        super().__init__()
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.branch = branch
        self.scale = nn.Identity() if config.init_values is None else LayerScale(config)  # noqa: F821
        self.drop_path = DropPath(drop_path)  # noqa: F821

    def forward(self, x):
        return self.drop_path(self.scale(self.branch(self.norm(x)))) + x


class Block(nn.Module):
    def __init__(self, config, drop_path=0.0):
        super().__init__()
        self.attention = Residual(config, Attention(config), drop_path)  # noqa: F821
        self.feed_forward = Residual(config, MLP(config), drop_path)  # noqa: F821

    def forward(self, x):
        return self.feed_forward(self.attention(x))
