"""PatchEmbed with einops, in the order (p1 p2 c) of lucidrains' vit-pytorch."""

from einops import rearrange
from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.dynamic_img_size = config.dynamic_img_size
        p = config.patch_size
        self.to_embedding = nn.Linear(p * p * config.in_chans, config.embed_dim)

    def forward(self, img):
        p = self.patch_size
        x = rearrange(img, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)
        return self.to_embedding(x)
