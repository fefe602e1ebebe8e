"""A Vision Transformer from scratch, with the parameter names of timm.

    images -> patches -> tokens (+ class token, + pos_embed) -> blocks -> norm -> pool -> head

Axis letters in the shape comments: B images, C channels, H x W pixels, P patch size, N tokens
(one per patch, and usually one for the class token), D embed_dim, h heads, d = D / h.

Released ViT weights load strictly, and tests/test_model.py checks that logits and gradients then
equal those of timm and transformers.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; LayerScale: Touvron et al. 2021,
"Going deeper with Image Transformers"; drop path: Huang et al. 2016, "Deep Networks with
Stochastic Depth".
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a ViT. Names and meanings are timm's; sizes are in pixels.

    train.py sets most of these from its constants, such as EMBED_DIM: change them there.

    Raises ConfigError for an invalid value.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head; the model returns the pooled features
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0  # hidden width of the MLP, divided by embed_dim
    qkv_bias: bool = True
    drop_rate: float = 0.0  # dropout before the head
    attn_drop_rate: float = 0.0  # dropout on the attention weights
    drop_path_rate: float = 0.0  # rate in the last block; increases linearly from 0 in the first
    init_values: float | None = None  # initial value of LayerScale; None: no LayerScale
    global_pool: str = "token"  # "token": the class token; "avg": the mean of the patch tokens
    class_token: bool = True
    no_embed_class: bool = False  # True: the class token gets no position embedding
    dynamic_img_size: bool = False  # True: interpolate pos_embed for other image sizes
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _validate(self)


class PatchEmbed(nn.Module):
    """Splits images into patches and projects each patch to a token.

    A convolution whose stride equals its kernel size does exactly this: it visits each patch once
    and applies the same linear map (C * P * P -> D) to all of them.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.img_size = config.img_size
        self.patch_size = config.patch_size
        self.dynamic_img_size = config.dynamic_img_size
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, x: Tensor) -> Tensor:
        img_size = None if self.dynamic_img_size else self.img_size
        _check_image_shape(x, self.proj.in_channels, self.patch_size, img_size)
        x = self.proj(x)  # (B, C, H, W) -> (B, D, H/P, W/P)
        return x.flatten(2).transpose(1, 2)  # (B, N, D), patches row by row


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v in each head (Vaswani et al. 2017)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = (dim // config.num_heads) ** -0.5
        self.fused_attn = True  # False: compute it explicitly, so that hooks on attn_drop run
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(config.attn_drop_rate)
        self.proj = nn.Linear(dim, dim)

    # No return annotation: TorchScript then infers Tensor, the type without `return_weights`.
    def forward(self, x: Tensor, return_weights: bool = False):
        """Lets tokens exchange information: (B, N, D) -> (B, N, D).

        With `return_weights`, returns a tuple of this output and the attention weights
        (B, h, N, N). Row i holds how much token i attends to each token and sums to one.
        """
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)  # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)

        if self.fused_attn and not return_weights and not _is_cpu_bf16():
            # One kernel for the three lines below; it never stores the (N, N) weights.
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
            weights = None
        else:
            weights = (q @ k.transpose(-2, -1)) * self.scale  # (B, h, N, N)
            weights = weights.softmax(dim=-1)
            out = self.attn_drop(weights) @ v  # (B, h, N, d)

        out = out.transpose(1, 2).reshape(B, N, D)  # concatenate the heads
        out = self.proj(out)
        if return_weights and not torch.jit.is_scripting():
            return out, weights
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU in between, applied to each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel. A small initial value keeps a deep model close to identity."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), float(config.init_values)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """In training, zeroes a residual branch (B, ...) for a random fraction `rate` of the images.

    The branches that remain are divided by 1 - rate, so the expected value does not change.
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
        has_layer_scale = config.init_values is not None
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.ls2 = LayerScale(config) if has_layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x


