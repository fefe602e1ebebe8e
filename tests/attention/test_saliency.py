"""Rollouts against products of matrices and finite differences; Grad-CAM against captum."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from torch import nn

from lab.attention.extraction import attention_maps, patch_grid, record_attention
from lab.attention.saliency import grad_cam, gradient_rollout, raw_attention, rollout
from model import VisionTransformer
from tests.attention.zoo import (
    MEAN,
    REG4,
    SIZE,
    SWIN,
    SWIN_V2,
    WIDE,
    built,
    close,
    dense,
    images_for,
    ours,
    timms,
    windows_of,
)


def numpy_rollout(steps, row):
    """Attention (h, N, N) block by block, and a merge (N, M) between the stages of a Swin."""
    product = np.eye(steps[0].shape[-1])
    for weights in steps:
        if weights.ndim == 3:
            weights = (np.eye(weights.shape[-1]) + weights.mean(0)) / 2
            weights = weights / weights.sum(1, keepdims=True)
        product = weights @ product
    return row @ product


def row_of(tokens, prefix, which):
    return np.eye(tokens)[0] if which == "token" else (np.arange(tokens) >= prefix) / (
        tokens - prefix)  # fmt: skip


ROLLED = {
    "class token": (lambda: ours(), "token"),
    "avg": (lambda: ours(**MEAN), "avg"),
    "mean beside a class token": (lambda: ours(global_pool="avg"), "avg"),
    "registers": (lambda: timms(REG4, **WIDE), "token"),
}


@pytest.mark.parametrize("name", ROLLED)
def test_rollout_equals_matrix_products(name):
    model, which = ROLLED[name][0]().double(), ROLLED[name][1]
    images = images_for(model, 1)
    blocks, prefix = dense(model, images), model.num_prefix_tokens
    expected = numpy_rollout(blocks, row_of(len(blocks[0][0]), prefix, which))[prefix:]
    found = rollout(model, images)
    np.testing.assert_allclose(found[0].flatten(), expected, atol=1e-12, rtol=1e-9)
    assert found.shape == (1, *patch_grid(model, images))


def merge_between(stage, grid):
    """(coarse, fine): a quarter from each merged patch to each patch it was made of."""
    width = next(p for p in stage.downsample.parameters() if p.ndim == 2).shape[1] // 4
    fine = torch.randn(1, *grid, width, dtype=torch.float64, requires_grad=True)
    coarse = stage.downsample(fine).square().sum(-1).flatten()
    rows = [torch.autograd.grad(value, fine, retain_graph=True)[0] for value in coarse]
    return np.stack([row.abs().sum(-1).flatten().numpy() > 0 for row in rows]) / 4


def swin_steps(model, images):
    """The weights of each block, and the merge before each stage but the first."""
    found, steps, grid = iter(attention_maps(model, images)[1]), [], None
    for stage in model.layers:
        if grid:
            steps.append(merge_between(stage, grid))
        for _ in stage.blocks:
            block = next(found)
            grid = block.grid_size
            steps.append(block.dense()[0].numpy())
    return steps


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 24), (20, 14)])
def test_rollout_of_a_swin_equals_matrix_products(name, stages, size):
    model = timms(
        name, img_size=size, patch_size=2, window_size=(4, 3), embed_dim=8, num_classes=5,
        depths=(2, 1, 2)[:stages], num_heads=(2, 2, 4)[:stages],
    ).double()  # fmt: skip
    images = images_for(model, 1)
    steps = swin_steps(model, images)
    assert len(steps) == (2, 4, 7)[stages - 1]
    expected = numpy_rollout(steps, row_of(steps[-1].shape[-1], 0, "avg"))
    found = rollout(model, images)
    assert found.shape[1:] == (size[0] // 2, size[1] // 2)
    np.testing.assert_allclose(found[0].flatten(), expected, atol=1e-12, rtol=1e-9)


# Gradients.


class Nudge(nn.Module):
    """Replaces the dropout on attention weights, and adds to them."""

    def __init__(self):
        super().__init__()
        self.by = 0

    def forward(self, weights):
        return weights + self.by


def as_timms(model):
    """The same weights in timm's ViT."""
    if not isinstance(model, VisionTransformer):
        return model
    names = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth")
    names += ("num_heads", "init_values", "global_pool", "class_token", "no_embed_class")
    options = {name: getattr(model.config, name) for name in names}
    reference = timm.models.VisionTransformer(**options).eval().to(model.patch_embed.proj.weight)
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference


