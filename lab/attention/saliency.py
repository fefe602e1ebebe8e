"""Where a model looks: raw attention, rollout, gradient-weighted rollout, Grad-CAM.

Each gives one picture an image, (B, rows, columns), in patches, with values of at least zero.
Rollouts are computed as one row carried from the last block to the first, never as a product of
matrices: r (A_L (A_{L-1} ...)) is ((r A_L) A_{L-1}) .... That is why they work for a Swin too:
where two stages meet, a merged patch shares its value among the four that it was made of (our own
extension: the papers know plain ViTs alone).
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
    as_evaluated,
    attention_maps,
    class_attention,
    grid_of,
    name_of,
    watching,
)
from lab.core import UserError
from model import VisionTransformer

FUSIONS = {"mean": lambda w: w.mean(1, keepdim=True), "max": lambda w: w.amax(1, keepdim=True),
           "min": lambda w: w.amin(1, keepdim=True)}  # fmt: skip


def reads(model: nn.Module) -> Literal["class", "mean"]:
    """The queries that count: the class token, if the head reads it, else the mean over patches."""
    if isinstance(model, VisionTransformer):
        return "class" if model.config.global_pool == "token" else "mean"
    has = getattr(model, "cls_token", None) is not None
    return "class" if has and getattr(model, "global_pool", "token") in ("token", "") else "mean"


def raw(model: nn.Module, images: Tensor, queries: str | None = None) -> list[Tensor]:
    """Raw attention of every block and head: softmax(q k^T / sqrt(d)) (Vaswani et al. 2017, eq. 1).

    Args:
        images: (B, C, H, W), normalised.
        queries: "class": what the class token takes from each patch; "mean": what patches take
            from each patch, in the mean; None: whichever the model's head reads.

    Returns: for each block (B, h, rows, columns). A row of attention sums to one over all tokens;
        over the patches to what is left by class token and registers.
    """
    queries = queries or reads(model)
    if queries == "class" and getattr(model, "cls_token", None) is None:
        raise UserError(f"{name_of(model)} has no class token: ask for the mean over its patches")
    found = class_attention(model, images) if queries == "class" else None
    if found is None:
        return attention_maps(model, images, lambda block: block.of(block.queries(queries)))[1]
    grid = grid_of(model, images)
    prefix = found[1][0].shape[-1] - grid[0] * grid[1]
    return [rows[..., prefix:].unflatten(-1, grid) for rows in found[1]]


def pick(maps: list[Tensor], block: int, head: int | None) -> Tensor:
    """One block's map of `raw`, (B, rows, columns); of one head, or the mean of all.

    Args:
        block: from 1 for the first; -1 is the last one.
        head: from 1; None: the mean.

    Raises: UserError, for a block or head that the model has not.
    """
    if block == 0 or not -len(maps) <= block <= len(maps):
        raise UserError(f"LAYER={block}: this model has blocks 1 to {len(maps)} (-1: the last)")
    number = block if block > 0 else len(maps) + 1 + block
    chosen = maps[number - 1]
    if head is None:
        return chosen.mean(1)
    if not 1 <= head <= chosen.shape[1]:
        raise UserError(f"HEAD={head}: block {number} has heads 1 to {chosen.shape[1]}, or none "
                        "for their mean")  # fmt: skip
    return chosen[:, head - 1]


def rollout(
    model: nn.Module,
    images: Tensor,
    fusion: Literal["mean", "max", "min"] = "mean",
    discard: float = 0.0,
    residual: float = 0.5,
) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, section 3): A'_L ... A'_2 A'_1.

    A' = residual I + (1 - residual) fused(A), its rows scaled to sum to one; of the product the
    row of the class token, or the mean row where the head reads the mean.

    Args:
        fusion: of the heads; the paper takes the mean.
        discard: share of each block's smallest weights that is set to zero (not in the paper).
        residual: weight of the identity, which stands for the skip connection.

    Returns: (B, rows, columns) of the first block's grid.
    """
    if fusion not in FUSIONS or not (0 <= discard < 1 and 0 <= residual <= 1):
        raise UserError(f"rollout with fusion={fusion!r}, discard={discard}, residual={residual}: "
                        f"take {', '.join(FUSIONS)}, [0, 1) and [0, 1]")  # fmt: skip

    def fuse(block: BlockAttention) -> BlockAttention:
        weights = FUSIONS[fusion](block.weights)  # (B, 1, G, n, n)
        if discard:
            flat = weights.flatten(1)
            pairs = int((block.places >= 0).sum(1).square().sum())  # the rest is padding, and zero
            count = flat.shape[1] - pairs + int(discard * pairs)
            lowest = flat.topk(count, largest=False).indices
            weights = flat.scatter(1, lowest, 0).reshape(weights.shape)
        return replace(block, weights=weights)

    def step(rows: Tensor, block: BlockAttention) -> Tensor:
        total = residual + (1 - residual) * block.gather(block.weights.sum(-1))
        rows = rows / total.clamp(min=1e-12)
        return residual * rows + (1 - residual) * block.pull(rows)

    return carry(attention_maps(model, images, fuse)[1], reads(model), step)


