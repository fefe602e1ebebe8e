"""Attention weights of every block and head, taken from a model while it computes its logits.

    logits, blocks = attention_maps(model, images)
    blocks[-1].dense()                   # (B, h, N, N): row i is what token i takes from each token
    blocks[-1].of(blocks[-1].queries())  # (B, h, rows, columns): what the mean token looks at

For our ViT, timm's plain ViTs (deit, deit3, dinov2; with class token, registers or neither) and
timm's Swin v1 and v2. The weights are those that the model multiplies its values with: nothing is
computed a second time, except in `class_attention`, which leaves the model's fast kernel alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

from lab.block_attention import BlockAttention, from_tokens, from_windows
from lab.errors import UserError
from model import Attention, VisionTransformer

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
