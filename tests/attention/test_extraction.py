"""Attention weights against transformers, timm, and calculations by hand."""

import random
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.spatial.distance import pdist
from timm.utils import AttentionExtract
from torch import nn
from transformers import ViTConfig as HFConfig
from transformers import ViTForImageClassification

from lab.attention.extraction import _arrange_tokens, attention_maps, record_attention
from lab.attention.metrics import resize_maps
from lab.attention.saliency import (
    grad_cam,
    gradient_rollout,
    pooled_query,
    raw_attention,
    rollout,
    select_map,
    unavailable_methods,
)
from lab.core import UserError
from lab.models.conversion import from_transformers
from model import VisionTransformer, ViTConfig
from tests.attention.zoo import (
    EVEN,
    MEAN,
    METHODS,
    REG4,
    SWIN,
    VITS,
    WIDE,
    ZOO,
    assert_unchanged,
    built,
    close,
    extracted,
    images_for,
    mixed,
    ours,
    timms,
)
from tests.shaken import shaken


@pytest.mark.parametrize(("kind", "name"), ZOO)
def test_extraction_does_not_change_the_logits(kind, name):
    model, images = built(kind, name)
    with torch.no_grad():
        expected = model(images)
    logits, blocks = attention_maps(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not logits.requires_grad
    assert len(blocks) == (4 if kind == "swin" else 3)
    if pooled_query(model) == "token":
        rows = []

        def keep(weights, _):
            rows.append(weights)

        with torch.no_grad(), record_attention(model, images, keep, num_rows=1):
            assert torch.equal(model(images), expected)  # the fused kernel stays in use
        for row, block in zip(rows, blocks, strict=True):
            close(row, block.dense()[:, :, :1])


@pytest.mark.parametrize("seed", range(4))
def test_weights_equal_transformers(seed):
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 4])
    hf = HFConfig(
        hidden_size=8 * heads, num_hidden_layers=rng.choice([2, 4]), num_attention_heads=heads,
        intermediate_size=32, image_size=24, patch_size=rng.choice([4, 8]), num_labels=5,
        num_channels=rng.choice([1, 3]), qkv_bias=rng.random() < 0.5,
        attn_implementation="eager",
    )  # fmt: skip
    reference = shaken(ViTForImageClassification(hf), seed)
    state, config, _ = from_transformers(reference.state_dict(), hf.to_dict())
    model = VisionTransformer(config).eval()
    model.load_state_dict(state, strict=True)
    images = images_for(model, 3)
    with torch.no_grad():
        expected = reference(images, output_attentions=True)
    logits, blocks = attention_maps(model, images)
    close(logits, expected.logits, atol=1e-5)
    for block, weights in zip(blocks, expected.attentions, strict=True):
        close(block.dense(), weights)
    grid = (24 // config.patch_size,) * 2
    for maps, weights in zip(raw_attention(model, images), expected.attentions, strict=True):
        close(maps, weights[:, :, 0, 1:].unflatten(-1, grid))


@pytest.mark.parametrize("name", VITS)
def test_weights_and_maps_equal_timms_extraction(name, monkeypatch):
    model, images = built("timm", name)
    expected = extracted(monkeypatch, model, *VITS[name][:2], images)
    blocks, prefix = attention_maps(model, images)[1], VITS[name][2]
    for block, weights in zip(blocks, expected, strict=True):
        close(block.dense(), weights)
        assert (block.num_prefix_tokens, block.grid_size) == (prefix, (4, 6))
    which = "avg" if name.startswith(("siglip", "mean")) else "token"
    for block, weights, shown in zip(blocks, expected, raw_attention(model, images), strict=True):
        maps, mean = block.average("avg"), weights[:, :, prefix:, prefix:].mean(2)
        for y, x in [(0, 0), (1, 5), (3, 2)]:  # row by row
            close(maps[:, :, y, x], mean[:, :, 6 * y + x])
        if prefix:
            close(block.average("token").flatten(2), weights[:, :, 0, prefix:])
        close(shown, block.average(which))


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_random_vits_equal_timms_extraction(seed):
    rng = random.Random(seed)
    heads, patch, token = rng.choice([1, 2, 4]), rng.choice([1, 2, 5]), rng.random() < 0.5
    options = {
        "img_size": patch * rng.choice([1, 3, 4]),
        "patch_size": patch,
        "in_chans": rng.choice([1, 3, 4]),
        "num_classes": rng.choice([0, 1, 5]),
        "embed_dim": heads * rng.choice([4, 8]),
        "depth": rng.choice([1, 3]),
        "num_heads": heads,
        "qkv_bias": rng.random() < 0.5,
        "init_values": rng.choice([None, 0.1]),
        "global_pool": "token" if token else "avg",
        "class_token": token or rng.random() < 0.5,
        "no_embed_class": rng.random() < 0.5,
    }
    model = shaken(VisionTransformer(ViTConfig(**options)), seed)
    reference = timm.models.VisionTransformer(**options)
    reference.load_state_dict(model.state_dict(), strict=True)
    for block in reference.blocks:
        block.attn.fused_attn = False
    images = images_for(model)
    with torch.no_grad():
        expected = AttentionExtract(reference, method="hook")(images).values()
    blocks = attention_maps(model, images)[1]
    for block, weights in zip(blocks, expected, strict=True):
        close(block.dense(), weights)
    which = "token" if token else "avg"
    for block, shown in zip(blocks, raw_attention(model, images), strict=True):
        close(shown, block.average(which))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_weights_with_relative_or_rotary_positions_equal_timms_extraction(name):
    model = timms(name, **{**WIDE, "use_rel_pos_bias": True} if "beit" in name else WIDE)
    images = images_for(model)
    model.global_pool = "token"  # otherwise the maps are those of the patches
    blocks, maps = attention_maps(model, images)[1], raw_attention(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        expected = AttentionExtract(model, method="hook")(images).values()
    for block, shown, weights in zip(blocks, maps, expected, strict=True):
        close(block.dense(), weights)
        close(shown.flatten(2), weights[:, :, 0, 1:])


# Distances and maps.


def mean_distance(weights, grid, prefix, pixels):
    """The mean distance for weights (N, N), by two loops over the patches."""
    total = 0
    count = grid[0] * grid[1]
    for i in range(count):
        row = weights[prefix + i, prefix:]
        apart = [
            np.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]) for j in range(count)
        ]
        total += pixels * (row * apart).sum() / row.sum()
    return total / count


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ours", "class token"),
        ("timm", "registers"),
        ("swin", "v1"),
        ("swin", "v2, padded windows"),
    ],
)
def test_mean_distance_equals_two_loops(kind, name):
    model, images = built(kind, name)
    for block in attention_maps(model, images[:1])[1]:
        found = block.mean_distance(7.0)
        for head, weights in enumerate(block.dense()[0].double().numpy()):
            expected = mean_distance(weights, block.grid_size, block.num_prefix_tokens, 7.0)
            assert found[0, head].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_attention_has_the_mean_distance_of_all_pairs(prefix):
    grid = (5, 8)
    tokens = prefix + 40
    block = _arrange_tokens(grid, prefix, torch.full((2, 3, tokens, tokens), 1 / tokens))
    places = np.stack(np.divmod(np.arange(40), 8), 1)
    expected = 2 * pdist(places).sum() / 40**2 * 16  # the distance of a patch to itself is 0
    close(block.mean_distance(16), torch.full((2, 3), expected, dtype=torch.float32), rtol=1e-5)


