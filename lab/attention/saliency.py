"""Saliency maps: raw attention, rollout, gradient-weighted rollout and Grad-CAM.

Each method returns one map of patches per image, (B, rows, columns), with values of at least zero.
Rollouts multiply one row vector through the blocks, from the last to the first, instead of
multiplying whole matrices: r (A_L (A_{L-1} ...)) = ((r A_L) A_{L-1}) .... This also works for a
Swin: between two stages, a merged patch splits its value equally among the four patches it came
from. The papers cover plain ViTs only; this extension is ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lab.attention.extraction import (
    Arrange,
    BlockAttention,
    attention_maps,
    eval_mode,
    model_name,
    patch_grid,
    record_attention,
)
from lab.core import UserError


def pooled_query(model: nn.Module) -> Literal["token", "avg"]:
    """The queries whose attention matters: the class token if the head reads it, else the mean."""
    if getattr(model, "cls_token", None) is None:
        return "avg"
    return "token" if getattr(model, "global_pool", "token") in ("token", "") else "avg"


def raw_attention(model: nn.Module, images: Tensor) -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) of every block and head (Vaswani et al. 2017, eq. 1).

    Shows the attention of the class token to each patch if the head of the model reads the class
    token, else the mean attention of the patches to each patch.

    Args:
        images: (B, C, H, W), normalized.

    Returns: (B, h, rows, columns) for each block. A map sums to less than one if some attention
        goes to the class token or registers.
    """
    if pooled_query(model) == "avg":
        return attention_maps(model, images, lambda block: block.average("avg"))[1]
    rows, columns = patch_grid(model, images)
    maps: list[Tensor] = []

    def keep(weights: Tensor, arrange: Arrange) -> None:  # a single row: (B, h, 1, N)
        prefix = getattr(model, "num_prefix_tokens", 1)
        if weights.shape[-1] != prefix + rows * columns:
            raise UserError(
                f"a block of {model_name(model)} attends to {weights.shape[-1]} tokens, not to "
                f"{rows} x {columns} patches and {prefix} others, so there are no maps"
            )
        maps.append(weights[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)))

    with eval_mode(model), torch.no_grad(), record_attention(model, images, keep, num_rows=1):
        model(images)
    return maps


def select_map(maps: list[Tensor], layer: int, head: int | None) -> Tensor:
    """The map (B, rows, columns) of one block of `raw_attention`.

    Args:
        layer: 1 is the first block, -1 the last.
        head: counted from 1; None: the mean of all heads.

    Raises: UserError for a block or head that the model does not have.
    """
    if layer == 0 or not -len(maps) <= layer <= len(maps):
        raise UserError(f"LAYER={layer}: this model has blocks 1 to {len(maps)} (-1: the last)")
    number = layer if layer > 0 else len(maps) + 1 + layer
    heads = maps[number - 1]
    if head is None:
        return heads.mean(1)
    if not 1 <= head <= heads.shape[1]:
        raise UserError(
            f"HEAD={head}: block {number} has heads 1 to {heads.shape[1]} (None: their mean)"
        )
    return heads[:, head - 1]


def rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, section 3): A'_L ... A'_2 A'_1.

    A' = (I + mean of A over the heads) / 2, where I stands for the skip connection and rows are
    normalized to sum to one. Returns the row of the class token, or the mean row of the patches if
    the head reads their mean, (B, rows, columns) on the grid of the first block.
    """

    def average_heads(block: BlockAttention) -> BlockAttention:
        return replace(block, weights=block.weights.mean(1, keepdim=True))

    def step(rows: Tensor, block: BlockAttention) -> Tensor:
        row_sums = (1 + block.scatter(block.weights.sum(-1))) / 2  # below one next to padding
        rows = rows / row_sums
        return (rows + block.left_multiply(rows)) / 2

    blocks = attention_maps(model, images, average_heads)[1]
    return _propagate(blocks, pooled_query(model), step)


def gradient_rollout(model: nn.Module, images: Tensor, targets: Tensor | None = None) -> Tensor:
    """Gradient-weighted rollout for a class (Chefer et al. 2021, ICCV, eqs. 5 and 6).

    A' = mean over heads of max(0, A * dy/dA), where y is the logit of the class. R starts as I,
    and each block updates it to R + A' R. Returns the row of R - I that `rollout` would return.

    Args:
        targets: the class to explain for each image (B,); None: the predicted class.

    Returns: (B, rows, columns) on the grid of the first block.
    Raises: UserError for a model without a classification head.
    """
    recorded: list[tuple[Tensor, Arrange]] = []

    def keep(weights: Tensor, arrange: Arrange) -> None:
        recorded.append((weights, arrange))

    with eval_mode(model), _frozen(model), torch.enable_grad():
        with record_attention(model, images, keep):
            logits = model(images.detach().requires_grad_())
        score = _target_score(model, logits, targets)
        gradients = torch.autograd.grad(score, [weights for weights, _ in recorded])
    blocks = []
    for (weights, arrange), gradient in zip(recorded, gradients, strict=True):
        blocks.append(arrange((weights.detach() * gradient).relu().mean(1, keepdim=True)))
    query = pooled_query(model)
    relevance = _propagate(blocks, query, lambda rows, block: rows + block.left_multiply(rows))
    identity = _propagate(blocks, query, lambda rows, block: rows)
    return (relevance - identity).clamp(min=0)


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor | None = None) -> Tensor:
    """Grad-CAM on the last feature map (Selvaraju et al. 2017, eqs. 1 and 2).

    max(0, sum over channels c of alpha_c F_c), where alpha_c is the mean of dy/dF_c over all
    spatial positions, y the logit of the class and F the output of `forward_features`: the last
    convolution of a CNN, the last stage of a Swin, or the last tokens of a ViT.

    Args:
        targets: the class to explain for each image (B,); None: the predicted class.

    Returns: (B, rows, columns) on the grid of F.
    Raises: UserError for a model without a classification head, or with a head that reads only
        the class token.
    """
    with eval_mode(model), _frozen(model), torch.enable_grad():
        features = model.forward_features(images)
        if not isinstance(features, Tensor):
            raise UserError(f"Grad-CAM needs one last feature map; {model_name(model)} has several")
        features = features.detach().requires_grad_()
        score = _target_score(model, model.forward_head(features), targets)
        (gradient,) = torch.autograd.grad(score, features)
    features, gradient = (_feature_map(model, images, x) for x in (features.detach(), gradient))
    if not gradient.any():
        raise UserError(
            f"Grad-CAM has nothing to show: the head of {model_name(model)} reads the class token, "
            "not the patches. Use METHOD=gradient-rollout"
        )
    return (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


METHODS = {"raw": raw_attention, "rollout": rollout, "gradient-rollout": gradient_rollout,
           "grad-cam": grad_cam}  # fmt: skip


def compute_map(method: str, model: nn.Module, images: Tensor, targets: Tensor | None) -> Tensor:
    """The map (B, rows, columns) of any method but "raw", for the classes `targets` (B,)."""
    arguments = () if method == "rollout" else (targets,)  # rollout does not depend on the class
    return METHODS[method](model, images, *arguments)


def unavailable_methods(model: nn.Module, images: Tensor) -> dict[str, str]:
    """The methods that do not work for this model, each with the reason."""
    reasons: dict[str, str] = {}
    for name, method in METHODS.items():
        try:
            method(model, images[:1])
        except UserError as error:
            reasons[name] = str(error)
    return reasons


def count_classes(model: nn.Module) -> int:
    """Number of classes of the head; 0 for a model without one."""
    for owner in (getattr(model, "config", None), model):
        if (count := getattr(owner, "num_classes", None)) is not None:
            return count
    return 0


def _feature_map(model: nn.Module, images: Tensor, features: Tensor) -> Tensor:
    """Features of a ViT (B, N, D), a Swin (channels last) or a CNN as (B, D, rows, columns)."""
    if features.ndim == 3:
        rows, columns = patch_grid(model, images)
        if features.shape[1] < rows * columns:
            raise UserError(
                f"Grad-CAM cannot arrange the {features.shape[1]} tokens of {model_name(model)} in "
                f"a grid of {rows} x {columns}"
            )
        return features[:, -rows * columns :].transpose(1, 2).unflatten(-1, (rows, columns))
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features.permute(0, 3, 1, 2) if channels_last else features


def _target_score(model: nn.Module, logits: Tensor, targets: Tensor | None) -> Tensor:
    """The sum of the explained logits; the gradient for an image depends on that image only."""
    if not count_classes(model):
        raise UserError(
            f"{model_name(model)} has no classification head, so there is no class to explain. "
            "METHOD=raw and METHOD=rollout work without one"
        )
    if targets is None:
        targets = logits.detach().argmax(1)
    return logits.gather(1, targets[:, None]).sum()


def _propagate(
    blocks: list[BlockAttention], query: str, step: Callable[[Tensor, BlockAttention], Tensor]
) -> Tensor:
    """Applies `step` to a row of weights on tokens, from the last block to the first.

    Returns: (B, rows, columns) on the grid of the first block.
    """
    previous = blocks[-1]
    rows = previous.query_weights(query).expand(len(previous.weights), 1, -1)  # (B, 1, N)
    for block in reversed(blocks):
        if block.grid_size != previous.grid_size:  # Swin merged four patches into one
            merged = previous.patches(rows)
            split = merged.repeat_interleave(2, -2).repeat_interleave(2, -1) / 4
            rows = split[..., : block.grid_size[0], : block.grid_size[1]].flatten(-2)
        rows, previous = step(rows, block), block
    return previous.patches(rows)[:, 0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turns off gradients of parameters, which saves memory, and restores them at the end."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
