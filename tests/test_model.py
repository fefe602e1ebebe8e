"""model.py against timm and transformers: the same weights give the same numbers."""

import dataclasses
import random

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from transformers import ViTConfig as HFConfig
from transformers import ViTForImageClassification

from model import Attention, Block, ConfigError, DropPath, PatchEmbed, VisionTransformer, ViTConfig
from model import interpolate_pos_embed as interpolate

TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
DINO = {**SMALL, "patch_size": 14, "init_values": 1e-5, "num_classes": 7}
AVG = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 96, "depth": 4}
AVG = {**AVG, "num_heads": 3, "global_pool": "avg"}
REFERENCES = {
    "vit_tiny_patch16_224": (ViTConfig(**TINY), {}),
    "vit_small_patch32_224": (ViTConfig(**SMALL, patch_size=32), {}),
    "deit3_small_patch16_224": (ViTConfig(**SMALL, init_values=1e-6, no_embed_class=True), {}),
    "vit_small_patch14_dinov2": (ViTConfig(**DINO, img_size=518), {"num_classes": 7}),
    "patch4_32_avg": (ViTConfig(**AVG), AVG),
    "patch4_32_avg_no_class_token": (
        ViTConfig(**AVG, class_token=False),
        {**AVG, "class_token": False},
    ),
}