def test_distance_is_zero_to_itself_and_one_patch_to_a_neighbor():
    itself, neighbor = torch.eye(12)[None, None], torch.eye(12)[[1, 0, 3, 2, *range(4, 12)]]
    assert _arrange_tokens((3, 4), 0, itself).mean_distance(16).item() == 0
    assert _arrange_tokens((3, 4), 0, neighbor[None, None]).mean_distance(
        12
    ).item() == pytest.approx(4)


def test_maps_are_resized_like_pillow_does():
    maps = torch.rand(3, 7, 5)
    for large, small in zip(resize_maps(maps, 56), maps, strict=True):
        expected = Image.fromarray(small.numpy()).resize((56, 56), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(large, np.asarray(expected), atol=1e-6)


def test_blocks_and_heads_count_from_one():
    maps = [torch.rand(2, heads, 3, 3) for heads in (2, 2, 4)]
    assert torch.equal(select_map(maps, 1, 2), maps[0][:, 1])
    assert torch.equal(select_map(maps, 3, 4), maps[2][:, 3])
    assert torch.equal(select_map(maps, -1, 1), maps[2][:, 0])
    assert torch.equal(select_map(maps, -3, None), maps[0].mean(1))


# Errors.


def test_unavailable_methods_have_a_reason():
    assert unavailable_methods(*built("swin", "v1")) == {}
    assert unavailable_methods(*built("ours", "mean beside a class token")) == {}
    assert "class token" in unavailable_methods(*built("ours", "class token")).pop("grad-cam")
    cnn = unavailable_methods(timm.create_model("test_resnet"), torch.randn(2, 3, 64, 64))
    assert set(cnn) == {"raw", "rollout", "gradient-rollout"}
    headless = timms(SWIN, **{**EVEN, "num_classes": 0})
    assert set(unavailable_methods(headless, images_for(headless))) == {
        "gradient-rollout",
        "grad-cam",
    }


def test_blocks_that_see_other_tokens_than_the_patches_have_no_maps():
    """The blocks of CaiT see only the patches; the patches of a hybrid ViT are those of a CNN."""
    cait = timm.create_model("cait_xxs24_224", img_size=32, depth=2, num_classes=3)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1, num_classes=3)
    for model, side in ((cait, 32), (hybrid, 64)):
        reasons = unavailable_methods(model, torch.randn(1, 3, side, side))
        assert "attends to" in reasons["raw"], reasons


