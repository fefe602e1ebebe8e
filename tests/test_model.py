"""model.py against timm and transformers: the same weights give the same logits and gradients."""

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
DINO = {**SMALL, "depth": 2, "patch_size": 14, "init_values": 1e-5, "num_classes": 7}
AVG = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 96, "depth": 4}
AVG = {**AVG, "num_heads": 3, "global_pool": "avg"}
REFERENCES = {
    "vit_tiny_patch16_224": (ViTConfig(**TINY, depth=3), {"depth": 3}),
    "vit_small_patch32_224": (ViTConfig(**SMALL, patch_size=32, depth=3), {"depth": 3}),
    "deit3_small_patch16_224": (
        ViTConfig(**SMALL, depth=3, init_values=1e-6, no_embed_class=True),
        {"depth": 3},
    ),
    "vit_small_patch14_dinov2": (
        ViTConfig(**DINO, img_size=518),
        {"depth": 2, "num_classes": 7},
    ),
    "patch4_32_avg": (ViTConfig(**AVG), AVG),
    "patch4_32_avg_no_class_token": (
        ViTConfig(**AVG, class_token=False),
        {**AVG, "class_token": False},
    ),
}


def timm_model(name, options):
    """A timm model with random weights, none of which has a special value such as 0."""
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


def test_resampled_positions_match_timm():
    """timm resamples the 37 x 37 positions of DINOv2 while it loads the weights for 224 pixels."""
    options = {"depth": 2, "num_classes": 7}
    state = timm_model("vit_small_patch14_dinov2", options).state_dict()
    reference = timm.create_model("vit_small_patch14_dinov2", **options, img_size=224).eval()
    resampled = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), reference)
    reference.load_state_dict(resampled)
    ours = VisionTransformer(ViTConfig(**DINO, img_size=224)).eval()
    state["pos_embed"] = interpolate(state["pos_embed"], 16, num_prefix_tokens=1)
    ours.load_state_dict(state, strict=True)
    assert_same_logits_and_gradients(ours, reference, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_other_image_sizes_match_timm(class_token, no_embed_class):
    options = {"class_token": class_token, "no_embed_class": no_embed_class}
    options = {**AVG, **options, "dynamic_img_size": True}
    reference = timm_model("patch4", options)
    ours = VisionTransformer(ViTConfig(**options)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    for size in (4, 16, 32, 44):
        assert_same_logits_and_gradients(ours, reference, torch.randn(3, 3, size, size))
        ours.zero_grad()
        reference.zero_grad()
    for wrong in ((3, 16, 20), (3, 18, 18), (1, 16, 16), (3, 2, 2)):
        with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, "):
            ours(torch.randn(1, *wrong))


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
    """Renames transformers' weights to timm's names and joins the three projections into `qkv`."""
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
    """The fused kernel and the formula give the same output; each row of weights sums to one."""
    attention = Attention(SHAPE)
    x = torch.randn(2, 17, 32)
    out, weights = attention(x, return_weights=True)
    assert weights.shape == (2, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))
    torch.testing.assert_close(attention(x), out, atol=1e-6, rtol=1e-6)
    q, k, v = attention.qkv(x).reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(weights @ v, fused, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_one_scale_applies_in_fp32_and_in_bf16(bf16):
    """In fp32 the CPU runs the fused kernel, in bf16 the formula written out."""
    torch.manual_seed(0)
    attention, x = Attention(SHAPE), torch.randn(2, 17, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        correct = attention(x)
        attention.scale = 3.0
        q, k, v = attention.qkv(x).reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = (q.float() @ k.float().mT * 3.0).softmax(-1)
        expected = attention.proj((weights @ v.float()).transpose(1, 2).flatten(2))
        wrong = attention(x)
    tolerance = 0.02 if bf16 else 1e-5
    torch.testing.assert_close(wrong, expected, atol=tolerance, rtol=tolerance)
    assert (wrong - correct).abs().max() > 5 * tolerance


def test_only_bf16_on_a_cpu_avoids_the_fused_kernel(monkeypatch):
    calls, fused = [], torch.nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(args[0].dtype)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    attention, x = Attention(SHAPE), torch.randn(2, 17, 32)
    with torch.autocast("cpu", torch.bfloat16):
        attention(x)
    assert calls == []
    with torch.autocast("cpu", torch.float16):
        attention(x)
    attention(x)
    assert calls == [torch.float16, torch.float32]


def test_bf16_residual_changes_only_bf16_on_a_cpu():
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(32, 8, num_classes=5, embed_dim=48, depth=3, num_heads=3))
    torch.nn.init.normal_(model.head.weight)
    images, dtypes = torch.randn(8, 3, 32, 32), []
    model.blocks[1].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    logits = {}
    for bf16 in (False, True):
        for model.bf16_residual in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits[bf16, model.bf16_residual] = model(images).float()
    assert dtypes == [torch.float32] * 3 + [torch.bfloat16]
    exact = logits[False, False]
    assert torch.equal(logits[False, True], exact)
    assert (logits[True, True] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_attention_dropout_keeps_the_expectation_and_stops_in_eval_mode(fused):
    torch.manual_seed(0)
    attention = Attention(dataclasses.replace(SHAPE, attn_drop_rate=0.5))
    attention.fused_attn = fused
    x = torch.randn(1, 17, 32)
    exact = attention.eval()(x)
    torch.testing.assert_close(attention(x), exact, atol=0, rtol=0)
    batch = attention.train()(x.expand(4000, -1, -1))
    assert batch.std(dim=0).min() > 0
    error = (batch.mean(dim=0) - exact[0]) / (batch.std(dim=0) / 4000**0.5)
    assert error.abs().max() < 5  # standard errors, over 544 outputs


def test_images_in_a_batch_do_not_affect_each_other():
    model = VisionTransformer(SHAPE).eval()
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    model(images)[2].sum().backward()
    touched = images.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False]


def test_without_positions_permuting_patches_permutes_tokens():
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
    assert out.flatten(1).std(dim=1).max() == 0  # each image is kept or dropped as a whole
    assert out.mean().item() == pytest.approx(1, abs=0.02)  # standard error 0.0046
    assert drop.eval()(x) is x


def test_drop_path_drops_attention_and_mlp():
    """If a block drops both branches, nothing but its input is left."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, SHAPE.embed_dim)
    block = Block(SHAPE, drop_path=0.1)
    assert not block(x).equal(x)
    block.drop_path.forward = torch.zeros_like
    assert block(x).equal(x)


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
    ("wrong", "message"),
    [
        (
            {"img_size": 33, "patch_size": 4},
            r"patch_size=4 must divide img_size=33\. .*\[1, 3, 11, 33\].* img_size to 32",
        ),
        ({"patch_size": 300}, r"patch_size=300 must divide .* img_size to 300"),
        ({"embed_dim": 190, "num_heads": 3}, r"num_heads=3 must divide embed_dim=190.*\[1, 2, 5,"),
        ({"img_size": "224"}, "img_size='224' must be a single int, such as 224"),
        ({"img_size": (224, 224)}, r"img_size=\(224, 224\) must be a single int, such as 224"),
        ({"depth": 1.5}, "depth=1.5 must be a single int, such as 12"),
        ({"num_heads": True}, "num_heads=True must be a single int, such as 12"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
        ({"qkv_bias": 1}, "qkv_bias=1 must be True or False"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\), such as 0.1"),
        ({"drop_rate": -0.1}, r"drop_rate=-0.1 must be in \[0, 1\)"),
        ({"attn_drop_rate": float("nan")}, "attn_drop_rate=nan must be a finite number, such as"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be large enough for one hidden unit, such as 4.0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf must be a finite number, such as 4.0"),
        ({"mlp_ratio": True}, "mlp_ratio=True must be a finite number, such as 4.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0, such as 1e-6"),
        ({"norm_eps": "1e-6"}, "norm_eps='1e-6' must be a finite number, such as 1e-06"),
        ({"init_values": float("nan")}, "init_values=nan must be a finite number, .* or None"),
        ({"global_pool": "max"}, "global_pool='max' must be 'token' or 'avg'"),
        ({"class_token": False}, "class_token=False must be True, .*global_pool='avg'"),
    ],
    ids=str,
)
def test_an_invalid_field_is_named_with_a_value_that_works(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**wrong)
    assert issubclass(ConfigError, ValueError)


def test_whole_numbers_are_valid_floats():
    model = VisionTransformer(dataclasses.replace(SHAPE, mlp_ratio=2, init_values=1, drop_rate=0))
    assert model(torch.randn(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 20, 20), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, 16, 16\), got \[.*\]"):
        VisionTransformer(SHAPE)(torch.randn(shape))