class VisionTransformer(nn.Module):
    """The whole model: normalized images (B, C, H, W) to logits (B, num_classes)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.global_pool = config.global_pool
        self.no_embed_class = config.no_embed_class
        self.bf16_residual = False  # True: on a CPU, bf16 includes the residual stream
        self.num_prefix_tokens = 1 if config.class_token else 0
        dim = config.embed_dim
        num_positions = (config.img_size // config.patch_size) ** 2
        if config.class_token and not config.no_embed_class:
            num_positions += 1

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, dim))
        # device="cpu" because tensors on the meta device, if that is the default, hold no values.
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(Block(config, drop_path=rate) for rate in rates))
        # One norm at the end, as in timm: of all tokens or, with "avg", of their mean.
        avg = config.global_pool == "avg"
        self.norm = nn.Identity() if avg else nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(dim, eps=config.norm_eps) if avg else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes as timm does: linear layers and position embeddings with std 0.02."""
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
        grid_size = x.shape[-1] // self.patch_embed.patch_size  # patches along a side
        x = self.patch_embed(x)
        pos_embed = self.pos_embed
        if self.patch_embed.dynamic_img_size:
            num_prefix_tokens = 0 if self.no_embed_class else self.num_prefix_tokens
            pos_embed = interpolate_pos_embed(pos_embed, grid_size, num_prefix_tokens)

        if self.no_embed_class:  # only the patch tokens have position embeddings
            x = x + pos_embed
            if self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        else:  # the class token has a position embedding, too
            if self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            x = x + pos_embed
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to all tokens after the last block and norm (B, N, D)."""
        x = self.embed(x)
        if self.bf16_residual and _is_cpu_bf16():
            x = x.to(torch.bfloat16)  # norms and additions then need no casts
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) to logits (B, num_classes), or with `pre_logits` to features (B, D)."""
        if self.global_pool == "token":
            features = x[:, 0]
        else:
            features = x[:, self.num_prefix_tokens :].mean(dim=1)
        features = self.head_drop(self.fc_norm(features))  # (B, D)
        return features if pre_logits else self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # Tools written for timm's models call the three methods below.

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to exempt from weight decay, besides one-dimensional ones."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort parameters into layers; all others are in the last layer."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],  # norm: in the last block
        }

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False,
        norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:  # fmt: skip
        """Images (B, C, H, W) to the final tokens (B, N, D) and a list of block outputs.

        Args:
            indices: a number n for the last n blocks, a list of blocks, or None for all blocks.
            return_prefix_tokens: return pairs (patch tokens, class token), not only patch tokens.
            norm: apply the final norm to each output.
            stop_early: skip the blocks after the last one in `indices`.
            output_fmt: "NCHW" for outputs (B, D, H/P, W/P), "NLC" for (B, H/P * W/P, D).
            intermediates_only: return only the list.
        """
        depth, num_prefix = len(self.blocks), self.num_prefix_tokens
        if indices is None:
            indices = depth
        if isinstance(indices, int):
            indices = range(-indices, 0)  # -1 is the last block
        if not all(-depth <= i < depth for i in indices):
            raise ValueError(f"indices={list(indices)} do not fit a model with {depth} blocks")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'")
        chosen = {i % depth for i in indices}
        grid_size = x.shape[-1] // self.patch_embed.patch_size

        x = self.embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > max(chosen):
                break
            x = block(x)
            if i in chosen:
                tokens = self.norm(x) if norm else x  # (B, N, D)
                prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
                if output_fmt == "NCHW":
                    patches = patches.mT.unflatten(2, (grid_size, grid_size)).contiguous()
                pair = return_prefix_tokens and num_prefix > 0
                intermediates.append((patches, prefix) if pair else patches)
        return intermediates if intermediates_only else (self.norm(x), intermediates)


