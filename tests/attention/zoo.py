"""Small models of every kind that the tests of attention share, and images for them."""

from functools import partial

import pytest
import timm
import torch
from timm.utils import AttentionExtract

from lab.attention.extraction import attention_maps
from lab.attention.saliency import grad_cam, gradient_rollout, raw_attention, rollout
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


close = partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)


def ours(**options):
    return shaken(VisionTransformer(ViTConfig(**{"img_size": 16, **SIZE, **options})))


def timms(name, **options):
    return shaken(timm.create_model(name, **options))


def built(kind, name):
    """A small model with all fused kernels on, and images for it."""
    if kind == "ours":
        model = ours(**OURS[name])
    else:
        architecture, options, _ = (VITS if kind == "timm" else SWINS)[name]
        model = timms(architecture, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # timm turns it off for Swin v1
    return model, images_for(model)


def images_for(model, count=2):
    """Random images of the size and channels that a model expects."""
    embed = model.patch_embed
    size = (embed.img_size,) * 2 if isinstance(embed.img_size, int) else embed.img_size
    generator = torch.Generator().manual_seed(1)
    dtype = embed.proj.weight.dtype
    images = torch.randn(count, embed.proj.in_channels, *size, generator=generator)
    return images.to(dtype)


def dense(model, images):
    """Attention (h, N, N) of each block, for a single image."""
    return [block.dense()[0].numpy() for block in attention_maps(model, images)[1]]


def windows_of(block, grid):
    """The slots of each window: (patch, or None for padding; side of each seam).

    As in Liu et al. 2021, fig. 4: the image is rolled up and left and then cut into windows. Seams
    separate the parts that were rolled over the edge from the parts that were not; patches on
    different sides of a seam do not attend to each other. timm pads after rolling and draws the
    seams in the padded image.
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


def extracted(monkeypatch, model, name, options, images):
    """Attention of each block by timm's AttentionExtract, from the same weights."""
    current = timm.layers.config._USE_FUSED_ATTN
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", current)  # restored at the end
    timm.layers.set_fused_attn(False)
    reference = timms(name, **options)
    reference.load_state_dict(model.state_dict(), strict=True)
    reference = AttentionExtract(reference, method="fx")
    with torch.no_grad():
        return list(reference(images).values())


def state_of(model):
    """Everything that an extraction could change and forget to restore."""
    return [
        (
            name, module.training, getattr(module, "fused_attn", None), sorted(vars(module)),
            {key: len(held) for key, held in vars(module).items() if key.endswith("_hooks")},
            [(key, p.requires_grad, p.grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


def mixed(model):
    """Puts some modules in training mode, freezes some parameters, turns some kernels off."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "fused_attn")):
        module.fused_attn = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 4 > 0)
    return model


METHODS = [attention_maps, raw_attention, rollout, gradient_rollout, grad_cam]
MODELS = {
    "ours": lambda: ours(global_pool="avg", drop_rate=0.5, attn_drop_rate=0.5),
    "timm": lambda: timms(REG4, **{**WIDE, "global_pool": "avg", "drop_path_rate": 0.5}),
    "swin": lambda: timms(SWIN, **ODD, attn_drop_rate=0.5),
}


def assert_unchanged(model, action, error=None):
    """`action` (which may raise) leaves no hook, mode, gradient or weight changed."""
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