def test_patches_without_a_convolution_are_placed_by_their_size():
    config = ViTConfig(16, 4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    model = shaken(VisionTransformer(config)).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = raw_attention(model, images)
    conv, linear = model.patch_embed.proj, torch.nn.Linear(48, 8)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data

    class Unfold(torch.nn.Module):
        patch_size, dynamic_img_size = 4, False
        proj = linear

        def forward(self, x):
            return self.proj(torch.nn.functional.unfold(x, 4, stride=4).mT)

    model.patch_embed = Unfold()
    torch.testing.assert_close(raw_attention(model, images), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "head", "message"),
    [
        (0, None, "LAYER=0: .*blocks 1 to 3"),
        (4, None, "LAYER=4: .*blocks 1 to 3"),
        (-4, None, "LAYER=-4: .*-1: the last"),
        (1, 0, "HEAD=0: block 1 has heads 1 to 2"),
        (1, 3, "HEAD=3: block 1 has heads 1 to 2"),
        (-1, 5, "HEAD=5: block 3 has heads 1 to 4"),
    ],
)
def test_missing_block_or_head_ends_in_a_message(layer, head, message):
    maps = [torch.rand(2, heads, 3, 3) for heads in (2, 2, 4)]
    with pytest.raises(UserError, match=message):
        select_map(maps, layer, head)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_message_for_a_cnn_recommends_grad_cam(method):
    model = mixed(timm.create_model("test_resnet"))
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(UserError, match=r"ResNet is not a ViT.*METHOD=grad-cam"):
        method(model, images)
    assert_unchanged(model, partial(method, model, images), UserError)
    assert_unchanged(model, partial(grad_cam, model, images))


class LinearAttention(nn.Module):
    """Attention without softmax, so it has no weights to record."""

    def __init__(self, attention):
        super().__init__()
        self.proj = attention.proj

    def forward(self, x, **options):
        return self.proj(x.mean(1, keepdim=True).expand_as(x))


def test_message_names_blocks_without_softmax():
    model = timms("vit_tiny_patch16_224", **WIDE)
    model.blocks[1].attn = LinearAttention(model.blocks[1].attn)
    for method in (attention_maps, rollout, gradient_rollout):
        action = partial(method, model, images_for(model))
        with pytest.raises(UserError, match="attention of VisionTransformer: 2 of 3 blocks"):
            action()
        assert_unchanged(model, action, UserError)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("samvit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
        ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    ],
)
def test_other_kinds_of_attention_end_in_a_message(name, options):
    model = timm.create_model(name, num_classes=5, **options).eval()
    for method in (attention_maps, rollout, gradient_rollout):
        with pytest.raises(UserError):
            method(model, torch.randn(1, 3, 224, 224))


def test_tokens_that_do_not_fit_the_grid_end_in_a_message():
    with pytest.raises(UserError, match="16 tokens, but 1 prefix tokens and 4 x 4 patches make 17"):
        _arrange_tokens((4, 4), 1, torch.rand(1, 2, 16, 16))


@pytest.mark.parametrize(("kind", "name"), [("ours", "class token"), ("timm", "distilled")])
def test_grad_cam_of_a_class_token_recommends_gradient_rollout(kind, name):
    model, images = built(kind, name)
    message = "reads the class token, not the patches. Use METHOD=gradient-rollout"
    with pytest.raises(UserError, match=message):
        grad_cam(model, images)


def test_grad_cam_rejects_features_without_a_grid():
    hybrid = timm.create_model("vit_small_resnet26d_224", embed_dim=32, depth=1, num_heads=4)
    with pytest.raises(UserError, match="50 tokens of VisionTransformer in a grid"):
        grad_cam(hybrid, torch.randn(1, 3, 224, 224))
    model, images = built("ours", "class token")
    model.forward_features = lambda x: [x, x]
    with pytest.raises(UserError, match="one last feature map; VisionTransformer has several"):
        grad_cam(model, images)


@pytest.mark.parametrize(
    "model",
    [
        partial(ours, num_classes=0, **MEAN), partial(timms, REG4, **{**WIDE, "num_classes": 0}),
        partial(timms, SWIN, **{**EVEN, "num_classes": 0}),
    ],
    ids=["ours", "timm", "swin"],
)  # fmt: skip
def test_model_without_a_head_has_no_class_to_explain(model):
    model = model()
    images = images_for(model)
    for method in (gradient_rollout, grad_cam):
        with pytest.raises(UserError, match=r"no class to explain.*METHOD=raw and METHOD=rollout"):
            method(model, images)
        assert_unchanged(model, partial(method, model, images), UserError)
    assert raw_attention(model, images)[0].ndim == 4
    assert rollout(model, images).ndim == 3
