"""Attention of one block, and where in the picture its tokens lie.

Attention weights of every block and head, taken from a model while it computes its logits.

    logits, blocks = attention_maps(model, images)
    blocks[-1].dense()                   # (B, h, N, N): row i is what token i takes from each token
    blocks[-1].of(blocks[-1].queries())  # (B, h, rows, columns): what the mean token looks at

For our ViT, timm's plain ViTs (deit, deit3, dinov2; with class token, registers or neither) and
timm's Swin v1 and v2. The weights are those that the model multiplies its values with: nothing is
computed a second time, except in `class_attention`, which leaves the model's fast kernel alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

from lab.core import UserError
from model import Attention, VisionTransformer


@dataclass(frozen=True)
class BlockAttention:
    """Attention of one block: in each group of tokens, what each takes from each.

    A ViT has one group, of all tokens. A Swin has one for each window; `places` puts a window's
    tokens where they lie in the picture, so that shifted windows are shifted back.

    weights: (B, h, G, n, n), G groups of n tokens; rows sum to one.
    places: (G, n), a token's index among the block's tokens: first the prefix (class token,
        registers), then the patches row by row; -1: padding, whose rows and columns are zero (what
        a patch gives to the padding of its window is lost to its row).
    grid: rows and columns of patches.
    """

    weights: Tensor
    places: Tensor
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def slots(self) -> Tensor:
        """`places` with padding sent to one slot behind the last token, (G, n)."""
        return self.places % (self.tokens + 1)

    def dense(self) -> Tensor:
        """(B, h, N, N) over all tokens; zero between tokens that do not see each other."""
        B, h = self.weights.shape[:2]
        out = self.weights.new_zeros(B, h, self.tokens + 1, self.tokens + 1)
        out[:, :, self.slots[:, :, None], self.slots[:, None, :]] = self.weights
        return out[:, :, :-1, :-1]

    def queries(self, which: str = "mean") -> Tensor:
        """A row (N,) of weights on queries: "class" for the class token, "mean" for all patches."""
        row = self.weights.new_zeros(self.tokens)
        if which == "class":
            row[0] = 1
        else:
            row[self.prefix :] = 1 / (self.grid[0] * self.grid[1])
        return row

    def pull(self, rows: Tensor) -> Tensor:
        """Rows of weights on queries times the attention: (B or 1, h or 1, N) -> (B, h, N)."""
        held = F.pad(rows, (0, 1))[..., self.slots]  # (B, h, G, n)
        given = (held[..., None, :] @ self.weights).squeeze(-2)  # (B, h, G, n)
        return self.gather(given)

    def gather(self, values: Tensor) -> Tensor:
        """Values of the groups' tokens (B, h, G, n) to the block's tokens (B, h, N)."""
        out = values.new_zeros(*values.shape[:2], self.tokens + 1)
        return out.index_add_(2, self.slots.flatten(), values.flatten(2))[..., :-1]

    def patches(self, rows: Tensor) -> Tensor:
        """The patches of (..., N) as pictures (..., rows, columns)."""
        return rows[..., self.prefix :].unflatten(-1, self.grid)

    def of(self, queries: Tensor) -> Tensor:
        """Where these queries (N,) look, head by head, as pictures (B, h, rows, columns)."""
        return self.patches(self.pull(queries[None, None]))

    def distance(self, pixels: float) -> Tensor:
        """Mean distance of what patches attend to, (B, h), in units of `pixels` a patch.

        As in Dosovitskiy et al. 2021, fig. 7: over the patches, the distance to every patch,
        weighted by attention; what goes to class token and registers is left out.
        """
        patch = (self.places - self.prefix).clamp(min=0)  # (G, n)
        real = (self.places >= self.prefix).to(self.weights)
        at = torch.stack([patch // self.grid[1], patch % self.grid[1]], -1).to(self.weights)
        apart = torch.cdist(at, at) * pixels  # (G, n, n)
        taken = self.weights * real[:, None, :]
        mean = (taken * apart).sum(-1) / taken.sum(-1).clamp(min=1e-12)  # (B, h, G, n)
        return (mean * real).sum((-2, -1)) / real.sum()


def from_tokens(grid: tuple[int, int], prefix: int, raw: Tensor) -> BlockAttention:
    """A plain ViT's weights (B, h, N, N): every token sees every token."""
    tokens = prefix + grid[0] * grid[1]
    if raw.shape[-2:] != (tokens, tokens):
        raise UserError(f"attention over {raw.shape[-1]} tokens, but {prefix} and a grid of "
                        f"{grid[0]} x {grid[1]} patches make {tokens}")  # fmt: skip
    places = torch.arange(tokens, device=raw.device)[None]
    return BlockAttention(raw[:, :, None], places, grid, prefix)