def finite_gradients(model, number, image, target, windows, step=1e-4):
    """d logit / d weight (h, N, N) of the attention of one block, by finite differences."""
    blocks = getattr(model, "blocks", None)
    blocks = blocks or [block for stage in model.layers for block in stage.blocks]
    attention = blocks[number].attn
    attention.fused_attn = False
    dropout, attention.attn_drop = attention.attn_drop, Nudge()
    h, n = attention.num_heads, len(windows[0])
    pairs = [
        (g, head, a, b, i, j)
        for g, window in enumerate(windows) for a, i in enumerate(window)
        for b, j in enumerate(window) if i is not None is not j
        for head in range(h)
    ]  # fmt: skip
    by = torch.zeros(len(pairs), len(windows), h, n, n, dtype=image.dtype)
    for copy, pair in enumerate(pairs):
        by[copy][pair[:4]] = step
    logits = []
    with torch.no_grad():
        for sign in (1, -1):
            attention.attn_drop.by = sign * by.flatten(0, 1)
            logits.append(model(image.expand(len(pairs), -1, -1, -1))[:, target])
    attention.attn_drop = dropout
    tokens = 1 + max(i for window in windows for i in window if i is not None)
    out = np.zeros((h, tokens, tokens))
    for (_, head, _, _, i, j), slope in zip(
        pairs, (logits[0] - logits[1]) / (2 * step), strict=True
    ):
        out[head, i, j] = slope
    return out


def windows_for(model, images):
    """The patches in each window of each block; a ViT has one window of all tokens."""
    if not hasattr(model, "layers"):
        tokens = getattr(model, "num_prefix_tokens", 0) + np.prod(patch_grid(model, images))
        return [[list(range(tokens))]] * len(model.blocks)
    found = []
    for stage in model.layers:
        for block in stage.blocks:
            windows = windows_of(block, block.input_resolution)
            found.append([[patch for patch, _ in window] for window in windows])
    return found


