"""Weights of timm's models give timm's logits, in model.py if it computes the same."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_pretrained
from lab.models.conversion import config_of, unsupported_features
from lab.models.registry import pooled_features
from model import VisionTransformer
from tests.models.reference import (
    DIGITS,
    ROOT,
    SMALL_SWIN,
    TINY,
    assert_preprocess_of,
    assert_same_logits,
    exported,
    loaded_by_timm,
    save_run,
    saved,
    timms,
)

REAL = ROOT.parent / "shared" / "weights" / "vit_small_patch14_dinov2_saliency.safetensors"


# --- timm's names ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224.augreg_in21k", {"depth": 2}),
        ("vit_small_patch32_224", {"depth": 2, "num_classes": 5}),
        ("deit_tiny_patch16_224", {"depth": 2, "num_classes": 0}),
        ("deit3_small_patch16_224", {"depth": 3}),
        ("vit_small_patch14_dinov2", {"depth": 2, "num_classes": 7}),
        ("test_vit", {}),
    ],
)
def test_plain_timm_vits_run_in_model_py(name, options, tmp_path):
    reference = timms(name, **options)
    pretrained = load_pretrained(saved(reference, tmp_path / f"{name}.safetensors"))
    assert type(pretrained.model) is VisionTransformer
    assert_same_logits(pretrained, reference, reference.pretrained_cfg["input_size"][-1])
    assert_preprocess_of(pretrained, reference)


def random_vit(seed):
    """Arguments of a plain timm ViT."""
    rng = random.Random(seed)
    heads, token = rng.choice([1, 2, 4, 7]), rng.random() < 0.5
    patch, grid = rng.choice([4, 5, 8]), rng.choice([1, 2, 4])
    return {
        "img_size": patch * grid, "patch_size": patch, "num_classes": rng.choice([0, 1, 5]),
        "embed_dim": heads * rng.choice([7, 8, 16]), "depth": rng.choice([1, 3]),
        "num_heads": heads, "mlp_ratio": rng.choice([0.5, 2.7, 3, 4]),
        "qkv_bias": rng.random() < 0.5, "init_values": rng.choice([None, 0.1]),
        "global_pool": "token" if token else "avg", "class_token": token or rng.random() < 0.5,
        "no_embed_class": rng.random() < 0.5, "in_chans": rng.choice([1, 3, 4]),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_random_timm_vits_give_timms_logits(seed, tmp_path):
    options = random_vit(seed)
    reference = timms("vit_tiny_patch16_224", seed, **options)
    folder = exported(reference, tmp_path / "vit", **options)
    size, channels = options["img_size"], options["in_chans"]
    pretrained = load_pretrained(folder)
    assert type(pretrained.model) is VisionTransformer
    assert_same_logits(pretrained, reference, size, channels)
    assert len(pretrained.preprocess.mean) == channels

    larger = size + 2 * options["patch_size"]
    same = {**options, "img_size": larger}
    del same["num_classes"]
    reference = loaded_by_timm(
        "vit_tiny_patch16_224", folder, larger, channels, **{**same, "in_chans": channels}
    )
    pretrained = load_pretrained(folder, img_size=larger)
    assert pretrained.preprocess.img_size == larger
    assert_same_logits(pretrained, reference, larger, channels)


def test_mlp_width_survives_rounding():
    rounded_down = 0
    for dim in range(1, 200):
        for hidden in random.Random(dim).sample(range(1, 5 * dim + 1), min(20, 5 * dim)):
            rounded_down += int(dim * (hidden / dim)) < hidden
            state = {
                "patch_embed.proj.weight": torch.empty(dim, 3, 4, 4, device="meta"),
                "cls_token": torch.empty(1, 1, dim, device="meta"),
                "pos_embed": torch.empty(1, 5, dim, device="meta"),
                "blocks.0.mlp.fc1.weight": torch.empty(hidden, dim, device="meta"),
            }
            config = config_of(state, num_heads=1)
            assert int(config.embed_dim * config.mlp_ratio) == hidden
    assert rounded_down


@pytest.mark.skipif(not REAL.exists(), reason="no real weights beside this checkout")
def test_real_weights_give_timms_features(tmp_path):
    file = tmp_path / "fp32.safetensors"  # timm rounds the positions of a half-precision file twice
    save_file({name: value.float() for name, value in load_file(REAL).items()}, file)
    reference = loaded_by_timm("vit_small_patch14_dinov2", file, 224, img_size=224)
    pretrained = load_pretrained(str(REAL), img_size=224)
    assert type(pretrained.model) is VisionTransformer
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = reference.forward_features(images), reference(images)
        assert expected.std() > 0.1
        found = pretrained.model.forward_features(images)
        torch.testing.assert_close(found, tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        pooled_features(pretrained.model, images), expected, atol=1e-4, rtol=1e-4
    )
    assert_preprocess_of(load_pretrained(str(REAL)), timm.create_model("vit_small_patch14_dinov2"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_in_fp32(dtype, tmp_path):
    reference = timms("test_vit").to(dtype)
    pretrained = load_pretrained(saved(reference, tmp_path / "test_vit.safetensors"))
    assert {p.dtype for p in pretrained.model.parameters()} == {torch.float32}
    assert_same_logits(pretrained, reference.float(), 160)


def test_dinov2_files_load_at_their_own_size(tmp_path):
    """DINOv2's files have a mask token besides timm's names; timm resamples to 518 if need be."""
    options = {"embed_dim": 64, "depth": 1, "num_heads": 4}
    reference = timms("vit_small_patch14_dinov2", **options)
    folder = exported(reference, tmp_path / "dino", **options)
    state = {**reference.state_dict(), "mask_token": torch.ones(1, 64)}
    save_file(state, tmp_path / "dino" / "model.safetensors")
    config = json.loads((tmp_path / "dino" / "config.json").read_text())
    config["model_args"].pop("img_size", None)  # only some versions of timm write it
    (tmp_path / "dino" / "config.json").write_text(json.dumps(config))
    pretrained = load_pretrained(folder)
    assert type(pretrained.model) is VisionTransformer
    assert pretrained.preprocess.img_size == 518
    assert_same_logits(pretrained, reference, 518)


def test_label_names_keep_the_head(tmp_path):
    reference = timms("test_vit", num_classes=10)
    folder = Path(exported(reference, tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": DIGITS}))
    pretrained = load_pretrained(str(folder))
    assert "is kept" in pretrained.reset_classifier(DIGITS)
    assert_same_logits(pretrained, reference, 160)


# --- what model.py does not cover ---

UNCOVERED = [
    ("deit_tiny_distilled_patch16_224", {}, "a distillation token"),
    ("eva02_tiny_patch14_224", {}, "rotary position embeddings"),
    ("vit_xsmall_patch16_clip_224", {}, "pre-norm"),
    ("test_vit2", {}, "register tokens"),
    ("test_vit3", {}, "attention pooling"),
    ("vit_relpos_small_patch16_224", TINY, "relative position embeddings"),
    ("vit_base_patch32_clip_quickgelu_224", TINY, "QuickGELU"),
    ("vit_base_patch16_siglip_224", TINY, "attention pooling"),
    ("vit_so400m_patch16_siglip_gap_256", TINY, "GELUTanh"),
    ("vit_giant_patch14_dinov2", {**TINY, "img_size": 56}, "GluMlp"),
    ("aimv2_large_patch14_224", {"depth": 1}, "SwiGLU"),
    ("beit3_base_patch16_224", TINY, "norms inside attention and MLP"),
    ("vit_base_patch16_gap_224", TINY, "pooling after the final norm"),
    ("vit_small_patch16_18x2_224", TINY, "ParallelThingsBlock"),
    ("vit_base_patch16_rpn_224", TINY, "ResPostBlock"),
    ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}, "norms of queries and keys"),
    ("vit_tiny_patch16_224", {**TINY, "global_pool": "max"}, "'max'"),
    ("vit_tiny_patch16_224", {**TINY, "pool_include_prefix": True, "global_pool": "avg"},
     "a mean that includes the class token"),
    ("vit_tiny_patch16_224", {**TINY, "fc_norm": True}, "no LayerNorm"),
    ("vit_tiny_r_s16_p8_224", {**TINY}, "a different patch embedding"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "difference"), UNCOVERED)
def test_other_vits_load_in_timm_and_model_py_refuses_them(name, options, difference, tmp_path):
    reference = timms(name, **options)
    if options:
        source = exported(reference, tmp_path / name, **options)
    else:
        source = saved(reference, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(source, plain_only=True)
    assert difference in str(caught.value)
    assert "finetune_swin.py" in str(caught.value)
    pretrained = load_pretrained(source)
    assert type(pretrained.model) is type(reference)
    assert_same_logits(pretrained, reference, pretrained.preprocess.img_size)
    assert_preprocess_of(pretrained, reference, options.get("img_size"))
    assert "state_dict" not in pretrained.model.pretrained_cfg  # no second copy in memory


def test_vits_without_differences_give_timms_logits():
    """Every architecture that calls itself a ViT: covered and equal, or refused."""
    covered = []
    names = timm.list_models(["vit_*", "deit*", "beit*", "eva*", "flexivit*"])
    rng = random.Random(0)
    for name in rng.sample(names, 30):
        options = {"embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}
        try:
            reference = timms(name, **options)
        except (TypeError, AssertionError, ValueError):  # knows other arguments
            continue
        if not unsupported_features(reference):
            covered.append(name)
            block = reference.blocks[0]
            config = config_of(reference.state_dict(), block.attn.num_heads, block.norm1.eps)
            ours = VisionTransformer(config).eval()
            ours.load_state_dict(reference.state_dict(), strict=True)
            images = torch.randn(1, 3, config.img_size, config.img_size)
            torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=1e-5)
    assert len(covered) >= 3


def test_clip_files_give_timms_logits(tmp_path):
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 6}
    reference = timms("vit_xsmall_patch16_clip_224", **options)
    with torch.no_grad():
        reference.head.bias.zero_()  # CLIP's projection has none
    folder = Path(exported(reference, tmp_path / "clip", **options))
    theirs = {}
    for name, value in reference.state_dict().items():
        for ours, clip in (
            ("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("norm1", "ln_1"),
            ("norm2", "ln_2"), ("blocks.", "transformer.resblocks."), ("qkv.", "in_proj_"),
            ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ("pos_embed", "positional_embedding"), ("cls_token", "class_embedding"),
        ):  # fmt: skip
            name = name.replace(ours, clip)
        name = f"ln_post.{name[5:]}" if name.startswith("norm.") else name
        theirs[f"visual.{name}"] = value.squeeze() if name.endswith("embedding") else value
    theirs["visual.proj"] = theirs.pop("visual.head.weight").T.contiguous()
    del theirs["visual.head.bias"]
    save_file(theirs, folder / "model.safetensors")
    assert_same_logits(load_pretrained(str(folder)), reference, 224)


# --- Swin and others ---


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("swin_tiny_patch4_window7_224", {}, []),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, [112, 200, 384]),
        ("swinv2_tiny_window8_256", SMALL_SWIN, [128, 512]),
        ("swinv2_cr_tiny_224", SMALL_SWIN, [192]),
    ],
)
def test_swin_loads_at_its_own_and_other_sizes(name, options, others, tmp_path):
    reference = timms(name, num_classes=5, **options)
    size = reference.pretrained_cfg["input_size"][-1]
    if options:
        path = exported(reference, tmp_path / name, num_classes=5, **options)
    else:
        path = saved(reference, tmp_path / f"{name}.safetensors")
    pretrained = load_pretrained(path, plain_only=True)  # no ViT, so none that is not plain
    assert_same_logits(pretrained, reference, size)
    assert_preprocess_of(pretrained, reference)
    for other in others:
        pretrained = load_pretrained(path, img_size=other)
        assert pretrained.preprocess.img_size == other
        expected = loaded_by_timm(name, path, size, **options, img_size=other)
        assert_same_logits(pretrained, expected, other)


def test_another_window_size_resamples_swins_tables(tmp_path):
    options = {**SMALL_SWIN, "img_size": 128, "window_size": 4, "num_classes": 5}
    reference = timms("swin_tiny_patch4_window7_224", **options)
    folder = Path(exported(reference, tmp_path / "swin", **options))
    assert_same_logits(load_pretrained(str(folder)), reference, 128)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["window_size"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    wider = {**SMALL_SWIN, "window_size": 8, "img_size": 256}
    expected = loaded_by_timm("swin_tiny_patch4_window7_224", folder, 224, **wider)
    assert_same_logits(load_pretrained(str(folder), img_size=256), expected, 256)


def test_microsofts_swin_files_load(tmp_path):
    """Their stages end with what timm's begin with, and their head is called `head`."""
    options = {**SMALL_SWIN, "num_classes": 21}
    reference = timms("swin_tiny_patch4_window7_224", **options)
    folder = Path(exported(reference, tmp_path / "swin", **options))
    theirs = {}
    for name, value in reference.state_dict().items():
        name = name.replace("head.fc.", "head.")
        for stage in (1, 2, 3):
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        theirs[name] = value
    (folder / "model.safetensors").unlink()
    torch.save({"model": theirs}, folder / "pytorch_model.bin")
    assert_same_logits(load_pretrained(str(folder)), reference, 224)