def from_windows(block: nn.Module, grid: tuple[int, int], raw: Tensor) -> BlockAttention:
    """A Swin block's weights (B * windows, h, n, n): shift, pad and cut an index as timm does."""
    (high, wide), (down, right) = block.window_size, block.shift_size
    index = torch.arange(grid[0] * grid[1], device=raw.device).reshape(grid)
    index = index.roll((-down, -right), (0, 1))
    index = F.pad(index, (0, -grid[1] % wide, 0, -grid[0] % high), value=-1)
    H, W = index.shape
    index = index.reshape(H // high, high, W // wide, wide).transpose(1, 2)
    places = index.reshape(-1, high * wide)  # (G, n)
    weights = raw.unflatten(0, (-1, len(places))).transpose(1, 2)  # (B, h, G, n, n)
    if (places < 0).any():
        real = (places >= 0).to(raw)
        weights = weights * (real[:, :, None] * real[:, None, :])
    return BlockAttention(weights, places, grid)


SWIN_BLOCKS = ("SwinTransformerBlock", "SwinTransformerV2Block")

Arrange = Callable[[Tensor], BlockAttention]
Sink = Callable[[Tensor, Arrange], Any]


def attention_maps(
    model: nn.Module, images: Tensor, reduce: Callable[[BlockAttention], Any] = lambda block: block
) -> tuple[Tensor, list[Any]]:
    """Attention of every block and head while the model looks at images.

    Args:
        images: (B, C, H, W), normalised as the model wants them.
        reduce: what is kept of a block. Blocks come one by one and the rest of each is freed, so
            memory is bounded by one block's weights and what is kept.

    Returns: the logits (B, classes), and what `reduce` gives for each block, the first one first.
    Raises: UserError, for a model without attention, or one whose attention cannot be watched.
    """
    kept: list[Any] = []

    def keep(raw: Tensor, arrange: Arrange) -> None:
        kept.append(reduce(arrange(raw)))

    with as_evaluated(model), torch.no_grad(), watching(model, images, keep):
        logits = model(images)
    return logits, kept


def class_attention(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """What the class token takes from each token, (B, h, N) for each block; no matrix is formed.

    One row of the matrix costs next to nothing beside the model's own kernel, which never writes
    the matrix to memory. None for models whose attention is not plain; `attention_maps` serves
    them.
    """
    modules = [attention for attention, _ in attentions(model, images)]
    if not all(type(module) in (Attention, TimmAttention) for module in modules):
        return None
    kept: list[Tensor] = []

    def keep(module: nn.Module, _: nn.Module, __: tuple, qkv: Tensor) -> None:
        B, N, _ = qkv.shape
        q, k, _ = qkv.reshape(B, N, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = q[:, :, :1]  # (B, h, 1, d)
        if isinstance(module, TimmAttention):
            q, k = module.q_norm(q), module.k_norm(k)
        kept.append((q * module.scale @ k.transpose(-2, -1)).softmax(-1).squeeze(2))

    hooks = []
    try:
        for module in modules:
            hooks.append(module.qkv.register_forward_hook(partial(keep, module)))
        with as_evaluated(model), torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, kept


@contextmanager
def watching(model: nn.Module, images: Tensor, sink: Sink) -> Iterator[None]:
    """Calls `sink` with each block's weights, as the model computes them, in its graph.

    timm's modules are told to write the weights out (the fused kernel never does), and give them
    to their dropout; ours return them when asked to. All is undone at the end, errors included.
    """
    undo: list[Callable[[], None]] = []
    blocks = attentions(model, images)
    seen = 0

    def tell(raw: Tensor, arrange: Arrange) -> None:
        nonlocal seen
        seen += 1
        sink(raw, arrange)

    try:
        for module, arrange in blocks:
            undo += tap(module, partial(tell, arrange=arrange))
        yield
    finally:
        for step in reversed(undo):
            step()
    if seen != len(blocks):
        raise UserError(f"the attention of {name_of(model)} cannot be watched: {seen} of "
                        f"{len(blocks)} blocks showed it. METHOD=grad-cam may do")  # fmt: skip


def tap(module: nn.Module, tell: Callable[[Tensor], None]) -> list[Callable[[], None]]:
    """Has an attention module tell its weights; returns the steps that undo it."""
    if isinstance(module, Attention):

        def ask(_: nn.Module, args: tuple, words: dict) -> tuple[tuple, dict]:
            return args, {**words, "return_weights": True}

        def give(_: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> Tensor:
            tell(output[1])
            return output[0]

        before = module.register_forward_pre_hook(ask, with_kwargs=True)
        return [before.remove, module.register_forward_hook(give).remove]

    def listen(_: nn.Module, args: tuple[Tensor]) -> None:
        tell(args[0])

    undo = [module.attn_drop.register_forward_pre_hook(listen).remove]
    if hasattr(module, "fused_attn"):
        undo.append(partial(setattr, module, "fused_attn", module.fused_attn))
        module.fused_attn = False
    return undo


def attentions(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, Arrange]]:
    """A model's attention modules, in order, each with what makes a BlockAttention of its weights.

    Raises: UserError, for a model that has none that we know.
    """
    swin = [module for module in model.modules() if type(module).__name__ in SWIN_BLOCKS]
    if swin:
        grids = [grid_of(model, images)]
        for stage in model.layers[1:]:
            down = 1 if isinstance(stage.downsample, nn.Identity) else 2
            grids.append(tuple(-(-n // down) for n in grids[-1]))
        return [(block.attn, partial(from_windows, block, grid))
                for stage, grid in zip(model.layers, grids, strict=True)
                for block in stage.blocks]  # fmt: skip
    modules = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    plain = all(isinstance(m, Attention) or hasattr(m, "attn_drop") for m in modules)
    known = isinstance(model, VisionTransformer) or hasattr(model, "num_prefix_tokens")
    if not modules or not plain or not known:
        raise UserError(f"{name_of(model)} has no attention that could be shown. METHOD=grad-cam "
                        "shows where any model with a last feature map looks")  # fmt: skip
    if isinstance(model, VisionTransformer):
        prefix = int(model.config.class_token)
    else:
        prefix = model.num_prefix_tokens
    arrange = partial(from_tokens, grid_of(model, images), prefix)
    return [(module, arrange) for module in modules]


def grid_of(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that images are cut into.

    Raises: UserError, for a model that does not cut them by one convolution.
    """
    stride = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "stride", None)
    if stride is None:
        raise UserError(f"{name_of(model)} cuts images into patches in a way that is not known "
                        "here: where its tokens lie in the picture cannot be told")  # fmt: skip
    down, right = stride
    return images.shape[-2] // down, images.shape[-1] // right


def name_of(model: nn.Module) -> str:
    """What a model is called in messages."""
    return getattr(getattr(model, "config", None), "architecture", type(model).__name__)


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