TINY = {"patch_size": 4, "img_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2}
TINY_SWIN = {"img_size": (10, 8), "patch_size": 2, "window_size": 3, "embed_dim": 8,
             "depths": (2, 1), "num_heads": (1, 2), "num_classes": 3}  # fmt: skip
EXPLAINED = {
    "class token": (lambda: ours(**TINY), "token"),
    "avg": (lambda: ours(**TINY, **MEAN, init_values=0.5), "avg"),
    "mean beside a class token": (lambda: ours(**TINY, global_pool="avg"), "avg"),
    "distilled": (lambda: timms("deit_tiny_distilled_patch16_224", **{**SIZE, **TINY}), "token"),
    "registers, mean": (lambda: timms(REG4, **{**SIZE, **TINY, "global_pool": "avg"}), "avg"),
    "swin": (lambda: timms(SWIN, **TINY_SWIN), "avg"),
    "swin v2": (lambda: timms(SWIN_V2, **{**TINY_SWIN, "window_size": (3, 2)}), "avg"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_gradient_rollout_equals_chefers_formula_with_finite_differences(name):
    model, which = EXPLAINED[name][0]().double(), EXPLAINED[name][1]
    image = images_for(model, 1)
    reference, target = as_timms(model), 2
    swin = hasattr(model, "layers")
    steps = swin_steps(model, image) if swin else dense(model, image)
    seen = []
    with record_attention(model, image, lambda weights, arrange: seen.append((weights, arrange))):
        logit = model(image.requires_grad_())[0, target]
    watched = torch.autograd.grad(logit, [weights for weights, _ in seen])
    image = image.detach()

    relevance = identity = np.eye(steps[0].shape[-1])  # R of the paper, and the part that stays I
    number = 0
    for weights in steps:
        if weights.ndim == 2:
            relevance, identity = weights @ relevance, weights @ identity
            continue
        windows = windows_for(model, image)[number]
        slopes = finite_gradients(reference, number, image, target, windows)
        found = seen[number][1](watched[number]).dense()[0]
        np.testing.assert_allclose(found, slopes, atol=1e-8, rtol=1e-5)
        relevance = relevance + np.maximum(weights * slopes, 0).mean(0) @ relevance
        number += 1
    prefix = getattr(model, "num_prefix_tokens", 0)
    row = row_of(len(relevance), prefix, which)
    expected = (row @ (relevance - identity))[prefix:]
    assert expected.max() > 1e-4
    found = gradient_rollout(model, image, torch.tensor([target]))[0].flatten()
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("name", ["class token", "registers, mean", "swin"])
def test_images_of_a_batch_are_independent(name):
    model = EXPLAINED[name][0]().double()
    images, targets = images_for(model, 3), torch.tensor([2, 0, 1])
    methods = [lambda x, _: rollout(model, x), partial(gradient_rollout, model)]
    methods.append(lambda x, _: raw_attention(model, x)[1])
    if EXPLAINED[name][1] == "avg":
        methods.append(partial(grad_cam, model))
    for method in methods:
        together = method(images, targets)
        for number in range(3):
            one = slice(number, number + 1)
            alone = method(images[one], targets[one])
            torch.testing.assert_close(together[one], alone, atol=1e-12, rtol=1e-9)
        assert (together.flatten(1).amax(1) > 0).any()
        assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["avg", "swin"])
@pytest.mark.parametrize("method", [gradient_rollout, grad_cam])
def test_maps_depend_on_the_class_and_default_to_the_predicted_one(name, method):
    model = EXPLAINED[name][0]()
    images = images_for(model, 8)
    with torch.no_grad():
        (model.head.fc if name == "swin" else model.head).bias.sub_(model(images).mean(0))
        predicted = model(images).argmax(1)
    assert len(predicted.unique()) > 1
    found = method(model, images)
    assert torch.equal(found, method(model, images, predicted))
    other = method(model, images, (predicted + 1) % 3)
    assert ((found - other).abs().flatten(1).amax(1) > 1e-4).all()
    assert found.min() >= 0


# Grad-CAM.


class ChannelsFirst(nn.Module):
    """The same model with its last features as (B, D, rows, columns), as captum needs them."""

    def __init__(self, model, grid):
        super().__init__()
        self.model, self.grid, self.last = model, grid, nn.Identity()

    def forward(self, images):
        features = self.model.forward_features(images)
        if features.ndim == 4:
            features = self.last(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            count = self.grid[0] * self.grid[1]
            prefix, patches = features[:, :-count], features[:, -count:]
            patches = self.last(patches.transpose(1, 2).unflatten(2, self.grid))
            features = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1)
        return self.model.forward_head(features)


def assert_equals_captum(model, images, wrapped, layer):
    targets = torch.arange(len(images)) % 5
    reference = LayerGradCam(wrapped, layer)
    expected = reference.attribute(images, target=targets, relu_attributions=True)[:, 0]
    found = grad_cam(model, images, targets)
    close(found, expected)
    assert (found > 0).any()
    assert (found == 0).any()


@pytest.mark.parametrize(
    ("name", "layer", "options"),
    [("resnet10t", "layer4", {}), ("test_efficientnet", "bn2", {}),
     ("vgg11", "features", {"mlp_ratio": 1 / 64})],
)  # fmt: skip
def test_grad_cam_equals_captum_on_the_last_convolution(name, layer, options):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():  # so that the weights of the head have both signs
        nn.init.normal_(model.get_classifier().weight)
    assert_equals_captum(model, images, model, model.get_submodule(layer))


@pytest.mark.parametrize(
    ("kind", "name", "grid"),
    [
        ("swin", "v1", None), ("swin", "v2, padded windows", None),
        ("ours", "mean, no class token, gray", (4, 4)),
        ("ours", "mean beside a class token", (4, 4)),
        ("timm", "siglip", (4, 6)), ("timm", "mean beside a class token", (4, 6)),
    ],
)  # fmt: skip
def test_grad_cam_of_a_transformer_equals_captum(kind, name, grid):
    model, images = built(kind, name)
    wrapped = ChannelsFirst(model, grid)
    close(wrapped(images), model(images))
    assert_equals_captum(model, images, wrapped, wrapped.last)


def test_grad_cam_of_average_pooled_features_is_the_class_activation_map():
    """Zhou et al. 2016. Grad-CAM is the class activation map divided by the number of places."""
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    images, targets = torch.randn(3, 3, 64, 96), torch.tensor([4, 0, 2])
    with torch.no_grad():
        model.fc.weight.normal_()
        features = model.forward_features(images)
    expected = torch.einsum("bd,bdyx->byx", model.fc.weight[targets], features).relu() / 6
    close(grad_cam(model, images, targets), expected.detach())
    assert expected.shape == (3, 2, 3)
    assert (expected > 0).any()
