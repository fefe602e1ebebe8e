"""Attention of a Swin: shifted and padded windows, compared with a calculation pair by pair."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lab.attention.extraction import attention_maps
from lab.attention.saliency import raw_attention
from tests.attention.zoo import (
    STAGES,
    SWIN,
    SWIN_V2,
    SWINS,
    ZOO,
    built,
    close,
    extracted,
    images_for,
    timms,
    windows_of,
)


def bias_between(attention, dy, dx):
    """The bias (h,) of a pair: v1 looks it up by offset, v2 has an MLP of log-spaced offsets."""
    high, wide = attention.window_size
    if not hasattr(attention, "cpb_mlp"):
        table = attention.relative_position_bias_table.detach().numpy()
        return table.reshape(2 * high - 1, 2 * wide - 1, -1)[dy + high - 1, dx + wide - 1]
    first, _, last = attention.cpb_mlp
    apart = np.array([8 * dy / max(high - 1, 1), 8 * dx / max(wide - 1, 1)])
    apart = np.sign(apart) * np.log2(1 + np.abs(apart)) / 3
    W1, b1, W2 = (p.detach().numpy() for p in (first.weight, first.bias, last.weight))
    return 16 / (1 + np.exp(-W2 @ np.maximum(W1 @ apart + b1, 0)))


def attention_between(attention, a, b):
    """The attention logit (h,) of a pair of slots."""
    q, k = a.q, b.k  # (h, d)
    if hasattr(attention, "cpb_mlp"):  # cosine attention
        q, k = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, k))
        scale = np.minimum(np.exp(attention.logit_scale.detach().numpy().ravel()), 100)
    else:
        scale = q.shape[1] ** -0.5
    return (q * k).sum(1) * scale + bias_between(attention, a.y - b.y, a.x - b.x)


def swin_reference(block, tokens):
    """Attention (h, N, N) over the patches (H, W, D) that enter the attention of a block."""
    attention, grid = block.attn, tokens.shape[:2]
    h, wide = attention.num_heads, block.window_size[1]
    bias = attention.qkv.bias
    if hasattr(attention, "cpb_mlp"):
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    tokens = torch.cat([tokens.flatten(0, 1), torch.zeros(1, tokens.shape[2])])  # last: padding
    qkv = nn.functional.linear(tokens, attention.qkv.weight, bias).detach().numpy()
    q, k, _ = np.moveaxis(qkv.reshape(len(tokens), 3, h, -1), 1, 0).astype(np.float64)
    out = np.zeros((h, len(tokens) - 1, len(tokens) - 1))
    for window in windows_of(block, grid):
        slots = [
            SimpleNamespace(
                q=q[-1 if patch is None else patch], k=k[-1 if patch is None else patch],
                y=place // wide, x=place % wide, patch=patch, sides=sides,
            )
            for place, (patch, sides) in enumerate(window)
        ]  # fmt: skip
        for a in (slot for slot in slots if slot.patch is not None):
            seen = [b for b in slots if b.sides == a.sides]
            weights = np.exp([attention_between(attention, a, b) for b in seen])
            weights /= weights.sum(0)
            for b, weight in zip(seen, weights, strict=True):
                if b.patch is not None:
                    out[:, a.patch, b.patch] = weight
    return out


def assert_equals_pair_by_pair(model, images):
    """Compares the weights of each block with `swin_reference`; returns timm's blocks."""
    modules = [block for stage in model.layers for block in stage.blocks]
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in modules]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    for module, tokens, found in zip(
        modules, inputs, attention_maps(model, images)[1], strict=True
    ):
        if not hasattr(module.attn, "cpb_mlp"):  # v2 normalizes after attention, not before
            tokens = module.norm1(tokens)
        for image in range(len(images)):
            expected = swin_reference(module, tokens[image].detach())
            np.testing.assert_allclose(found.dense()[image], expected, atol=2e-6, rtol=1e-4)
    return modules


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_a_single_window_equals_the_pairwise_calculation(name):
    model = timms(name, **{**STAGES, "img_size": (8, 12), "window_size": (4, 6)})
    blocks = assert_equals_pair_by_pair(model, images_for(model))
    assert blocks[0].window_size == (4, 6)
    assert not any(blocks[1].shift_size)


