"""Attention weights of every block and head, recorded while a model computes its logits.

    logits, blocks = attention_maps(model, images)
    blocks[-1].dense()         # (B, h, N, N): row i: how much token i attends to each token
    blocks[-1].average("avg")  # (B, h, rows, columns): what the patches attend to on average

This works for our ViT, timm's plain ViTs (DeiT, DINOv2, ...) and timm's Swin v1 and v2. It also
works for an `Attention` that you wrote yourself, whatever its layers are called, as long as each
block calls softmax on its weights (B, h, N, N) or F.scaled_dot_product_attention once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lab.core import UserError


@dataclass(frozen=True)
class BlockAttention:
    """The attention weights of one block.

    Tokens attend to each other within groups. A ViT has a single group of all tokens. A Swin has
    one group per window, and `token_index` maps the tokens of a window to their places in the
    image, which also undoes the shift of shifted windows.

    weights: (B, h, G, n, n) for G groups of n tokens. Rows sum to one.
    token_index: (G, n), the index of each token in the block: first the prefix tokens (class token
        and registers), then the patches row by row. Padding has index -1, and its rows and columns
        are zero, so a row whose window is padded sums to less than one.
    grid_size: rows and columns of patches.
    """

    weights: Tensor
    token_index: Tensor
    grid_size: tuple[int, int]
    num_prefix_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]

    @property
    def _slots(self) -> Tensor:
        """`token_index` with padding moved to an extra slot after the last token, (G, n)."""
        return self.token_index % (self.num_tokens + 1)

    def dense(self) -> Tensor:
        """(B, h, N, N) over all tokens; zero between tokens of different groups."""
        B, h = self.weights.shape[:2]
        dense = self.weights.new_zeros(B, h, self.num_tokens + 1, self.num_tokens + 1)
        dense[:, :, self._slots[:, :, None], self._slots[:, None, :]] = self.weights
        return dense[:, :, :-1, :-1]

    def query_weights(self, query: str) -> Tensor:
        """A row (N,) that selects the class token ("token") or averages the patches ("avg")."""
        weights = self.weights.new_zeros(self.num_tokens)
        if query == "token":
            weights[0] = 1
        else:
            weights[self.num_prefix_tokens :] = 1 / (self.grid_size[0] * self.grid_size[1])
        return weights

    def left_multiply(self, rows: Tensor) -> Tensor:
        """`rows @ dense()` without the dense matrix: (B or 1, h or 1, N) -> (B, h, N)."""
        grouped = F.pad(rows, (0, 1))[..., self._slots]  # (B, h, G, n)
        return self.scatter((grouped[..., None, :] @ self.weights).squeeze(-2))

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the tokens in groups (B, h, G, n) to the tokens of the block (B, h, N)."""
        out = values.new_zeros(*values.shape[:2], self.num_tokens + 1)
        return out.index_add_(2, self._slots.flatten(), values.flatten(2))[..., :-1]

    def patches(self, tokens: Tensor) -> Tensor:
        """Values of tokens (..., N) to a map of the patches (..., rows, columns)."""
        return tokens[..., self.num_prefix_tokens :].unflatten(-1, self.grid_size)

    def average(self, query: str) -> Tensor:
        """What the class token ("token") or the patches on average ("avg") attend to.

        Returns a map for each head, (B, h, rows, columns).
        """
        return self.patches(self.left_multiply(self.query_weights(query)[None, None]))

    def mean_distance(self, patch_size: float) -> Tensor:
        """Mean distance between a patch and the patches it attends to, (B, h), in pixels.

        The mean over all patches, weighted by attention, as in Dosovitskiy et al. 2021, fig. 7.
        Attention to the class token and registers does not count.
        """
        patch = (self.token_index - self.num_prefix_tokens).clamp(min=0)  # (G, n)
        is_patch = (self.token_index >= self.num_prefix_tokens).to(self.weights)
        columns = self.grid_size[1]
        positions = torch.stack([patch // columns, patch % columns], -1).to(self.weights)
        distances = torch.cdist(positions, positions) * patch_size  # (G, n, n)
        weights = self.weights * is_patch[:, None, :]
        mean = (weights * distances).sum(-1) / weights.sum(-1).clamp(min=1e-12)  # (B, h, G, n)
        return (mean * is_patch).sum((-2, -1)) / is_patch.sum()


Arrange = Callable[[Tensor], BlockAttention]


def attention_maps(
    model: nn.Module, images: Tensor, reduce: Callable[[BlockAttention], Any] = lambda block: block
) -> tuple[Tensor, list[Any]]:
    """The attention of every block and head, and the logits of the same forward pass.

    Args:
        images: (B, C, H, W), normalized as the model expects.
        reduce: what to keep of each block. It runs during the forward pass, and the rest of the
            block is freed, so memory holds the weights of one block plus what you keep.

    Returns: the logits (B, num_classes), and the results of `reduce`, first block first.
    Raises: UserError if the model has no attention that can be recorded.
    """
    kept: list[Any] = []

    def keep(weights: Tensor, arrange: Arrange) -> None:
        kept.append(reduce(arrange(weights)))

    with eval_mode(model), torch.no_grad(), record_attention(model, images, keep):
        logits = model(images)
    return logits, kept


@contextmanager
def record_attention(
    model: nn.Module,
    images: Tensor,
    sink: Callable[[Tensor, Arrange], None],
    num_rows: int | None = None,
) -> Iterator[None]:
    """Calls `sink` with the weights of each block while the model runs inside this context.

    `sink` receives the weights (B, h, N, N), or (B * windows, h, n, n) for a Swin, as part of the
    autograd graph, and the function that turns such a tensor into a BlockAttention. With
    `num_rows`, it receives only the first rows of the weights, and fused kernels stay in use.
    """
    blocks = _attention_blocks(model, images)
    recorder = _Recorder(sink, num_rows)
    hooks = []
    try:
        for block, arrange in blocks:
            hooks.append(block.register_forward_pre_hook(partial(recorder.enter, arrange)))
            hooks.append(block.register_forward_hook(recorder.leave))
        with recorder:
            yield
    finally:
        for hook in hooks:
            hook.remove()
    complete = recorder.calls_per_block.count(1)
    if complete < len(blocks):
        raise UserError(
            f"cannot record the attention of {model_name(model)}: {complete} of {len(blocks)} "
            "blocks compute it exactly once, by softmax on weights (B, h, N, N) or by "
            "F.scaled_dot_product_attention, and all must. METHOD=grad-cam may work"
        )


class _Recorder(TorchFunctionMode):
    """Intercepts torch functions and passes on the attention weights among them.

    Hooks on layers would need the names of the layers inside an attention module, and would miss
    fused kernels, which never hold the weights.
    """

    _SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)

    def __init__(self, sink: Callable[[Tensor, Arrange], None], num_rows: int | None):
        self.sink, self.num_rows = sink, num_rows
        self.arrange: Arrange | None = None  # of the block that is running
        self.calls_per_block: list[int] = []

    def enter(self, arrange: Arrange, *_: Any) -> None:
        self.arrange = arrange
        self.calls_per_block.append(0)

    def leave(self, *_: Any) -> None:
        self.arrange = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.arrange and func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        output = func(*args, **kwargs)
        if self.arrange and func in self._SOFTMAX and output.ndim == 4:
            self._record(output)
        return output

    def _record(self, weights: Tensor) -> None:
        self.calls_per_block[-1] += 1
        if self.num_rows is not None:  # not always, because a slice is not in the autograd graph
            weights = weights[:, :, : self.num_rows]
        self.sink(weights, self.arrange)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """F.scaled_dot_product_attention, computing the weights explicitly."""
        if is_causal:
            shape = (query.shape[-2], key.shape[-2])
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query[..., : self.num_rows, :] @ key.transpose(-2, -1)) * scale
        if attn_mask is not None:
            mask = attn_mask[..., : self.num_rows, :]
            is_bool = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask, -torch.inf) if is_bool else logits + mask
        weights = logits.softmax(-1)
        self._record(weights)
        if self.num_rows is None:
            return F.dropout(weights, dropout_p) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)


