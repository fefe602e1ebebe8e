"""A student's solution of all parts, which tests paste into the hand-out.

mistakes_made.py makes mistakes in it.
"""

# ruff: noqa: SIM108
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import DropPath, LayerScale


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        P = config.patch_size
        self.patch_size = P
        self.dynamic_img_size = config.dynamic_img_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=P, stride=P)

    def forward(self, x):
        B = x.shape[0]
        x = self.proj(x)
        D = x.shape[1]
        x = x.permute(0, 2, 3, 1)
        x = x.reshape(B, -1, D)
        return x


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        hidden = int(D * config.mlp_ratio)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)

    def forward(self, x):
        h = self.fc1(x)
        h = F.gelu(h)
        h = self.fc2(h)
        return h


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.h = config.num_heads
        self.d = D // self.h
        self.p = config.attn_drop_rate
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x, return_weights=False):
        B, N, D = x.shape
        q, k, v = self.qkv(x).split(D, dim=-1)
        q = q.reshape(B, N, self.h, self.d).transpose(1, 2)
        k = k.reshape(B, N, self.h, self.d).transpose(1, 2)
        v = v.reshape(B, N, self.h, self.d).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.d)
        weights = torch.softmax(scores, dim=3)
        dropped = F.dropout(weights, self.p, self.training)
        out = dropped @ v
        out = out.transpose(1, 2).reshape(B, N, D)
        out = self.proj(out)
        return (out, weights) if return_weights else out


class Block(nn.Module):
    def __init__(self, config, drop_path=0.0):
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(config)
        self.drop = DropPath(drop_path)
        if config.init_values is not None:
            self.ls1 = LayerScale(config)
            self.ls2 = LayerScale(config)
        else:
            self.ls1 = nn.Identity()
            self.ls2 = nn.Identity()

    def forward(self, x):
        a = self.attn(self.norm1(x))
        x = x + self.drop(self.ls1(a))
        m = self.mlp(self.norm2(x))
        x = x + self.drop(self.ls2(m))
        return x


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.embed_dim
        n = (config.img_size // config.patch_size) ** 2
        self.num_prefix_tokens = 1 if config.class_token else 0
        self.patch_embed = PatchEmbed(config)
        self.cls_token = None
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            if not config.no_embed_class:
                n = n + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, n, D))
        blocks = []
        for i in range(config.depth):
            rate = config.drop_path_rate * i / max(config.depth - 1, 1)
            blocks.append(Block(config, rate))
        self.blocks = nn.ModuleList(blocks)
        if config.global_pool == "avg":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(D, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(D, eps=1e-6)
            self.fc_norm = nn.Identity()
        self.dropout = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(D, config.num_classes)
        self.init_weights()

    def embed(self, x):
        x = self.patch_embed(x)
        if self.cls_token is not None:
            cls = self.cls_token.repeat(x.shape[0], 1, 1)
            x = torch.cat((cls, x), dim=1)
        x = x + self.pos_embed
        return x

    def forward_features(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x

    def forward_head(self, x, pre_logits=False):
        if self.config.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        else:
            x = x[:, 0]
        x = self.dropout(self.fc_norm(x))
        if pre_logits:
            return x
        x = self.head(x)
        return x


def training_step(model, optimizer, images, labels):
    model.train()
    optimizer.zero_grad()
    logits = model(images)
    loss = nn.CrossEntropyLoss()(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate(model, batches, train_transform, eval_transform):
    model.eval()
    correct = 0
    total = 0
    with torch.no_grad():
        for images, labels in batches:
            images = eval_transform(images)
            predicted = model(images).argmax(1)
            correct += (predicted == labels).sum().item()
            total += len(labels)
    return correct / total


def replace_head(model, num_classes):
    for p in model.parameters():
        p.requires_grad = False
    model.head = nn.Linear(model.head.in_features, num_classes)
