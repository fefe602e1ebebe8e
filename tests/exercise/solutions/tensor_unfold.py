"""PatchEmbed with Tensor.unfold on both axes; MLP with one nn.Sequential."""

from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.dynamic_img_size = config.dynamic_img_size
        self.linear = nn.Linear(config.in_chans * config.patch_size**2, config.embed_dim)

    def forward(self, x):
        P = self.patch_size
        x = x.unfold(2, P, P).unfold(3, P, P)  # B, C, H/P, W/P, P, P
        x = x.permute(0, 2, 3, 1, 4, 5)
        x = x.reshape(x.shape[0], -1, x.shape[3] * P * P)
        return self.linear(x)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = round(config.embed_dim * config.mlp_ratio)
        self.net = nn.Sequential(
            nn.Linear(config.embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.embed_dim),
        )

    def forward(self, x):
        return self.net(x)