def gradient_rollout(model: nn.Module, images: Tensor, targets: Tensor | None = None) -> Tensor:
    """Gradient-weighted rollout for a class (Chefer et al. 2021, ICCV, eqs. 5 and 6).

    A' = mean over heads of max(0, A * dy/dA), with y the logit of the class; R = I, then for each
    block R = R + A' R. Of R - I the row of the class token, or the mean row.

    Args:
        targets: a class for each image (B,); None: the predicted ones.

    Returns: (B, rows, columns) of the first block's grid.
    Raises: UserError, for a model without classes.
    """
    kept: list[tuple[Tensor, Arrange]] = []

    def keep(weights: Tensor, arrange: Arrange) -> None:
        kept.append((weights, arrange))

    with as_evaluated(model), frozen(model), torch.enable_grad(), watching(model, images, keep):
        logits = model(images.detach().requires_grad_())
        score = score_of(model, logits, targets)
        gradients = torch.autograd.grad(score, [weights for weights, _ in kept])
    blocks = []
    for (weights, arrange), gradient in zip(kept, gradients, strict=True):
        blocks.append(arrange((weights.detach() * gradient).relu().mean(1, keepdim=True)))
    rows = carry(blocks, reads(model), lambda rows, block: rows + block.pull(rows))
    identity = carry(blocks, reads(model), lambda rows, block: rows)
    return (rows - identity).clamp(min=0)


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor | None = None) -> Tensor:
    """Grad-CAM on the last feature map (Selvaraju et al. 2017, eqs. 1 and 2).

    max(0, sum over channels c of alpha_c F_c), alpha_c the mean over places of dy/dF_c, with y the
    logit of the class and F what `forward_features` gives: a CNN's last convolution, a Swin's
    last stage, a ViT's last tokens.

    Args:
        targets: a class for each image (B,); None: the predicted ones.

    Returns: (B, rows, columns) of the last grid.
    Raises: UserError, for a model without classes, or whose head does not read the places.
    """
    with as_evaluated(model), frozen(model), torch.enable_grad():
        features = model.forward_features(images)
        if not isinstance(features, Tensor):
            raise UserError(f"Grad-CAM needs one last feature map; {name_of(model)} has several")
        features = features.detach().requires_grad_()
        score = score_of(model, model.forward_head(features), targets)
        (gradient,) = torch.autograd.grad(score, features)
    features, gradient = (spread(model, images, x) for x in (features.detach(), gradient))
    if not gradient.any():
        raise UserError(f"Grad-CAM shows nothing here: the head of {name_of(model)} reads the "
                        "class token, not the patches. Take METHOD=gradient-rollout")  # fmt: skip
    return (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


def spread(model: nn.Module, images: Tensor, features: Tensor) -> Tensor:
    """Features as (B, D, rows, columns): of tokens, of a Swin (channels last), of a CNN."""
    if features.ndim == 3:
        grid = grid_of(model, images)
        prefix = features.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise UserError(f"Grad-CAM cannot place the {features.shape[1]} tokens of "
                            f"{name_of(model)} on a grid of {grid[0]} x {grid[1]}")  # fmt: skip
        patches = features[:, prefix:]
        return patches.transpose(1, 2).unflatten(-1, grid)
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features.permute(0, 3, 1, 2) if last else features


def classes_of(model: nn.Module) -> int:
    """How many classes a model's head tells apart; 0: it came without one."""
    holders = (getattr(model, "config", None), model)
    counts = (getattr(holder, "num_classes", None) for holder in holders)
    return next((count for count in counts if count is not None), 0)


def score_of(model: nn.Module, logits: Tensor, targets: Tensor | None) -> Tensor:
    """The sum of the logits that are explained; each image's depends on that image alone."""
    classes = classes_of(model)
    if not classes:
        raise UserError(f"{name_of(model)} has no classes to explain: it came without a head. "
                        "METHOD=raw and METHOD=rollout need none")  # fmt: skip
    if targets is None:
        targets = logits.detach().argmax(1)
    return logits.gather(1, targets[:, None]).sum()


def carry(
    blocks: list[BlockAttention], queries: str, step: Callable[[Tensor, BlockAttention], Tensor]
) -> Tensor:
    """Carries a row of weights on tokens from the last block to the first, as (B, rows, cols)."""
    last = blocks[-1]
    rows = last.queries(queries).expand(len(last.weights), 1, -1)  # (B, 1, N)
    above = last
    for block in reversed(blocks):
        if block.grid != above.grid:  # four patches were merged into one
            shared = above.patches(rows).repeat_interleave(2, -2).repeat_interleave(2, -1) / 4
            rows = shared[..., : block.grid[0], : block.grid[1]].flatten(-2)
        rows, above = step(rows, block), block
    return above.patches(rows)[:, 0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters, whose inputs then need no memory; as before at the end."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


METHODS = {"raw": raw, "rollout": rollout, "gradient-rollout": gradient_rollout,
           "grad-cam": grad_cam}  # fmt: skip


def map_of(method: str, model: nn.Module, images: Tensor, targets: Tensor | None) -> Tensor:
    """The map of a method that has one for each image; rollout knows no classes."""
    about = () if method == "rollout" else (targets,)
    return METHODS[method](model, images, *about)


def methods_of(model: nn.Module, images: Tensor) -> dict[str, str | None]:
    """Each method with None if the model can be shown with it, else the reason why not."""
    found: dict[str, str | None] = {}
    for name, method in METHODS.items():
        try:
            method(model, images[:1])
            found[name] = None
        except UserError as error:
            found[name] = str(error)
    return found
