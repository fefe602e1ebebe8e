"""VisionTransformer that fills a tensor of tokens, and everything written in forward."""

import torch
from torch import nn


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.num_prefix_tokens = 1 if config.class_token else 0
        self.patch_embed = PatchEmbed(config)  # noqa: F821
        N = (config.img_size // config.patch_size) * (config.img_size // config.patch_size)
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(D))
        self.position_embedding = nn.Parameter(torch.zeros(N + self.num_prefix_tokens, D))
        rates = torch.linspace(0, config.drop_path_rate, config.depth).tolist()
        self.blocks = nn.Sequential(*[Block(config, rate) for rate in rates])  # noqa: F821
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(D, config.num_classes)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, images):
        patches = self.patch_embed(images)
        B, N, D = patches.shape
        n = self.num_prefix_tokens
        tokens = patches.new_zeros(B, N + n, D)
        if n:
            tokens[:, 0] = self.class_embedding
        tokens[:, n:] = patches
        tokens = self.blocks(tokens + self.position_embedding)
        if self.config.global_pool == "token":
            return self.head(self.drop(self.norm(tokens[:, 0])))
        return self.head(self.drop(self.norm(tokens[:, n:].mean(1))))