def drop_rates(model):
    return [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]


def test_drop_path_rate_is_the_requested_one(tmp_path):
    options = {**SMALL_SWIN, "num_classes": 5}
    reference = timms("swin_tiny_patch4_window7_224", **options)
    assert max(drop_rates(reference)) > 0  # timm's default
    swin = exported(reference, tmp_path / "swin", **options)
    assert not any(drop_rates(load_pretrained(swin).model))
    model = load_pretrained(swin, drop_path_rate=0.3).model
    assert max(drop_rates(model)) == pytest.approx(0.3)
    run = save_run(tmp_path / "run", model, DIGITS[:5], Preprocess(224, [0.5] * 3, [0.5] * 3))
    assert not any(drop_rates(load_pretrained(run).model))  # not that of the run before
    vit = saved(timms("test_vit"), tmp_path / "test_vit.safetensors")
    assert load_pretrained(vit, drop_path_rate=0.3).model.blocks[
        -1
    ].drop_path.rate == pytest.approx(0.3)


def test_resnet_loads_at_any_size(tmp_path):
    reference = timms("test_resnet", num_classes=5)
    path = saved(reference, tmp_path / "test_resnet.safetensors")
    assert_same_logits(load_pretrained(path), reference, 160)
    assert_same_logits(load_pretrained(path, img_size=96), reference, 96)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("test_vit", 1), ("test_vit", 4), ("test_vit3", 1), ("swin_tiny_patch4_window7_224", 1),
     ("test_convnext", 1), ("test_convnext", 4)],
)  # fmt: skip
def test_weights_for_other_channels_load_unchanged(name, channels, tmp_path):
    reference = timms(name, in_chans=channels, num_classes=5)
    pretrained = load_pretrained(saved(reference, tmp_path / f"{name}.safetensors"))
    size = pretrained.preprocess.img_size
    assert_same_logits(pretrained, reference, size, channels)
    cfg = timm.get_pretrained_cfg(name)
    assert pretrained.preprocess.mean == pytest.approx([np.mean(cfg.mean)] * channels)


def test_incomplete_weights_are_refused(tmp_path):
    """timm loads some architectures loosely: what is missing would stay random."""
    options = {**TINY, "num_classes": 5}
    for name in ("vit_base_patch16_siglip_gap_224", "vit_tiny_patch16_224", "test_convnext"):
        args = {} if name == "test_convnext" else options
        reference = timms(name, **args)
        folder = Path(exported(reference, tmp_path / name, **args))
        state = load_file(folder / "model.safetensors")
        lost = next(key for key in state if key.endswith(("attn.proj.bias", "conv_dw.bias")))
        del state[lost]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError, match=lost.replace(".", r"\.")):
            load_pretrained(str(folder))


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "swin_tiny_patch4_window7_224.safetensors"
    saved(timms("test_vit"), path)
    with pytest.raises(UserError, match="does not match swin_tiny"):
        load_pretrained(str(path))
    path = tmp_path / "vit_tiny_patch16_224.safetensors"
    state = timms("test_vit").state_dict()
    save_file({**state, "surplus": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="surplus"):
        load_pretrained(str(path))
