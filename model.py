"""A Vision Transformer from scratch, with timm's names, so that released weights load strictly.

    images -> patches -> tokens (+ class token, + positions) -> Blocks -> norm -> pool -> head

Axis letters in the shape comments: B images, C channels, H x W pixels, P patch size,
N tokens (patches, plus one for the class token), D embed_dim, h heads, d = D / h.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; LayerScale: Touvron et al. 2021
(CaiT); drop path: Huang et al. 2016. Equality with timm and transformers: tests/test_model.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field and a value that would."""


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT: timm's names and meanings, sizes in pixels. Raises ConfigError."""

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the model returns the pooled features
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0  # hidden width of the MLP / embed_dim
    qkv_bias: bool = True
    drop_rate: float = 0.0  # dropout in front of the head
    attn_drop_rate: float = 0.0  # dropout on the attention weights
    drop_path_rate: float = 0.0  # of the last block; block i of n drops i / (n - 1) of it
    init_values: float | None = None  # LayerScale starts here; None: no LayerScale
    global_pool: str = "token"  # "token": the class token; "avg": the mean over patch tokens
    class_token: bool = True
    no_embed_class: bool = False  # True: the class token gets no position
    dynamic_img_size: bool = False  # True: images of other sizes too, positions resampled to them
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
        rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
        rules = [(name, getattr(self, name) >= 1, "at least 1") for name in sizes]
        rules += [(name, 0 <= getattr(self, name) < 1, "in [0, 1)") for name in rates]
        rules += [
            ("num_classes", self.num_classes >= 0, "at least 0 (0: no head)"),
            ("norm_eps", self.norm_eps > 0, "above 0"),
            ("global_pool", self.global_pool in ("token", "avg"), "'token' or 'avg'"),
            ("mlp_ratio", self.embed_dim * self.mlp_ratio >= 1, "enough for one hidden unit"),
            ("class_token", self.class_token or self.global_pool == "avg",
             "True with global_pool='token'; without a class token take global_pool='avg'"),
        ]  # fmt: skip
        for name, right, advice in rules:
            if not right:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {advice}")
        for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            n, d = getattr(self, whole), getattr(self, part)
            if n % d:
                divisors = [i for i in range(1, n + 1) if n % i == 0]
                raise ConfigError(
                    f"{part}={d} must divide {whole}={n}: take a {part} of {divisors}, "
                    f"or a {whole} of {n - n % d or d} or {n - n % d + d}"
                )


class PatchEmbed(nn.Module):
    """Cuts images into patches and maps each one linearly to a token.

    A convolution whose stride is its kernel size is exactly that: it sees every patch once and
    applies the same (P*P*C -> D) linear map to it. (B, C, H, W) -> (B, num_patches, D), row by row.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.img_size, self.dynamic_img_size = config.img_size, config.dynamic_img_size
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        side = self.img_size
        if self.dynamic_img_size:
            patch = self.proj.stride[0]
            side = max(x.shape[-1] // patch, 1) * patch
        if x.shape[1:] != (expected := (self.proj.in_channels, side, side)):
            raise ValueError(f"images are {tuple(x.shape[1:])} (C, H, W), not {expected}")
        x = self.proj(x)  # (B, D, H/P, W/P)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = (dim // config.num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.attn_drop = config.attn_drop_rate
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mixes the tokens (B, N, D) -> (B, N, D); with `return_weights` gives (B, h, N, N) too.

        Row i of the weights says how much token i takes from each token j; it sums to one.
        """
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        drop = self.attn_drop if self.training else 0.0

        # The fused kernel never writes the (N, N) weights to memory. Only in bf16 on a CPU is it
        # slow: attention with it takes 2.4 times as long as written out (PyTorch 2.15, N = 65).
        if not return_weights and (x.device.type, q.dtype) != ("cpu", torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)  # (B, h, N, d)
        else:
            weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, N, N)
            out = F.dropout(weights, drop) @ v  # (B, h, N, d)

        out = self.proj(out.transpose(1, 2).reshape(B, N, D))
        return (out, weights) if return_weights else out


class MLP(nn.Module):
    """Two linear layers with a GELU between, on every token alone: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel, small at first: a deep model starts near identity."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """While training, drops a residual branch (B, ...) for a random share `rate` of the images.

    What is kept grows by 1 / (1 - rate), so that the expectation stays.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Block(nn.Module):
    """A pre-norm encoder block: x + Attention(norm(x)), then x + MLP(norm(x)), on (B, N, D)."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0):
        super().__init__()

        def layer_scale() -> nn.Module:
            return nn.Identity() if config.init_values is None else LayerScale(config)

        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = layer_scale()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.ls2 = layer_scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """The whole model: images (B, C, H, W), normalised, to logits (B, num_classes)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        dim, classed = config.embed_dim, int(config.class_token)
        patches = (config.img_size // config.patch_size) ** 2
        positions = patches + (0 if config.no_embed_class else classed)

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if classed else None
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
        # One norm at the end, as in timm: on all tokens, or, with "avg", on their mean.
        avg = config.global_pool == "avg"
        self.norm = nn.Identity() if avg else nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(dim, eps=config.norm_eps) if avg else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights as timm draws them: truncated normal of deviation 0.02, biases zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the tokens that enter the first block (B, N, D)."""
        bare, classed = self.config.no_embed_class, self.cls_token is not None
        grid = x.shape[-1] // self.config.patch_size
        x = self.patch_embed(x)
        pos_embed = interpolate_pos_embed(self.pos_embed, grid, int(classed and not bare))
        if bare:
            x = x + pos_embed
        if classed:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x if bare else x + pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to all tokens after the last block and norm (B, N, D)."""
        return self.norm(self.blocks(self.embed(x)))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) to logits (B, num_classes)."""
        if self.config.global_pool == "token":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, int(self.config.class_token) :].mean(dim=1)
        return self.head(self.head_drop(self.fc_norm(pooled)))  # (B, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def interpolate_pos_embed(pos_embed: Tensor, grid_size: int, num_prefix_tokens: int) -> Tensor:
    """Resamples positions (1, prefix + n * n, D) to (1, prefix + grid_size ** 2, D), as timm does.

    Bicubic with antialiasing; the `num_prefix_tokens` first positions, such as the class token's,
    stay. `grid_size` counts the patches along a side. Raises ValueError if n is not whole.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old = round(patches.shape[1] ** 0.5)
    if old**2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} positions do not form a square grid")
    if old == grid_size:
        return pos_embed
    grid = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    patches = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, grid_size ** 2, D)
    return torch.cat([prefix, patches], dim=1)