@pytest.mark.parametrize("name", ["v1", "v1, padded windows", "v2, padded windows"])
def test_shifted_and_padded_windows_equal_the_pairwise_calculation(name):
    model, images = built("swin", name)
    blocks = assert_equals_pair_by_pair(model, images[:1])
    assert all(blocks[1].shift_size)


@pytest.mark.parametrize("seed", range(8))
def test_random_swins_equal_the_pairwise_calculation(seed):
    rng = random.Random(seed)
    model = timms(
        rng.choice([SWIN, SWIN_V2]), patch_size=2, embed_dim=8, depths=(2, rng.choice([1, 2])),
        num_heads=(rng.choice([1, 2]), rng.choice([1, 2, 4])), num_classes=5,
        window_size=(rng.choice([2, 3, 4]), rng.choice([2, 3, 5])),
        img_size=(2 * rng.choice([3, 4, 7, 8]), 2 * rng.choice([4, 5, 6, 9])),
        always_partition=rng.random() < 0.3, qkv_bias=True,
    )  # fmt: skip
    assert_equals_pair_by_pair(model, images_for(model))


@pytest.mark.parametrize("name", ["v1", "v1, windows not square", "v2"])
def test_patches_attend_to_each_other_only_within_a_shifted_window_of_the_image(name):
    model, images = built("swin", name)
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block, found in zip(blocks, attention_maps(model, images[:1])[1], strict=True):
        (high, wide), (down, right) = block.window_size, block.shift_size
        y, x = np.divmod(np.arange(found.num_tokens), found.grid_size[1])
        window = np.stack([(y - down) // high, (x - right) // wide])
        together = (window[:, :, None] == window[:, None]).all(0)
        seen = found.dense()[0].numpy() > 1e-20
        assert (seen == together).all()


@pytest.mark.parametrize(("kind", "name"), ZOO)
def test_rows_sum_to_one_except_in_padded_windows(kind, name):
    model, images = built(kind, name)
    modules = [block for stage in getattr(model, "layers", ()) for block in stage.blocks]
    blocks = attention_maps(model, images)[1]
    padded = ""
    for number, block in enumerate(blocks):
        weights = block.dense()
        assert weights.shape == (2, weights.shape[1], block.num_tokens, block.num_tokens)
        assert weights.min() >= 0
        sums, losing = weights.sum(-1), torch.zeros(block.num_tokens, dtype=bool)
        for window in windows_of(modules[number], block.grid_size) if modules else ():
            beside = [sides for patch, sides in window if patch is None]
            lost = [patch for patch, sides in window if sides in beside and patch is not None]
            losing[lost] = True
        close(sums[..., ~losing], torch.ones_like(sums[..., ~losing]))
        if losing.any():
            padded += str(number + 1)
            assert sums.max() < 1 + 1e-5
            assert sums[..., losing].min() < 0.99
    assert padded == (SWINS[name][2] if kind == "swin" else "")


@pytest.mark.filterwarnings("ignore:NOTE. The nodes")  # from torchvision, about tracing
def test_window_weights_equal_timms_own_extraction(monkeypatch):
    model, images = built("swin", "v1")
    expected = extracted(monkeypatch, model, *SWINS["v1"][:2], images)
    for block, weights in zip(attention_maps(model, images)[1], expected, strict=True):
        close(block.weights, weights.unflatten(0, (2, -1)).transpose(1, 2))


@pytest.mark.parametrize("name", ["v1", "v2, padded windows"])
def test_left_multiply_equals_the_product_with_the_dense_matrix(name):
    model, images = built("swin", name)
    for block in attention_maps(model, images)[1]:
        weights = block.dense()
        for shape in [(1, 1), (2, 1), (1, weights.shape[1]), weights.shape[:2]]:
            rows = torch.randn(*shape, block.num_tokens)
            close(block.left_multiply(rows), (rows[..., None, :] @ weights).squeeze(-2))
        close(block.scatter(block.weights.sum(-1)), weights.sum(-1))
        maps = weights.mean(2).unflatten(-1, block.grid_size)
        close(block.average("avg"), maps)
    close(raw_attention(model, images)[-1], maps)