def _arrange_tokens(
    grid_size: tuple[int, int], num_prefix_tokens: int, weights: Tensor
) -> BlockAttention:
    """The weights of a plain ViT (B, h, N, N), in which every token attends to every token."""
    num_tokens = num_prefix_tokens + grid_size[0] * grid_size[1]
    if weights.shape[-2:] != (num_tokens, num_tokens):
        raise UserError(
            f"the attention has {weights.shape[-1]} tokens, but {num_prefix_tokens} prefix tokens "
            f"and {grid_size[0]} x {grid_size[1]} patches make {num_tokens}"
        )
    token_index = torch.arange(num_tokens, device=weights.device)[None]
    return BlockAttention(weights[:, :, None], token_index, grid_size, num_prefix_tokens)


def _arrange_windows(
    block: nn.Module, grid_size: tuple[int, int], weights: Tensor
) -> BlockAttention:
    """The weights of a Swin block (B * windows, h, n, n).

    An index of the patches is shifted, padded and cut into windows as timm does with the patches.
    """
    (height, width), (shift_y, shift_x) = block.window_size, block.shift_size
    index = torch.arange(grid_size[0] * grid_size[1], device=weights.device).reshape(grid_size)
    index = index.roll((-shift_y, -shift_x), (0, 1))
    index = F.pad(index, (0, -grid_size[1] % width, 0, -grid_size[0] % height), value=-1)
    rows, columns = index.shape
    index = index.reshape(rows // height, height, columns // width, width).transpose(1, 2)
    token_index = index.reshape(-1, height * width)  # (G, n)
    weights = weights.unflatten(0, (-1, len(token_index))).transpose(1, 2)  # (B, h, G, n, n)
    if (token_index < 0).any():
        is_patch = (token_index >= 0).to(weights)
        weights = weights * (is_patch[:, :, None] * is_patch[:, None, :])
    return BlockAttention(weights, token_index, grid_size)


def _attention_blocks(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, Arrange]]:
    """The blocks of a model, in order, each with the function that arranges its weights.

    Raises: UserError for a model without such blocks.
    """
    if any(type(m).__name__.startswith("SwinTransformer") for m in getattr(model, "layers", [])):
        grids = [patch_grid(model, images)]
        for stage in model.layers[1:]:
            factor = 1 if isinstance(stage.downsample, nn.Identity) else 2
            grids.append(tuple(-(-n // factor) for n in grids[-1]))
        return [(block, partial(_arrange_windows, block, grid))
                for stage, grid in zip(model.layers, grids, strict=True)
                for block in stage.blocks]  # fmt: skip
    blocks = getattr(model, "blocks", None)
    if not blocks or not hasattr(model, "num_prefix_tokens"):
        raise UserError(
            f"{model_name(model)} is not a ViT with `blocks` and `num_prefix_tokens`, so it has no "
            "attention to show. METHOD=grad-cam works for any model with a last feature map"
        )
    arrange = partial(_arrange_tokens, patch_grid(model, images), model.num_prefix_tokens)
    return [(block, arrange) for block in blocks]


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that a model cuts images (B, C, H, W) into.

    Raises: UserError for a model whose `patch_embed` has neither a convolution `proj` nor a
        `patch_size`.
    """
    patch_embed = getattr(model, "patch_embed", None)
    stride = getattr(getattr(patch_embed, "proj", None), "stride", None)
    if stride is None and isinstance(getattr(patch_embed, "patch_size", None), int):
        stride = (patch_embed.patch_size, patch_embed.patch_size)
    if stride is None:
        raise UserError(
            f"{model_name(model)} has no `patch_embed` with a convolution `proj` or a "
            "`patch_size`, so the positions of its tokens in the image are unknown"
        )
    return images.shape[-2] // stride[0], images.shape[-1] // stride[1]


def model_name(model: nn.Module) -> str:
    """The name of a model in messages: timm's name of the architecture, or the class."""
    return getattr(getattr(model, "config", None), "architecture", type(model).__name__)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's mode is restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