# torch.fx cannot trace branches that depend on a shape; `wrap` makes it keep the call instead.
@torch.fx.wrap
def interpolate_pos_embed(pos_embed: Tensor, grid_size: int, num_prefix_tokens: int) -> Tensor:
    """Interpolates position embeddings (1, prefix + n * n, D) to another grid, as timm does.

    Bicubic with antialiasing. The first `num_prefix_tokens` embeddings, such as that of the class
    token, are not part of the grid and do not change. `grid_size` counts patches along a side.

    Raises ValueError if n is not a whole number.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old_size = int(math.sqrt(patches.shape[1]))
    if old_size**2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} position embeddings do not form a square grid")
    if old_size == grid_size:
        return pos_embed
    grid = patches.float().reshape(1, old_size, old_size, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    patches = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, grid_size ** 2, D)
    return torch.cat([prefix, patches], dim=1)


@torch.fx.wrap
def _check_image_shape(x: Tensor, in_chans: int, patch_size: int, img_size: int | None) -> None:
    """Raises ValueError unless x is (B, in_chans, img_size, img_size).

    With `img_size` None, images may be of any size that is a whole number of patches.
    """
    if img_size is None:
        img_size = max(x.shape[-1] // patch_size, 1) * patch_size
    if list(x.shape[1:]) != [in_chans, img_size, img_size]:
        expected = f"(B, {in_chans}, {img_size}, {img_size})"
        raise ValueError(f"expected images of shape {expected}, got {list(x.shape)}")


def _is_cpu_bf16() -> bool:
    """Whether autocast runs the model in bf16 on the CPU.

    This is the one case in which PyTorch's fused attention is slow: it takes 2.4 times as long as
    explicit attention (PyTorch 2.15, N = 65, on a CPU with bf16 instructions).
    """
    if torch.jit.is_scripting():  # TorchScript cannot ask for the dtype of autocast
        return False
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class ConfigError(ValueError):
    """An invalid ViTConfig. The message names the field and a value that would work."""


def _validate(config: ViTConfig) -> None:
    """Raises ConfigError for the first field that has a wrong type or value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is bool and not isinstance(value, bool):
            raise _error(config, field.name, "True or False")
        if field.type is int and type(value) is not int:  # isinstance would accept True
            raise _error(config, field.name, f"a single int, such as {field.default}")
        if field.type is float and not _is_finite(value):
            raise _error(config, field.name, f"a finite number, such as {field.default}")
    if config.init_values is not None and not _is_finite(config.init_values):
        raise _error(config, "init_values", "a finite number, such as 1e-5, or None")

    for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
        if getattr(config, name) < 1:
            raise _error(config, name, "at least 1")
    if config.num_classes < 0:
        raise _error(config, "num_classes", "at least 0")
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0 <= getattr(config, name) < 1:
            raise _error(config, name, "in [0, 1), such as 0.1")
    if config.embed_dim * config.mlp_ratio < 1:
        raise _error(config, "mlp_ratio", "large enough for one hidden unit, such as 4.0")
    if config.norm_eps <= 0:
        raise _error(config, "norm_eps", "above 0, such as 1e-6")
    if config.global_pool not in ("token", "avg"):
        raise _error(config, "global_pool", "'token' or 'avg'")
    if config.global_pool == "token" and not config.class_token:
        raise _error(config, "class_token", "True, unless you set global_pool='avg'")

    for part, whole in (("patch_size", "img_size"), ("num_heads", "embed_dim")):
        divisor, size = getattr(config, part), getattr(config, whole)
        if size % divisor != 0:
            divisors = [i for i in range(1, size + 1) if size % i == 0]
            multiple = max(size // divisor, 1) * divisor
            raise ConfigError(
                f"{part}={divisor} must divide {whole}={size}. Set {part} to one of {divisors}, "
                f"or set {whole} to {multiple}"
            )


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _error(config: ViTConfig, name: str, advice: str) -> ConfigError:
    return ConfigError(f"{name}={getattr(config, name)!r} must be {advice}")