def timm_model(name, options):
    """timm's model of a random state in which no parameter is at a special value such as 0."""
    torch.manual_seed(0)
    if name.startswith("patch4"):
        model = timm.models.VisionTransformer(**options)
    else:
        model = timm.create_model(name, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def assert_same_logits_and_gradients(ours, reference, images):
    labels = torch.arange(len(images))
    logits, expected = ours(images), reference(images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    torch.nn.functional.cross_entropy(expected, labels).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_gradients_match_timm(name):
    config, options = REFERENCES[name]
    reference = timm_model(name, options)
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    size = config.img_size
    images = torch.randn(1 if size > 400 else 3, config.in_chans, size, size)
    assert_same_logits_and_gradients(ours, reference, images)


def test_resampled_to_another_size_matches_timm():
    """DINOv2's 37 x 37 positions at 224 pixels, where timm resamples while it loads."""
    state = timm_model("vit_small_patch14_dinov2", {"num_classes": 7}).state_dict()
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=7, img_size=224).eval()
    resampled = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), reference)
    reference.load_state_dict(resampled)
    ours = VisionTransformer(ViTConfig(**DINO, img_size=224)).eval()
    state["pos_embed"] = interpolate(state["pos_embed"], 16, num_prefix_tokens=1)
    ours.load_state_dict(state, strict=True)
    assert_same_logits_and_gradients(ours, reference, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("classed", [False, True])
def test_images_of_other_sizes_match_timm(bare, classed):
    options = {**AVG, "class_token": classed, "no_embed_class": bare, "dynamic_img_size": True}
    reference = timm_model("patch4", options)
    ours = VisionTransformer(ViTConfig(**options)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    for size in (4, 16, 32, 44):
        assert_same_logits_and_gradients(ours, reference, torch.randn(3, 3, size, size))
        ours.zero_grad()
        reference.zero_grad()
    for odd in ((3, 16, 20), (3, 18, 18), (1, 16, 16), (3, 2, 2)):
        with pytest.raises(ValueError, match="not \\(3, "):
            ours(torch.randn(1, *odd))


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_match_timm(seed):
    rng = random.Random(seed)
    heads, patch, grid = rng.choice([1, 2, 4]), rng.choice([1, 2, 5]), rng.choice([1, 3, 4])
    token = rng.random() < 0.5
    options = {
        "img_size": patch * grid,
        "patch_size": patch,
        "in_chans": rng.choice([1, 3, 4]),
        "num_classes": rng.choice([0, 1, 5]),
        "embed_dim": heads * rng.choice([4, 8]),
        "depth": rng.choice([1, 3]),
        "num_heads": heads,
        "mlp_ratio": rng.choice([0.5, 2, 4.0]),
        "qkv_bias": rng.random() < 0.5,
        "init_values": rng.choice([None, 0.1]),
        "global_pool": "token" if token else "avg",
        "class_token": token or rng.random() < 0.5,
        "no_embed_class": rng.random() < 0.5,
    }
    torch.manual_seed(seed)
    reference = timm.models.VisionTransformer(**options).eval()
    ours = VisionTransformer(ViTConfig(**options)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, options["in_chans"], options["img_size"], options["img_size"])
    torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.forward_head(ours.forward_features(images)), ours(images), atol=0, rtol=0
    )


def test_logits_match_transformers():
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf = HFConfig(**sizes, intermediate_size=128, image_size=48, patch_size=8, num_labels=5)
    torch.manual_seed(0)
    reference = ViTForImageClassification(hf).eval()
    config = ViTConfig(
        img_size=48, patch_size=8, num_classes=5, embed_dim=64, depth=3, num_heads=4,
        mlp_ratio=2, norm_eps=hf.layer_norm_eps,
    )  # fmt: skip
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(timm_names(reference.state_dict()), strict=True)
    images = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(ours(images), reference(images).logits, atol=1e-5, rtol=1e-5)


def timm_names(state):
    """transformers' names to timm's; the three projections become one `qkv`."""
    renames = (
        ("vit.layernorm.", "norm."), ("classifier.", "head."), ("vit.", ""),
        ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("encoder.layer.", "blocks."), ("layers.", "blocks."),
        ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"), ("attention.o_proj", "attn.proj"),
        ("attention.attention.", "attention."), ("q_proj", "query"), ("k_proj", "key"),
        ("v_proj", "value"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    )  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        renamed[key] = value
    for key in [k for k in renamed if "attention.query" in k]:
        parts = [renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        renamed[key.replace("attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("grid", [1, 5, 16, 37, 40])
@pytest.mark.parametrize("prefix", [0, 1])
def test_interpolate_pos_embed_matches_timm(grid, prefix):
    positions = torch.randn(1, prefix + 14 * 14, 32)
    ours = interpolate(positions, grid, prefix)
    theirs = resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=prefix)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert ours.shape == (1, prefix + grid * grid, 32)


SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
SHAPE = ViTConfig(**SHAPE, num_classes=6)


def test_attention_with_weights_equals_without():
    """Also on the kernel that GPUs take, and for weights that sum to one and give the output."""
    attention = Attention(SHAPE)
    x = torch.randn(2, 17, 32)
    out, weights = attention(x, return_weights=True)
    assert weights.shape == (2, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))
    torch.testing.assert_close(attention(x), out, atol=1e-6, rtol=1e-6)
    q, k, v = attention.qkv(x).reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(weights @ v, fused, atol=1e-6, rtol=1e-6)


def test_images_of_a_batch_do_not_see_each_other():
    model = VisionTransformer(SHAPE).eval()
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    model(images)[2].sum().backward()
    touched = images.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False]


def test_permuting_patches_permutes_tokens_without_positions():
    model = VisionTransformer(SHAPE).eval()
    torch.nn.init.zeros_(model.pos_embed)
    images = torch.randn(2, 3, 16, 16)
    order = torch.randperm(16)
    patches = torch.nn.functional.unfold(images, 4, stride=4)  # (B, C*P*P, N)
    shuffled = torch.nn.functional.fold(patches[:, :, order], (16, 16), 4, stride=4)
    tokens, permuted = model.forward_features(images), model.forward_features(shuffled)
    torch.testing.assert_close(permuted[:, 0], tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_parameter_gets_a_gradient(pool):
    config = dataclasses.replace(
        SHAPE, global_pool=pool, class_token=pool == "token", init_values=0.1
    )
    model = VisionTransformer(config)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    x, drop = torch.ones(20_000, 2, 3), DropPath(0.3)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert out.flatten(1).std(dim=1).max() == 0  # an image is kept or dropped as a whole
    assert out.mean().item() == pytest.approx(1, abs=0.02)  # standard error 0.0046
    assert drop.eval()(x) is x


def test_drop_path_grows_linearly_with_depth():
    model = VisionTransformer(dataclasses.replace(SHAPE, drop_path_rate=0.2))
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.1, 0.2])


def test_patch_embedding_is_one_linear_map_of_each_patch():
    embed = PatchEmbed(SHAPE)
    images = torch.randn(2, 3, 16, 16)
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)  # (B, N, C*P*P)
    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(images), expected, atol=1e-5, rtol=1e-5)


def test_block_shape_and_tokens():
    assert Block(SHAPE)(torch.randn(2, 17, 32)).shape == (2, 17, 32)
    assert VisionTransformer(SHAPE).forward_features(torch.randn(2, 3, 16, 16)).shape == (2, 17, 32)


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (
            {"img_size": 33, "patch_size": 4},
            r"patch_size=4 .*img_size=33.*\[1, 3, 11, 33\].*32 or 36",
        ),
        ({"patch_size": 300}, r"patch_size=300"),
        ({"embed_dim": 190, "num_heads": 3}, r"num_heads=3 .*\[1, 2, 5, 10, 19"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"depth": 0}, "depth=0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        ({"drop_rate": -0.1}, "drop_rate=-0.1"),
        ({"global_pool": "max"}, "global_pool='max' must be 'token' or 'avg'"),
        ({"class_token": False}, "class_token=False .*global_pool='avg'"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(wrong, advice):
    with pytest.raises(ConfigError, match=advice):
        ViTConfig(**wrong)
    assert issubclass(ConfigError, ValueError)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 20, 20\).*\(3, 16, 16\)"):
        VisionTransformer(SHAPE)(torch.randn(1, 3, 20, 20))
