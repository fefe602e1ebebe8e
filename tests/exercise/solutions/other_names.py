"""VisionTransformer with names from torchvision, blocks in a ModuleList, norm and head in one."""

import torch
from torch import nn


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_prefix_tokens = int(config.class_token)
        self.patch_embed = PatchEmbed(config)  # noqa: F821
        n = (config.img_size // config.patch_size) ** 2
        self.cls_token = None
        if config.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, config.embed_dim))
        extra = self.num_prefix_tokens if not config.no_embed_class else 0
        self.pos_embed = nn.Parameter(torch.randn(1, n + extra, config.embed_dim))
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.encoder_layers = nn.ModuleList([Block(config, r) for r in rates])  # noqa: F821
        self.ln = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.drop = nn.Dropout(config.drop_rate)
        self.classifier = nn.Linear(config.embed_dim, config.num_classes)
        self.init_weights()

    def embed(self, x):
        x = self.patch_embed(x)
        b = x.shape[0]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(b, -1, -1), x], dim=1)
        return x + self.pos_embed

    def forward_features(self, x):
        x = self.embed(x)
        for layer in self.encoder_layers:
            x = layer(x)
        return x

    def forward_head(self, x, pre_logits=False):
        if self.config.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        else:
            x = x[:, 0, :]
        x = self.drop(self.ln(x))
        return x if pre_logits else self.classifier(x)
