"""lab/attention/extraction.py and saliency.py against independent code.

Weights against transformers and timm, and for Swin against a calculation pair by pair; rollouts
against matrix products in numpy; gradients against finite differences; Grad-CAM against captum.
"""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from PIL import Image
from scipy.spatial.distance import pdist
from timm.utils import AttentionExtract
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import ViTConfig as HFConfig
from transformers import ViTForImageClassification

from lab.attention.extraction import attention_maps, class_attention, from_tokens, grid_of, watching
from lab.attention.localization import upsample
from lab.attention.saliency import (
    grad_cam,
    gradient_rollout,
    methods_of,
    pick,
    raw,
    reads,
    rollout,
)
from lab.core.errors import UserError
from lab.models.conversion import from_transformers
from model import VisionTransformer, ViTConfig
from tests.shaken import shaken

SIZE = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
MEAN = {"class_token": False, "global_pool": "avg"}
WIDE = {**SIZE, "img_size": (16, 24)}
STAGES = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
EVEN = {**STAGES, "img_size": 32, "window_size": 4}
ODD = {**STAGES, "img_size": (20, 28), "window_size": (4, 3)}  # grids of 10 x 14 and 5 x 7
REG4 = "vit_small_patch14_reg4_dinov2"

OURS = {
    "class token": {},
    "mean, no class token, gray": {**MEAN, "in_chans": 1},
    "mean beside a class token": {"global_pool": "avg", "init_values": 0.5, "attn_drop_rate": 0.3},
    "LayerScale, no position for the class token": {"init_values": 0.5, "no_embed_class": True},
}
VITS = {  # of timm: architecture, arguments, tokens in front of the patches
    "vit": ("vit_tiny_patch16_224", WIDE, 1),
    "normed queries and keys": ("vit_tiny_patch16_224", {**WIDE, "qk_norm": True}, 1),
    "dropout": ("vit_tiny_patch16_224", {**WIDE, "attn_drop_rate": 0.5, "drop_rate": 0.5}, 1),
    "mean beside a class token": ("vit_tiny_patch16_224", {**WIDE, "global_pool": "avg"}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", WIDE, 2),
    "deit3": ("deit3_small_patch16_224", WIDE, 1),
    "dinov2": ("vit_small_patch14_dinov2", WIDE, 1),
    "registers": (REG4, WIDE, 5),
    "siglip": ("vit_base_patch16_siglip_224", WIDE, 0),
    "siglip, mean": ("vit_base_patch16_siglip_gap_224", WIDE, 0),
}
SWINS = {  # of timm: architecture, arguments, blocks that lose something to padding
    "v1": (SWIN, EVEN, ""),
    "v1, padded windows": (SWIN, ODD, "134"),  # block 2 shifts by what is padded: seams part them
    "v1, windows not square": (SWIN, {**EVEN, "img_size": (16, 36), "window_size": (4, 3)}, ""),
    "v2": (SWIN_V2, EVEN, ""),
    "v2, padded windows": (SWIN_V2, ODD, "134"),
    "v2, always partitioned": (SWIN_V2, {**EVEN, "img_size": 12, "always_partition": True}, "134"),
}
ZOO = [*(("ours", name) for name in OURS), *(("timm", name) for name in VITS)]
ZOO += [("swin", name) for name in SWINS]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ours(**options):
    return shaken(VisionTransformer(ViTConfig(**{"img_size": 16, **SIZE, **options})))


def timms(name, **options):
    return shaken(timm.create_model(name, **options))


def built(kind, name):
    """A small model of the zoo, all fused kernels on, and images for it."""
    if kind == "ours":
        model = ours(**OURS[name])
    else:
        architecture, options, _ = (VITS if kind == "timm" else SWINS)[name]
        model = timms(architecture, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # in a Swin v1, timm leaves it off
    return model, images_for(model)


def images_for(model, count=2):
    """Random images of the size and channels that a model wants."""
    embed = model.patch_embed
    size = (embed.img_size,) * 2 if isinstance(embed.img_size, int) else embed.img_size
    generator = torch.Generator().manual_seed(1)
    dtype = embed.proj.weight.dtype
    images = torch.randn(count, embed.proj.in_channels, *size, generator=generator)
    return images.to(dtype)


def dense(model, images):
    """(h, N, N) for each block, of the one image."""
    return [block.dense()[0].numpy() for block in attention_maps(model, images)[1]]


def prefix_of(model):
    if isinstance(model, VisionTransformer):
        return int(model.config.class_token)
    return getattr(model, "num_prefix_tokens", 0)


close = partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)


# Raw attention: of plain ViTs.


@pytest.mark.parametrize(("kind", "name"), ZOO)
def test_extraction_does_not_change_the_logits(kind, name):
    model, images = built(kind, name)
    with torch.no_grad():
        expected = model(images)
    logits, blocks = attention_maps(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not logits.requires_grad
    assert len(blocks) == (4 if kind == "swin" else 3)
    found = class_attention(model, images)
    assert (found is None) == (kind == "swin")  # whose attention is not plain
    if found:
        assert torch.equal(found[0], expected)  # the model's own kernel
        for row, block in zip(found[1], blocks, strict=True):
            close(row, block.dense()[:, :, 0])


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
    for looks, weights in zip(raw(model, images), expected.attentions, strict=True):
        close(looks, weights[:, :, 0, 1:].unflatten(-1, grid))


def extracted(monkeypatch, model, name, options, images):
    """timm's own extraction, from the same weights."""
    current = timm.layers.config._USE_FUSED_ATTN
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", current)  # set back at the end
    timm.layers.set_fused_attn(False)
    reference = timms(name, **options)
    reference.load_state_dict(model.state_dict(), strict=True)
    reference = AttentionExtract(reference, method="fx")
    with torch.no_grad():
        return list(reference(images).values())


@pytest.mark.parametrize("name", VITS)
def test_weights_and_pictures_equal_timms_own_extraction(name, monkeypatch):
    model, images = built("timm", name)
    expected = extracted(monkeypatch, model, *VITS[name][:2], images)
    blocks, prefix = attention_maps(model, images)[1], VITS[name][2]
    for block, weights in zip(blocks, expected, strict=True):
        close(block.dense(), weights)
        assert (block.prefix, block.grid) == (prefix, (4, 6))
    for looks, weights in zip(raw(model, images, "mean"), expected, strict=True):
        mean = weights[:, :, prefix:, prefix:].mean(2)
        for y, x in [(0, 0), (1, 5), (3, 2)]:  # row by row
            close(looks[:, :, y, x], mean[:, :, 6 * y + x])
    if prefix:
        for looks, weights in zip(raw(model, images, "class"), expected, strict=True):
            close(looks.flatten(2), weights[:, :, 0, prefix:])
    which = "mean" if name.startswith(("siglip", "mean")) else "class"
    assert reads(model) == which
    assert all(map(torch.equal, raw(model, images), raw(model, images, which)))


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_random_vits_equal_timms_own_extraction(seed):
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
    for block, weights in zip(attention_maps(model, images)[1], expected, strict=True):
        close(block.dense(), weights)
    assert all(map(torch.equal, raw(model, images), raw(model, images, reads(model))))
    assert reads(model) == ("class" if token else "mean")


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_with_relative_or_rotary_positions_equals_timms_own_extraction(name):
    model = timms(name, **{**WIDE, "use_rel_pos_bias": True} if "beit" in name else WIDE)
    images = images_for(model)
    blocks = attention_maps(model, images)[1]
    looks = raw(model, images, "class")
    assert class_attention(model, images) is None
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        expected = AttentionExtract(model, method="hook")(images).values()
    for block, look, weights in zip(blocks, looks, expected, strict=True):
        close(block.dense(), weights)
        close(look.flatten(2), weights[:, :, 0, 1:])


# Raw attention: of a Swin.


def windows_of(block, grid):
    """Each window's slots: (patch, or None for padding; sides of the seams that shifting leaves).

    As in Liu et al. 2021, fig. 4: the picture is rolled up and left, then cut into windows from
    the top left; what was rolled over the edge does not see what it lands beside. timm pads
    between the two, and puts the seams where they are in the padded picture.
    """
    (H, W), (high, wide), (down, right) = grid, block.window_size, block.shift_size
    bottom, end = -(-H // high) * high - down, -(-W // wide) * wide - right
    for top in range(0, H, high):
        for left in range(0, W, wide):
            slots = [(y, x) for y in range(top, top + high) for x in range(left, left + wide)]
            yield [
                (
                    (y + down) % H * W + (x + right) % W if y < H and x < W else None,
                    (down > 0 and y >= bottom, right > 0 and x >= end),
                )
                for y, x in slots
            ]


def bias_between(attention, dy, dx):
    """The bias (h,) of a pair: of v1 a table by offset, of v2 an MLP of log-spaced offsets."""
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
    """The logit (h,) of a pair of slots, each its (q, k) and its place in the window."""
    q, k = a.q, b.k  # (h, d)
    if hasattr(attention, "cpb_mlp"):  # cosine attention
        q, k = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, k))
        scale = np.minimum(np.exp(attention.logit_scale.detach().numpy().ravel()), 100)
    else:
        scale = q.shape[1] ** -0.5
    return (q * k).sum(1) * scale + bias_between(attention, a.y - b.y, a.x - b.x)


def swin_reference(block, tokens):
    """Attention (h, N, N) over the patches (H, W, D) that enter a block's attention."""
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
    """Each block's weights against `swin_reference`; returns the blocks of timm's."""
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
        if not hasattr(module.attn, "cpb_mlp"):  # v2 norms what attention gives, not what it takes
            tokens = module.norm1(tokens)
        for image in range(len(images)):
            expected = swin_reference(module, tokens[image].detach())
            np.testing.assert_allclose(found.dense()[image], expected, atol=2e-6, rtol=1e-4)
    return modules


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_one_window_equals_attention_by_hand(name):
    model = timms(name, **{**STAGES, "img_size": (8, 12), "window_size": (4, 6)})
    blocks = assert_equals_pair_by_pair(model, images_for(model))
    assert blocks[0].window_size == (4, 6)
    assert not any(blocks[1].shift_size)


@pytest.mark.parametrize("name", ["v1", "v1, padded windows", "v2, padded windows"])
def test_shifted_and_padded_windows_equal_attention_pair_by_pair(name):
    model, images = built("swin", name)
    blocks = assert_equals_pair_by_pair(model, images[:1])
    assert all(blocks[1].shift_size)


@pytest.mark.parametrize("seed", range(8))
def test_random_swins_equal_attention_pair_by_pair(seed):
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
def test_patches_see_each_other_where_they_share_a_shifted_window_of_the_plane(name):
    """Windows that begin at the shift: what only the rolled picture makes neighbours is apart."""
    model, images = built("swin", name)
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block, found in zip(blocks, attention_maps(model, images[:1])[1], strict=True):
        (high, wide), (down, right) = block.window_size, block.shift_size
        y, x = np.divmod(np.arange(found.tokens), found.grid[1])
        window = np.stack([(y - down) // high, (x - right) // wide])
        together = (window[:, :, None] == window[:, None]).all(0)
        seen = found.dense()[0].numpy() > 1e-20
        assert (seen == together).all()


@pytest.mark.parametrize(("kind", "name"), ZOO)
def test_a_row_sums_to_one_and_to_less_only_where_a_window_is_padded(kind, name):
    model, images = built(kind, name)
    modules = [block for stage in getattr(model, "layers", ()) for block in stage.blocks]
    blocks = attention_maps(model, images)[1]
    padded = ""
    for number, block in enumerate(blocks):
        weights = block.dense()
        assert weights.shape == (2, weights.shape[1], block.tokens, block.tokens)
        assert weights.min() >= 0
        sums, losing = weights.sum(-1), torch.zeros(block.tokens, dtype=bool)
        for window in windows_of(modules[number], block.grid) if modules else ():
            beside = [sides for patch, sides in window if patch is None]
            lost = [patch for patch, sides in window if sides in beside and patch is not None]
            losing[lost] = True
        close(sums[..., ~losing], torch.ones_like(sums[..., ~losing]))
        if losing.any():
            padded += str(number + 1)
            assert sums.max() < 1 + 1e-5
            assert sums[..., losing].min() < 0.99
    assert padded == (SWINS[name][2] if kind == "swin" else "")


@pytest.mark.filterwarnings("ignore:NOTE. The nodes")  # torchvision, on its tracing
def test_window_weights_equal_timms_own_extraction(monkeypatch):
    model, images = built("swin", "v1")
    expected = extracted(monkeypatch, model, *SWINS["v1"][:2], images)
    for block, weights in zip(attention_maps(model, images)[1], expected, strict=True):
        close(block.weights, weights.unflatten(0, (2, -1)).transpose(1, 2))


@pytest.mark.parametrize("name", ["v1", "v2, padded windows"])
def test_pulling_a_row_equals_the_product_with_the_matrix(name):
    model, images = built("swin", name)
    for block in attention_maps(model, images)[1]:
        weights = block.dense()
        for shape in [(1, 1), (2, 1), (1, weights.shape[1]), weights.shape[:2]]:
            rows = torch.randn(*shape, block.tokens)
            close(block.pull(rows), (rows[..., None, :] @ weights).squeeze(-2))
        close(block.gather(block.weights.sum(-1)), weights.sum(-1))
        looks = weights.mean(2).unflatten(-1, block.grid)
        close(block.of(block.queries()), looks)
    close(raw(model, images)[-1], looks)


# Nothing is left behind.


def state_of(model):
    """All that an extraction could leave behind."""
    return [
        (
            name, module.training, getattr(module, "fused_attn", None), sorted(vars(module)),
            {key: len(held) for key, held in vars(module).items() if key.endswith("_hooks")},
            [(key, p.requires_grad, p.grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


def mixed(model):
    """Some modules are training, some parameters frozen, fused kernels in part on."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "fused_attn")):
        module.fused_attn = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 4 > 0)
    return model


METHODS = [attention_maps, class_attention, raw, rollout, gradient_rollout, grad_cam]
WATCHED = {
    "ours": lambda: ours(global_pool="avg", drop_rate=0.5, attn_drop_rate=0.5),
    "timm": lambda: timms(REG4, **{**WIDE, "global_pool": "avg", "drop_path_rate": 0.5}),
    "swin": lambda: timms(SWIN, **ODD, attn_drop_rate=0.5),
}


def assert_untouched(model, action, error=None):
    before = state_of(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert not any(sum(hooks.values()) for *_, hooks, _ in before)
    if error:
        with pytest.raises(error):
            action()
    else:
        action()
    assert state_of(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", WATCHED)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_and_its_images_are_as_before(kind, method):
    model = mixed(WATCHED[kind]())
    images = images_for(model)
    copy = images.clone()
    assert_untouched(model, lambda: method(model, images))
    assert torch.equal(images, copy)
    assert not images.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("kind", WATCHED)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_as_before_after_an_error_within(kind, method, monkeypatch):
    if (kind, method) == ("swin", class_attention):
        return  # which does nothing there
    model = mixed(WATCHED[kind]())
    small = images_for(model)[..., :-4]
    assert_untouched(model, lambda: method(model, small), (ValueError, AssertionError))

    def interrupted(*_):
        raise KeyboardInterrupt

    last = [module for module in model.modules() if type(module).__name__ in ("MLP", "Mlp")][-1]
    monkeypatch.setattr(last, "forward", interrupted)
    assert_untouched(model, lambda: method(model, images_for(model)), KeyboardInterrupt)


@pytest.mark.parametrize("kind", WATCHED)
def test_a_model_is_as_before_after_an_error_in_what_is_made_of_it(kind, monkeypatch):
    model, calls = mixed(WATCHED[kind]()), []
    images = images_for(model)

    def reduce(error, block):
        calls.append(block)
        if len(calls) % 2 == 0:
            raise error

    for error in (ZeroDivisionError, KeyboardInterrupt):
        action = partial(attention_maps, model, images, partial(reduce, error))
        assert_untouched(model, action, error)
    assert len(calls) == 4  # the second block's was the last one

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    for method in (gradient_rollout, grad_cam):
        assert_untouched(model, partial(method, model, images), KeyboardInterrupt)


@pytest.mark.parametrize("kind", WATCHED)
def test_a_model_in_training_is_looked_at_as_in_evaluation(kind):
    """Dropout would change everything: it is off; nor does it matter who asked for no gradients."""
    model = WATCHED[kind]()
    images = images_for(model)
    with torch.no_grad():
        logits = model(images)
        expected = [method(model, images) for method in (rollout, gradient_rollout, grad_cam)]
    model.train()
    with torch.no_grad():
        assert (model(images) - logits).abs().max() > 1e-2
    close(attention_maps(model, images)[0], logits, atol=1e-5)
    maps = [method(model, images) for method in (rollout, gradient_rollout, grad_cam)]
    assert all(map(torch.equal, maps, expected))
    assert not any(found.requires_grad for found in maps)


@pytest.mark.parametrize("kind", WATCHED)
def test_blocks_come_one_by_one_and_their_weights_are_freed(kind):
    model, held, alive = WATCHED[kind](), [], []

    def reduce(block):
        held.append(StorageWeakRef(block.weights.untyped_storage()))
        alive.append(sum(not reference.expired() for reference in held))
        return block.weights.sum().item()

    _, sums = attention_maps(model, images_for(model), reduce)
    assert alive == [1] * len(sums)
    assert len(sums) > 2
    assert all(reference.expired() for reference in held)


# Rollout.


def numpy_rollout(steps, row, fusion, discard, residual):
    """Attention (h, N, N) block by block, and between stages a merge; discard counts `pairs`."""
    product = np.eye(steps[0][0].shape[-1])
    for weights, pairs in steps:
        if weights.ndim == 3:
            weights = getattr(weights, fusion)(0)
            drop = weights.size - pairs + int(discard * pairs)  # the rest is zero
            weights.ravel()[np.argsort(weights, None)[:drop]] = 0
            weights = residual * np.eye(len(weights)) + (1 - residual) * weights
            weights /= np.maximum(weights.sum(1, keepdims=True), 1e-12)
        product = weights @ product
    return row @ product


def row_of(tokens, prefix, which):
    return np.eye(tokens)[0] if which == "class" else (np.arange(tokens) >= prefix) / (
        tokens - prefix)  # fmt: skip


ROLLED = {
    "class token": (lambda: ours(), "class"),
    "mean": (lambda: ours(**MEAN), "mean"),
    "mean beside a class token": (lambda: ours(global_pool="avg"), "mean"),
    "registers": (lambda: timms(REG4, **WIDE), "class"),
}
SETTINGS = [("mean", 0.0, 0.5), ("mean", 0.9, 0.5), ("mean", 0.3, 0.0), ("mean", 0.0, 1.0)]
SETTINGS += [("max", 0.0, 0.3), ("max", 0.95, 0.0), ("min", 0.5, 0.5), ("min", 0.0, 0.7)]


@pytest.mark.parametrize("name", ROLLED)
def test_rollout_equals_matrix_products(name):
    model, which = ROLLED[name][0]().double(), ROLLED[name][1]
    images = images_for(model, 1)
    prefix = prefix_of(model)
    for fusion, discard, residual in SETTINGS:
        blocks = dense(model, images)
        steps = [(weights, weights[0].size) for weights in blocks]
        row = row_of(len(blocks[0][0]), prefix, which)
        expected = numpy_rollout(steps, row, fusion, discard, residual)[prefix:]
        found = rollout(model, images, fusion, discard, residual)
        np.testing.assert_allclose(found[0].flatten(), expected, atol=1e-12, rtol=1e-9)
        assert found.shape == (1, *grid_of(model, images))
    defaults = rollout(model, images)
    assert torch.equal(defaults, rollout(model, images, "mean", 0, 0.5))


def merge_between(stage, grid):
    """(coarse, fine): a quarter from each merged patch to each patch that it is made of."""
    width = next(p for p in stage.downsample.parameters() if p.ndim == 2).shape[1] // 4
    fine = torch.randn(1, *grid, width, dtype=torch.float64, requires_grad=True)
    coarse = stage.downsample(fine).square().sum(-1).flatten()
    rows = [torch.autograd.grad(value, fine, retain_graph=True)[0] for value in coarse]
    return np.stack([row.abs().sum(-1).flatten().numpy() > 0 for row in rows]) / 4


def swin_steps(model, images):
    """Each block's weights and its pairs, and the merge in front of each stage but the first."""
    found, steps, grid = iter(attention_maps(model, images)[1]), [], None
    for stage in model.layers:
        if grid:
            steps.append((merge_between(stage, grid), None))
        for block in stage.blocks:
            weights = next(found)
            grid, counts = (
                weights.grid,
                [
                    sum(patch is not None for patch, _ in window)
                    for window in windows_of(block, weights.grid)
                ],
            )
            steps.append((weights.dense()[0].numpy(), sum(count**2 for count in counts)))
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
    for fusion, discard, residual in SETTINGS:
        steps = swin_steps(model, images)
        assert len(steps) == (2, 4, 7)[stages - 1]
        row = row_of(steps[-1][0].shape[-1], 0, "mean")
        expected = numpy_rollout(steps, row, fusion, discard, residual)
        found = rollout(model, images, fusion, discard, residual)
        assert found.shape[1:] == (size[0] // 2, size[1] // 2)
        np.testing.assert_allclose(found[0].flatten(), expected, atol=1e-12, rtol=1e-9)


# Gradients.


class Nudge(nn.Module):
    """In the place of a dropout on attention weights: adds to them."""

    def __init__(self):
        super().__init__()
        self.by = 0

    def forward(self, weights):
        return weights + self.by


def as_timms(model):
    """The same weights in timm's ViT, whose attention can be nudged."""
    if not isinstance(model, VisionTransformer):
        return model
    names = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth")
    names += ("num_heads", "init_values", "global_pool", "class_token", "no_embed_class")
    options = {name: getattr(model.config, name) for name in names}
    reference = timm.models.VisionTransformer(**options).eval().to(model.patch_embed.proj.weight)
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference


def finite_gradients(model, number, image, target, windows, step=1e-4):
    """d logit / d weight (h, N, N) of one block's attention, each weight nudged up and down."""
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
    """For each block its windows, each with its slots' patches; of a ViT one, of all tokens."""
    if not hasattr(model, "layers"):
        tokens = prefix_of(model) + np.prod(grid_of(model, images))
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
    "class token": (lambda: ours(**TINY), "class"),
    "mean": (lambda: ours(**TINY, **MEAN, init_values=0.5), "mean"),
    "mean beside a class token": (lambda: ours(**TINY, global_pool="avg"), "mean"),
    "distilled": (lambda: timms("deit_tiny_distilled_patch16_224", **{**SIZE, **TINY}), "class"),
    "registers, mean": (lambda: timms(REG4, **{**SIZE, **TINY, "global_pool": "avg"}), "mean"),
    "swin": (lambda: timms(SWIN, **TINY_SWIN), "mean"),
    "swin v2": (lambda: timms(SWIN_V2, **{**TINY_SWIN, "window_size": (3, 2)}), "mean"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_gradient_rollout_equals_finite_differences_in_chefers_formula(name):
    model, which = EXPLAINED[name][0]().double(), EXPLAINED[name][1]
    image = images_for(model, 1)
    reference, target = as_timms(model), 2
    swin = hasattr(model, "layers")
    steps = swin_steps(model, image) if swin else [(w, 0) for w in dense(model, image)]
    seen = []
    with watching(model, image, lambda weights, arrange: seen.append((weights, arrange))):
        logit = model(image.requires_grad_())[0, target]
    watched = torch.autograd.grad(logit, [weights for weights, _ in seen])
    image = image.detach()

    relevance = identity = np.eye(steps[0][0].shape[-1])  # R of the paper, and what stays of I
    number = 0
    for weights, _ in steps:
        if weights.ndim == 2:
            relevance, identity = weights @ relevance, weights @ identity
            continue
        windows = windows_for(model, image)[number]
        slopes = finite_gradients(reference, number, image, target, windows)
        found = seen[number][1](watched[number]).dense()[0]
        np.testing.assert_allclose(found, slopes, atol=1e-8, rtol=1e-5)
        relevance = relevance + np.maximum(weights * slopes, 0).mean(0) @ relevance
        number += 1
    prefix = prefix_of(model)
    row = row_of(len(relevance), prefix, which)
    expected = (row @ (relevance - identity))[prefix:]
    assert expected.max() > 1e-4
    found = gradient_rollout(model, image, torch.tensor([target]))[0].flatten()
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("name", ["class token", "registers, mean", "swin"])
def test_images_of_a_batch_do_not_touch_each_other(name):
    model = EXPLAINED[name][0]().double()
    images, targets = images_for(model, 3), torch.tensor([2, 0, 1])
    methods = [lambda x, _: rollout(model, x, discard=0.5), partial(gradient_rollout, model)]
    methods.append(lambda x, _: raw(model, x)[1])
    if EXPLAINED[name][1] == "mean":
        methods.append(partial(grad_cam, model))
    for method in methods:
        together = method(images, targets)
        for number in range(3):
            one = slice(number, number + 1)
            alone = method(images[one], targets[one])
            torch.testing.assert_close(together[one], alone, atol=1e-12, rtol=1e-9)
        assert (together.flatten(1).amax(1) > 0).any()
        assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["mean", "swin"])
@pytest.mark.parametrize("method", [gradient_rollout, grad_cam])
def test_the_class_matters_and_is_the_predicted_one_unless_given(name, method):
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
    """The same model, its last features once as (B, D, rows, columns), for captum."""

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
    ("name", "layer"),
    [("resnet10t", "layer4"), ("test_efficientnet", "bn2"), ("vgg11", "features")],
)
def test_grad_cam_equals_captum_on_the_last_convolution(name, layer):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():  # a head whose weights have both signs, whatever the initialisation
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


def test_grad_cam_of_mean_pooled_features_is_the_class_activation_map():
    """Zhou et al. 2016: the classifier's weights on each place; Grad-CAM has 1 / places of it."""
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


# Distances and pictures.


def mean_distance(weights, grid, prefix, pixels):
    """By two loops, over the patches: (N, N) weights, what goes to other tokens left out."""
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
def test_distance_equals_two_loops(kind, name):
    model, images = built(kind, name)
    for block in attention_maps(model, images[:1])[1]:
        found = block.distance(7.0)
        for head, weights in enumerate(block.dense()[0].double().numpy()):
            expected = mean_distance(weights, block.grid, block.prefix, 7.0)
            assert found[0, head].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_attention_has_the_mean_distance_of_all_pairs(prefix):
    grid = (5, 8)
    tokens = prefix + 40
    block = from_tokens(grid, prefix, torch.full((2, 3, tokens, tokens), 1 / tokens))
    places = np.stack(np.divmod(np.arange(40), 8), 1)
    expected = 2 * pdist(places).sum() / 40**2 * 16  # a patch is at distance 0 of itself
    close(block.distance(16), torch.full((2, 3), expected, dtype=torch.float32), rtol=1e-5)


def test_attention_to_itself_has_no_distance_and_to_the_neighbour_one_patch():
    itself, neighbour = torch.eye(12)[None, None], torch.eye(12)[[1, 0, 3, 2, *range(4, 12)]]
    assert from_tokens((3, 4), 0, itself).distance(16).item() == 0
    assert from_tokens((3, 4), 0, neighbour[None, None]).distance(12).item() == pytest.approx(4)


def test_maps_are_enlarged_as_pillow_enlarges_them():
    maps = torch.rand(3, 7, 5)
    for picture, small in zip(upsample(maps, 56), maps, strict=True):
        expected = Image.fromarray(small.numpy()).resize((56, 56), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(picture, np.asarray(expected), atol=1e-6)


def test_a_block_and_a_head_are_counted_from_one():
    maps = [torch.rand(2, heads, 3, 3) for heads in (2, 2, 4)]
    assert torch.equal(pick(maps, 1, 2), maps[0][:, 1])
    assert torch.equal(pick(maps, 3, 4), maps[2][:, 3])
    assert torch.equal(pick(maps, -1, 1), maps[2][:, 0])
    assert torch.equal(pick(maps, -3, None), maps[0].mean(1))


# What cannot be.


def test_each_method_is_offered_or_its_refusal_explained():
    def refused(model, images):
        return {name: words for name, words in methods_of(model, images).items() if words}

    assert set(methods_of(*built("swin", "v1"))) == {
        "raw", "rollout", "gradient-rollout", "grad-cam"
    }  # fmt: skip
    assert (
        refused(*built("swin", "v1")) == refused(*built("ours", "mean beside a class token")) == {}
    )
    assert "class token" in refused(*built("ours", "class token")).pop("grad-cam")
    cnn = refused(timm.create_model("test_resnet"), torch.randn(2, 3, 64, 64))
    assert set(cnn) == {"raw", "rollout", "gradient-rollout"}
    headless = timms(SWIN, **{**EVEN, "num_classes": 0})
    assert set(refused(headless, images_for(headless))) == {"gradient-rollout", "grad-cam"}


@pytest.mark.parametrize(
    ("block", "head", "words"),
    [
        (0, None, "LAYER=0: .*blocks 1 to 3"),
        (4, None, "LAYER=4: .*blocks 1 to 3"),
        (-4, None, "LAYER=-4: .*-1: the last"),
        (1, 0, "HEAD=0: block 1 has heads 1 to 2"),
        (1, 3, "HEAD=3: block 1 has heads 1 to 2"),
        (-1, 5, "HEAD=5: block 3 has heads 1 to 4"),
    ],
)
def test_a_missing_block_or_head_is_named_with_those_there_are(block, head, words):
    maps = [torch.rand(2, heads, 3, 3) for heads in (2, 2, 4)]
    with pytest.raises(UserError, match=words):
        pick(maps, block, head)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_cnn_is_sent_to_grad_cam(method):
    model = mixed(timm.create_model("test_resnet"))
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(UserError, match=r"ResNet has no attention.*METHOD=grad-cam"):
        method(model, images)
    assert_untouched(model, partial(method, model, images), UserError)
    assert_untouched(model, partial(grad_cam, model, images))


class Hidden(nn.Module):
    """Attention with a dropout that its weights never pass."""

    def __init__(self, attention):
        super().__init__()
        self.inner, self.attn_drop = attention, nn.Dropout()

    def forward(self, *args, **words):
        return self.inner(*args, **words)


def test_attention_that_stays_hidden_is_said_to():
    model = timms("vit_tiny_patch16_224", **WIDE)
    model.blocks[1].attn = Hidden(model.blocks[1].attn)
    for method in (attention_maps, rollout, gradient_rollout):
        action = partial(method, model, images_for(model))
        with pytest.raises(UserError, match="VisionTransformer cannot be watched: 2 of 3 blocks"):
            action()
        assert_untouched(model, action, UserError)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("samvit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
        ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    ],
)
def test_attention_of_another_kind_is_refused(name, options):
    model = timm.create_model(name, num_classes=5, **options).eval()
    for method in (attention_maps, rollout, gradient_rollout):
        with pytest.raises(UserError):
            method(model, torch.randn(1, 3, 224, 224))


def test_tokens_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(UserError, match="16 tokens, but 1 and a grid of 4 x 4 patches make 17"):
        from_tokens((4, 4), 1, torch.rand(1, 2, 16, 16))


@pytest.mark.parametrize(("kind", "name"), [("ours", "class token"), ("timm", "distilled")])
def test_grad_cam_of_a_class_token_is_refused_with_what_to_take(kind, name):
    model, images = built(kind, name)
    words = "reads the class token, not the patches. Take METHOD=gradient-rollout"
    with pytest.raises(UserError, match=words):
        grad_cam(model, images)


def test_grad_cam_refuses_features_that_have_no_place():
    hybrid = timm.create_model("vit_small_resnet26d_224", embed_dim=32, depth=1, num_heads=4)
    with pytest.raises(UserError, match="50 tokens of VisionTransformer on a grid"):
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
def test_without_a_head_there_is_no_class_to_explain(model):
    model = model()
    images = images_for(model)
    for method in (gradient_rollout, grad_cam):
        with pytest.raises(
            UserError, match=r"no classes to explain.*METHOD=raw and METHOD=rollout"
        ):
            method(model, images)
        assert_untouched(model, partial(method, model, images), UserError)
    assert raw(model, images)[0].ndim == 4
    assert rollout(model, images).ndim == 3


@pytest.mark.parametrize("kind", ["mean, no class token, gray", "v1"])
def test_without_a_class_token_nothing_can_be_asked_of_it(kind):
    model, images = built("swin" if kind == "v1" else "ours", kind)
    with pytest.raises(UserError, match="has no class token: ask for the mean"):
        raw(model, images, "class")


@pytest.mark.parametrize(
    "wrong", [{"fusion": "sum"}, {"discard": 1.0}, {"discard": -0.1}, {"residual": 1.1}]
)
def test_a_rollout_that_cannot_be_names_what_can(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value!r}.*mean, max, min"):
        rollout(*built("ours", "class token"), **wrong)
