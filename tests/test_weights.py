"""lab/models/pretrained.py: released weights give the logits of their own library."""

import argparse
import http.server
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import _load_weights
from torch import nn
from transformers import (
    CLIPImageProcessor,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTModel,
)

import lab.models.pretrained
from lab.core.checkpoints import save_weights
from lab.core.errors import UserError
from lab.data.preprocess import Preprocess
from lab.models.conversion import config_of, differences
from lab.models.pretrained import (
    architecture_in,
    classifier,
    load_pretrained,
    pooled_features,
    reinitialized,
    reset_classifier,
)
from lab.models.registry import TimmConfig, build_timm_model, load_model, model_header
from model import VisionTransformer, ViTConfig
from tests.shaken import shaken

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "weights" / "vit_small_patch14_dinov2_saliency.safetensors"
DIGITS = [str(digit) for digit in range(10)]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
COMMIT = "c0ffee" + "0" * 34  # of every repository that the tests serve
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def timms(name, seed=0, **options):
    return shaken(timm.create_model(name, **options), seed)


def saved(model, path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


def exported(model, folder, **options):
    """A folder as timm publishes it."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    timm.models.save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    return str(folder)


def loaded_by_timm(name, path, size, channels=3, **options):
    """timm's own way to load a file."""
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    state = load_file(path)
    head = next((len(state[k]) for k in ("head.weight", "head.fc.weight") if k in state), 0)
    overlay = {"file": str(path), "num_classes": head, "input_size": (channels, size, size)}
    overlay |= {"custom_load": False, "first_conv": None}
    model = timm.create_model(
        name, pretrained=True, num_classes=head, pretrained_cfg_overlay=overlay, **options
    )
    return model.eval()


@torch.no_grad()
def assert_same_logits(pretrained, reference, size, channels=3, atol=1e-5):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(2 if size > 100 else 8, channels, size, size, generator=generator)
    expected = reference(images)
    assert expected.std() > 1e-3  # logits that say something
    assert not pretrained.model.training
    torch.testing.assert_close(pretrained.model(images), expected, atol=atol, rtol=1e-5)


def assert_preprocess_of(pretrained, reference, size=None):
    """What timm itself says about a model's images."""
    data = timm.data.resolve_data_config({}, model=reference)
    found = pretrained.preprocess
    assert found.mean == pytest.approx(data["mean"])
    assert found.std == pytest.approx(data["std"])
    assert found.img_size == (size or data["input_size"][-1])
    assert found.crop_pct == data["crop_pct"]
    assert found.interpolation == data["interpolation"]


# --- timm's names ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", {}),
        ("vit_tiny_patch16_224.augreg_in21k", {}),
        ("vit_small_patch32_224", {"num_classes": 5}),
        ("deit_tiny_patch16_224", {"num_classes": 0}),
        ("deit3_small_patch16_224", {"depth": 3}),
        ("vit_small_patch14_dinov2", {"depth": 2, "num_classes": 7}),
        ("test_vit", {}),
    ],
)
def test_a_vit_of_timm_runs_in_model_py(name, options, tmp_path):
    reference = timms(name, **options)
    pretrained = load_pretrained(saved(reference, tmp_path / f"{name}.safetensors"))
    assert type(pretrained.model) is VisionTransformer
    assert_same_logits(pretrained, reference, reference.pretrained_cfg["input_size"][-1])
    assert_preprocess_of(pretrained, reference)


def random_vit(seed):
    """Arguments of a plain ViT of timm's."""
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
def test_random_vits_as_timm_publishes_them(seed, tmp_path):
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


def test_the_width_of_the_mlp_survives_rounding():
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
def test_half_precision_files_are_trained_in_fp32(dtype, tmp_path):
    reference = timms("test_vit").to(dtype)
    pretrained = load_pretrained(saved(reference, tmp_path / "test_vit.safetensors"))
    assert {p.dtype for p in pretrained.model.parameters()} == {torch.float32}
    assert_same_logits(pretrained, reference.float(), 160)


def nested(state, how):
    prefixed = {f"module.{k}": v for k, v in state.items()}
    return {
        "plain": state,
        "ordered": OrderedDict(state),
        "model": {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "module": {"state_dict": prefixed, "optimizer": {"state": [1, 2]}},
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in prefixed.items()}},
    }[how]


@pytest.mark.parametrize("how", ["plain", "ordered", "model", "module", "compiled"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin"])
def test_pickles_of_training_scripts_load(how, suffix, tmp_path):
    reference = timms("test_vit", num_classes=7)
    path = tmp_path / f"test_vit{suffix}"
    torch.save(nested(reference.state_dict(), how), path)
    assert_same_logits(load_pretrained(str(path)), reference, 160)


def test_the_authors_names_load_at_the_size_of_their_positions(tmp_path):
    """DINOv2's files have a mask token besides timm's names; timm resamples to 518 if need be."""
    options = {"embed_dim": 64, "depth": 1, "num_heads": 4}
    reference = timms("vit_small_patch14_dinov2", **options)
    folder = exported(reference, tmp_path / "dino", **options)
    state = {**reference.state_dict(), "mask_token": torch.ones(1, 64)}
    save_file(state, tmp_path / "dino" / "model.safetensors")
    config = json.loads((tmp_path / "dino" / "config.json").read_text())
    config["model_args"].pop("img_size", None)  # which only some of timm's versions write
    (tmp_path / "dino" / "config.json").write_text(json.dumps(config))
    pretrained = load_pretrained(folder)
    assert type(pretrained.model) is VisionTransformer
    assert pretrained.preprocess.img_size == 518
    assert_same_logits(pretrained, reference, 518)


def test_classes_come_with_timms_labels(tmp_path):
    reference = timms("test_vit", num_classes=10)
    folder = Path(exported(reference, tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": DIGITS}))
    pretrained = load_pretrained(str(folder))
    assert "is kept" in reset_classifier(pretrained, DIGITS)
    assert_same_logits(pretrained, reference, 160)


# --- transformers' names ---


def random_transformers(seed):
    """A config of a plain ViT, and its image processor."""
    rng = random.Random(seed)
    heads, patch = rng.choice([1, 2, 4]), rng.choice([4, 8])
    labels = rng.choice([1, 2, 5])
    named = {str(i): f"class {i}" for i in range(labels)} if rng.random() < 0.5 else None
    channels = rng.choice([1, 3])
    config = transformers.ViTConfig(
        hidden_size=heads * 16, num_attention_heads=heads, num_hidden_layers=rng.choice([1, 12]),
        intermediate_size=rng.choice([8, 50, 64]), layer_norm_eps=rng.choice([1e-12, 1e-6, 0.1]),
        qkv_bias=rng.random() < 0.5, patch_size=patch, image_size=patch * rng.choice([2, 3, 5]),
        num_channels=channels, **({"id2label": named} if named else {"num_labels": labels}),
    )  # fmt: skip
    processor = ViTImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        resample=rng.choice([2, 3]), do_normalize=rng.random() < 0.8,
        image_mean=[rng.uniform(0.2, 0.7) for _ in range(channels)],
        image_std=[rng.uniform(0.2, 0.5) for _ in range(channels)],
        rescale_factor=rng.choice([1 / 255, 1 / 127.5]),
    )  # fmt: skip
    return config, processor


class Logits(nn.Module):
    """A model of transformers as a function of images alone."""

    def __init__(self, model, of=lambda output: output.logits):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, images):
        return self.of(self.model(images))


def normalized(images, preprocess):
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("seed", range(8))
def test_random_vits_of_transformers(seed, names, tmp_path):
    config, processor = random_transformers(seed)
    reference = shaken(ViTForImageClassification(config), seed)
    reference.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if names == "in memory":  # transformers 5 has other names there than in its files
        save_file(reference.state_dict(), tmp_path / "model.safetensors")
    pretrained = load_pretrained(str(tmp_path))
    size, channels = config.image_size, config.num_channels
    assert_same_logits(pretrained, Logits(reference), size, channels)

    pixels = torch.randint(0, 256, (channels, size, size), dtype=torch.uint8)
    found = pretrained.preprocess
    expected = processor(pixels, return_tensors="pt", input_data_format="channels_first")
    torch.testing.assert_close(
        normalized(pixels, found), expected["pixel_values"][0], atol=1e-4, rtol=1e-4
    )
    assert found.img_size == size
    assert found.interpolation == {2: "bilinear", 3: "bicubic"}[processor.resample]
    named = [config.id2label[i] for i in range(config.num_labels)]
    assert pretrained.classes == (None if named[0] == "LABEL_0" else named)


def test_a_centre_crop_is_cut_as_transformers_cuts_it(tmp_path):
    config, _ = random_transformers(0)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": config.image_size + 6}, crop_size=config.image_size, resample=3
    )
    processor.save_pretrained(tmp_path)
    size = config.image_size
    rng = np.random.default_rng(0)
    for file in ("preprocessor_config.json", "processor_config.json"):  # its name has changed
        if (tmp_path / file).exists():
            (tmp_path / file).rename(tmp_path / "preprocessor_config.json")
    found = load_pretrained(str(tmp_path)).preprocess
    assert found.resized == size + 6
    image = Image.fromarray(rng.integers(0, 256, (size + 6, size + 6, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    cut = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 3:-3, 3:-3]
    three = Preprocess(size, processor.image_mean, processor.image_std)
    torch.testing.assert_close(normalized(cut, three), expected, atol=1e-4, rtol=1e-4)
    if config.num_channels == 3:
        assert (found.mean, found.std) == (
            list(processor.image_mean),
            list(processor.image_std),
        )


@pytest.mark.parametrize("kind", [ViTModel, ViTForMaskedImageModeling])
def test_what_a_classifier_has_no_use_for_is_left_out_and_named(kind, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        image_size=16, patch_size=4, encoder_stride=4,
    )  # fmt: skip
    reference = shaken(kind(config))
    reference.save_pretrained(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    backbone = reference if kind is ViTModel else reference.vit
    tokens = Logits(backbone, lambda output: output.last_hidden_state[:, 0])
    assert pretrained.model.config.num_classes == 0
    assert_same_logits(pretrained, tokens, 16)
    dropped = ["pooler.dense.weight"] if kind is ViTModel else ["decoder.0.weight", "mask_token"]
    assert all(any(name in remark for remark in pretrained.remarks) for name in dropped)
    assert any("no mean and std" in remark for remark in pretrained.remarks)


def test_other_models_of_transformers_are_refused(tmp_path):
    config, _ = random_transformers(0)
    config.hidden_act = "quick_gelu"
    ViTForImageClassification(config).save_pretrained(tmp_path / "quick")
    with pytest.raises(UserError, match="quick_gelu"):
        load_pretrained(str(tmp_path / "quick"))
    transformers.DeiTModel(
        transformers.DeiTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="'deit'"):
        load_pretrained(str(tmp_path / "deit"))


# --- Google's names ---


def google(seed, head=7):
    """Random arrays in the layout of google-research/vision_transformer, and timm's arguments."""
    rng = np.random.default_rng(seed)
    heads, width, patch, grid = (int(rng.choice(c)) for c in ([1, 3], [4, 8], [4, 8], [1, 2, 4]))
    dim, hidden, depth = heads * width, int(rng.choice([24, 40])), int(rng.choice([1, 3, 11]))
    shapes = {
        "cls": (1, 1, dim), "embedding/kernel": (patch, patch, 3, dim), "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, grid**2 + 1, dim),
        "Transformer/encoder_norm/scale": (dim,), "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, head), "head/bias": (head,),
    }  # fmt: skip
    for layer in range(depth):
        block = f"Transformer/encoderblock_{layer}/"
        for part in ("query", "key", "value"):
            shapes[f"{block}MultiHeadDotProductAttention_1/{part}/kernel"] = (dim, heads, width)
            shapes[f"{block}MultiHeadDotProductAttention_1/{part}/bias"] = (heads, width)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/kernel"] = (heads, width, dim)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/bias"] = (dim,)
        for number in (0, 2):
            shapes[f"{block}LayerNorm_{number}/scale"] = (dim,)
            shapes[f"{block}LayerNorm_{number}/bias"] = (dim,)
        for number, (i, o) in enumerate(((dim, hidden), (hidden, dim))):
            shapes[f"{block}MlpBlock_3/Dense_{number}/kernel"] = (i, o)
            shapes[f"{block}MlpBlock_3/Dense_{number}/bias"] = (o,)
    arrays = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}
    options = {"img_size": patch * grid, "patch_size": patch, "embed_dim": dim, "depth": depth,
               "num_heads": heads, "mlp_ratio": hidden / dim, "num_classes": head}  # fmt: skip
    return arrays, options


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("seed", range(6))
def test_googles_arrays_give_the_logits_of_timms_own_loader(seed, prefix, tmp_path):
    arrays, options = google(seed)
    optimizer = {"opt/state/step": np.zeros(()), "accum_train_time": np.ones(())} if prefix else {}
    path = tmp_path / "vit.npz"
    np.savez(path, **{f"{prefix}{name}": array for name, array in arrays.items()}, **optimizer)
    reference = timm.models.VisionTransformer(**options).eval()
    _load_weights(reference, str(path))
    pretrained = load_pretrained(str(path))
    assert type(pretrained.model) is VisionTransformer
    assert_same_logits(pretrained, reference, options["img_size"])
    assert pretrained.preprocess.mean == pretrained.preprocess.std == [0.5] * 3


def test_an_array_of_google_without_a_place_is_named_or_refused(tmp_path):
    arrays, _ = google(0)
    path = tmp_path / "vit.npz"
    dim = len(arrays["embedding/bias"])
    layer = {"pre_logits/kernel": np.ones((dim, dim)), "pre_logits/bias": np.ones(dim)}
    np.savez(path, **arrays, **layer)
    pretrained = load_pretrained(str(path))
    assert pretrained.model.config.num_classes == 0
    for name in ("head/kernel", "head/bias", *layer):
        assert name in " ".join(pretrained.remarks)

    np.savez(path, **arrays, **{"conv_root/kernel": np.ones((7, 7, 3, 64))})  # R50 + ViT
    with pytest.raises(UserError, match="conv_root/kernel"):
        load_pretrained(str(path))
    for name in list(arrays):
        if name.startswith("head/"):
            continue
        np.savez(path, **{n: array for n, array in arrays.items() if n != name})
        with pytest.raises(UserError, match=r"layout|plain ViT"):
            load_pretrained(str(path))


# --- what model.py does not cover ---

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}
UNCOVERED = [
    ("deit_tiny_distilled_patch16_224", {}, "a distillation token"),
    ("eva02_tiny_patch14_224", {}, "rotary positions"),
    ("vit_xsmall_patch16_clip_224", {}, "pre-norm"),
    ("test_vit2", {}, "register tokens"),
    ("test_vit3", {}, "attention pooling"),
    ("vit_relpos_small_patch16_224", TINY, "relative positions"),
    ("vit_base_patch32_clip_quickgelu_224", TINY, "QuickGELU"),
    ("vit_base_patch16_siglip_224", TINY, "attention pooling"),
    ("vit_so400m_patch16_siglip_gap_256", TINY, "GELUTanh"),
    ("vit_giant_patch14_dinov2", {**TINY, "img_size": 56}, "GluMlp"),
    ("aimv2_large_patch14_224", {"depth": 1}, "SwiGLU"),
    ("beit3_base_patch16_224", TINY, "norms inside attention and MLP"),
    ("vit_base_patch16_gap_224", TINY, "the mean taken after the norm"),
    ("vit_small_patch16_18x2_224", TINY, "ParallelThingsBlock"),
    ("vit_base_patch16_rpn_224", TINY, "ResPostBlock"),
    ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}, "norms of queries and keys"),
    ("vit_tiny_patch16_224", {**TINY, "global_pool": "max"}, "'max'"),
    ("vit_tiny_patch16_224", {**TINY, "pool_include_prefix": True, "global_pool": "avg"},
     "a mean over the class token"),
    ("vit_tiny_patch16_224", {**TINY, "fc_norm": True}, "no LayerNorm"),
    ("vit_tiny_r_s16_p8_224", {**TINY}, "patches cut in another way"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "difference"), UNCOVERED)
def test_an_uncovered_vit_is_refused_by_what_differs_and_goes_to_timm(
    name, options, difference, tmp_path
):
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


def test_whatever_is_called_plain_gives_the_same_logits():
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
        if not differences(reference):
            covered.append(name)
            block = reference.blocks[0]
            config = config_of(reference.state_dict(), block.attn.num_heads, block.norm1.eps)
            ours = VisionTransformer(config).eval()
            ours.load_state_dict(reference.state_dict(), strict=True)
            images = torch.randn(1, 3, config.img_size, config.img_size)
            torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=1e-5)
    assert len(covered) >= 3


def test_clips_own_names_load_as_timms(tmp_path):
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
        ("swin_tiny_patch4_window7_224", {}, [256]),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, [112, 200, 384]),
        ("swinv2_tiny_window8_256", SMALL_SWIN, [128, 512]),
        ("swinv2_cr_tiny_224", SMALL_SWIN, [192]),
    ],
)
def test_swin_loads_at_its_size_and_at_another(name, options, others, tmp_path):
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


def test_another_window_resamples_swins_tables(tmp_path):
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


def test_microsofts_names_of_swin_load(tmp_path):
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


def test_the_drop_path_is_the_one_asked_for(tmp_path):
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


def test_a_network_without_drop_path_or_fixed_size_loads(tmp_path):
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


def test_weights_that_lack_a_part_are_never_filled_up(tmp_path):
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
    with pytest.raises(UserError, match="does not fit swin_tiny"):
        load_pretrained(str(path))
    path = tmp_path / "vit_tiny_patch16_224.safetensors"
    state = timms("test_vit").state_dict()
    save_file({**state, "surplus": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="surplus"):
        load_pretrained(str(path))


# --- names and files that cannot be had ---


@pytest.mark.parametrize(
    ("stem", "architecture"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch16_224-b5f2ef4d", "vit_base_patch16_224"),
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224.augreg_in21k_mine", "vit_base_patch16_224.augreg_in21k"),
        (
            "vit_base_patch16_224.augreg2_in21k_ft_in1k",
            "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        ),
        ("swin_base_patch4_window12_384_22kto1k", "swin_base_patch4_window12_384"),
        ("resnet500", None),
        ("test_vit9", None),
        ("model", None),
    ],
)
def test_the_architecture_is_read_from_a_files_name(stem, architecture):
    assert architecture_in(stem) == architecture


def test_the_architecture_is_read_from_the_files_header(tmp_path):
    reference = timms("test_vit")
    path = tmp_path / "mine.safetensors"
    save_file(reference.state_dict(), path, metadata={"architecture": "test_vit"})
    assert_same_logits(load_pretrained(str(path)), reference, 160)
    save_file(reference.state_dict(), path, metadata={"architecture": "nobody_knows"})
    with pytest.raises(UserError, match="number of heads cannot be told from 64 channels"):
        load_pretrained(str(path))


def test_a_file_of_unknown_architecture_is_refused_with_advice(tmp_path):
    swin = timms("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    with pytest.raises(UserError, match=r"cannot be told: name the file after it.*config\.json"):
        load_pretrained(saved(swin, tmp_path / "mine.safetensors"))
    wide = timms("vit_tiny_patch16_224", embed_dim=1280, num_heads=16, depth=1)
    with pytest.raises(UserError, match="number of heads cannot be told from 1280"):
        load_pretrained(saved(wide, tmp_path / "wide.safetensors"))


def test_heads_are_assumed_for_the_usual_widths_and_said(tmp_path):
    for name in ("vit_tiny_patch16_224", "vit_small_patch32_224"):
        reference = timms(name, depth=2)
        pretrained = load_pretrained(saved(reference, tmp_path / "mine.safetensors"))
        assert_same_logits(pretrained, reference, 224)
        heads = reference.blocks[0].attn.num_heads
        assert any(f"{heads} heads are assumed" in remark for remark in pretrained.remarks)
        assert any("no mean and std" in remark for remark in pretrained.remarks)


def test_a_file_beside_its_config_is_read_with_it(tmp_path):
    options = {**SMALL, "num_classes": 5}
    reference = timms("vit_tiny_patch16_224", **options)
    folder = Path(exported(reference, tmp_path / "vit", **options))
    pretrained = load_pretrained(str(folder / "model.safetensors"))
    assert_same_logits(pretrained, reference, 32)
    assert_preprocess_of(pretrained, reference, 32)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("swin_tiny_patch4_window7", "swin_tiny_patch4_window7_224"),
        ("vit_base_patch16_224.augreg_in22k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224_in21k", "vit_base_patch16_224.augreg_in21k is its name now"),
        ("no/such/folder", "no file, no folder and no repository"),
        ("weights/none.safetensors", "no such file"),
        ("./none", "no such file or folder"),
    ],
)
def test_a_wrong_name_is_answered_with_right_ones(source, said):
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    assert said in str(caught.value)
    assert source in str(caught.value)


def test_all_tags_are_listed_for_one_that_does_not_exist():
    tags = timm.list_pretrained("vit_base_patch16_224.*")
    assert len(tags) > 5
    with pytest.raises(UserError) as caught:
        load_pretrained("vit_base_patch16_224.mine")
    assert str(caught.value).endswith(", ".join(tags))


def test_weights_that_are_not_on_the_hub_are_named_with_their_address():
    cfg = timm.get_pretrained_cfg("gcvit_xxtiny.in1k")
    assert cfg.url
    assert not cfg.hf_hub_id
    with pytest.raises(UserError) as caught:
        load_pretrained("gcvit_xxtiny")
    assert f"fetch {cfg.url}" in str(caught.value)
    assert "weights/gcvit_xxtiny.in1k.pth" in str(caught.value)
    assert architecture_in("gcvit_xxtiny.in1k") == "gcvit_xxtiny.in1k"  # so that advice is true


class Code:
    """A pickle that makes a folder when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(how, tmp_path):
    path, made = tmp_path / "test_vit.pth", tmp_path / "made"
    content = {**timms("test_vit").state_dict(), "code": Code(made)}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"code": Code(made)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UserError, match=r"is refused.*as \.safetensors") as caught:
        load_pretrained(str(path))
    assert not made.exists()
    assert "mkdir" in str(caught.value) or how == "pickle"
    if how != "pickle":
        torch.load(path, weights_only=False)
        assert made.exists()  # it would have run


def test_files_that_are_cut_are_named(tmp_path):
    vit, folder = timms("test_vit", depth=1), tmp_path / "whole"
    folder.mkdir()
    saved(vit, folder / "test_vit.safetensors")
    torch.save(vit.state_dict(), folder / "test_vit.pth")
    torch.save(vit.state_dict(), folder / "test_vit.pt", _use_new_zipfile_serialization=False)
    np.savez(folder / "vit.npz", **google(0)[0])
    np.savez_compressed(folder / "small.npz", **google(0)[0])
    rng = random.Random(0)
    for whole in folder.iterdir():
        content, path = whole.read_bytes(), tmp_path / whole.name
        for length in [0, 1, 8, 100, len(content) - 1, *rng.choices(range(len(content)), k=8)]:
            path.write_bytes(content[:length])
            with pytest.raises(UserError) as caught:
                load_pretrained(str(path))
            assert str(path) in str(caught.value)
        path.write_bytes(rng.randbytes(1000))
        with pytest.raises(UserError, match=whole.stem):
            load_pretrained(str(path))


def test_files_that_hold_something_else_are_named(tmp_path):
    others = {"a list": [1, 2], "epoch": {"epoch": 3}, "nested": {"net": {"w": torch.zeros(1)}}}
    for content in (*others.values(), torch.zeros(3)):
        path = tmp_path / "test_vit.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no tensors by name"):
            load_pretrained(str(path))
    np.savez(tmp_path / "object.npz", a=np.array([Code(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match=r"object\.npz is not a whole \.npz of arrays"):
        load_pretrained(str(tmp_path / "object.npz"))
    assert not (tmp_path / "made").exists()
    np.savez(tmp_path / "text.npz", a=np.array(["no", "weights"]))
    with pytest.raises(UserError, match="layout of google-research"):
        load_pretrained(str(tmp_path / "text.npz"))


def test_folders_without_weights_are_named(tmp_path):
    (tmp_path / "history.csv").write_text("epoch\n")
    with pytest.raises(UserError, match=r"holds no weights \(it holds history.csv\)"):
        load_pretrained(str(tmp_path))
    config = tmp_path / "config.json"
    for text, said in (
        ('{"model_type": "vit"}', "neither of model.safetensors"),
        ('{"archit', "no whole JSON"),
        ("{}", "config.json"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=said):
            load_pretrained(str(tmp_path))
    saved(timms("test_vit"), tmp_path / "model.safetensors")
    config.write_text('{"architecture": "vit_nobody_knows"}')
    with pytest.raises(UserError, match="timm has no model 'vit_nobody_knows'"):
        load_pretrained(str(tmp_path))
    config.write_text('{"architecture": "test_vit", "model_args": {"windows": 3}}')
    with pytest.raises(UserError, match="cannot build test_vit"):
        load_pretrained(str(tmp_path))


def test_positions_that_form_no_square_are_refused(tmp_path):
    state = timms("vit_tiny_patch16_224", depth=1).state_dict()
    state["pos_embed"] = torch.zeros(1, 14 * 15 + 1, 192)
    for name in ("mine", "vit_tiny_patch16_224"):
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="211 positions"):
            load_pretrained(str(tmp_path / f"{name}.safetensors"))


# --- the hub ---


@pytest.fixture
def hub(tmp_path):
    """A server of repositories: the folder that holds them, its address, and what was asked."""
    folder = tmp_path / "hub"
    folder.mkdir()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            owner, name, *rest = self.path.strip("/").split("/")
            file = folder / owner / name / rest[-1]
            asked.append(f"{self.command} {owner}/{name}/{rest[-1]}")
            if file.is_file() and rest[:-1] in (["resolve", "main"], ["resolve", COMMIT]):
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{owner}-{name}-{rest[-1]}-{len(content)}"')
                self.send_header("Content-Length", str(len(content)))
            else:
                content = b""
                gated, there = name == "gated", file.parent.is_dir()
                code = "GatedRepo" if gated else "EntryNotFound" if there else "RepoNotFound"
                self.send_response(403 if gated else 404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def stop():
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()

    yield folder, f"http://127.0.0.1:{server.server_port}", asked, stop
    stop()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """This process asks that server, and caches in an empty folder; `offline()` ends that."""
    folder, address, asked, stop = hub
    where = {"cache_dir": str(tmp_path / "cache")}
    said = SimpleNamespace(ENDPOINT=address, HF_HUB_CACHE=where["cache_dir"])
    monkeypatch.setattr(lab.models.pretrained, "hub_constants", said)
    look = partial(huggingface_hub.try_to_load_from_cache, **where)
    monkeypatch.setattr(lab.models.pretrained, "try_to_load_from_cache", look)
    ask = partial(huggingface_hub.hf_hub_download, endpoint=address, **where)
    monkeypatch.setattr(lab.models.pretrained, "hf_hub_download", ask)

    def offline():
        stop()
        monkeypatch.setattr(
            lab.models.pretrained, "hf_hub_download", partial(ask, local_files_only=True)
        )

    return folder, asked, offline


SCRIPT = """
import sys, time, torch
from lab.core.errors import UserError
from lab.models.pretrained import load_pretrained
images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
for number, source in enumerate(sys.argv[2:]):
    started = time.perf_counter()
    try:
        found = load_pretrained(source, plain_only=True)
        with torch.no_grad():
            torch.save([found.model(images), found.preprocess.mean], f"{sys.argv[1]}{number}.pt")
    except UserError as error:
        print(f"{time.perf_counter() - started:.2f} s: {error}", end="")
"""


def in_another_process(environment, place, *sources):
    """Loads by huggingface_hub's environment variables, which it reads while it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place), *sources],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*", **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def publish_vit(folder, mean=0.25):
    """A ViT of transformers and what it gives for the images of SCRIPT."""
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    model = shaken(ViTForImageClassification(config))
    model.save_pretrained(folder)
    ViTImageProcessor(image_mean=[mean] * 3).save_pretrained(folder)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).logits


def test_a_repository_is_downloaded_once_then_found_without_a_network(hub, tmp_path):
    folder, address, asked, stop = hub
    expected = publish_vit(folder / "google" / "vit")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    repository = "google/vit"
    assert in_another_process(environment, tmp_path / "a", repository, f"hf-hub:{repository}") == ""
    fetched = [line.split("/")[-1] for line in asked if line.startswith("GET")]
    assert sorted(fetched) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert (tmp_path / "home" / "hub" / "models--google--vit").is_dir()
    stop()
    environment["HF_HUB_OFFLINE"] = "1"
    said = in_another_process(environment, tmp_path / "b", repository, "google/other")
    for number in ("a0", "a1", "b0"):
        logits, mean = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert mean == [0.25] * 3

    # What is not in the cache: the file, the repository, the folder to put it in; at once.
    assert float(said.split()[0]) < 5
    assert f"config.json of google/other is not in the cache ({tmp_path / 'home'}" in said
    assert "HF_HUB_OFFLINE" in said
    assert f"{address}/google/other/tree/main" in said
    assert "run with weights/other as the weights" in said


def test_the_folder_that_is_advised_works(client, tmp_path, monkeypatch):
    folder, _, offline = client
    expected = publish_vit(folder / "google" / "vit")
    offline()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_pretrained("google/vit")
    advised = Path(str(caught.value).split("run with ")[1].split()[0])
    advised.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert file in str(caught.value)
        (advised / file).write_bytes((folder / "google" / "vit" / file).read_bytes())
    pretrained = load_pretrained(str(advised))
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(pretrained.model(images), expected, atol=1e-5, rtol=1e-5)
    assert pretrained.preprocess.mean == [0.25] * 3


def test_a_timm_name_takes_its_repository_and_the_folder_gives_the_same(client, tmp_path):
    folder, asked, _ = client
    name = "test_vit.r160_in1k"
    reference = timms(name)
    exported(reference, folder / "timm" / name)
    for source in ("test_vit", name, f"timm/{name}", str(folder / "timm" / name)):
        pretrained = load_pretrained(source, plain_only=True)
        assert_same_logits(pretrained, reference, 160)
        assert_preprocess_of(pretrained, reference)
    fetched = [line for line in asked if line.startswith("GET")]
    assert sorted(set(fetched)) == sorted(fetched)  # nothing twice


def test_what_a_repository_has_not_is_remembered_without_a_network(client):
    """A repository with a pickle alone and no processor: two files are known not to exist."""
    folder, asked, offline = client
    place = folder / "someone" / "old"
    publish_vit(place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    (place / "preprocessor_config.json").unlink()
    online = load_pretrained("someone/old")
    assert any("no mean and std" in remark for remark in online.remarks)
    count = len(asked)
    offline()
    assert load_pretrained("someone/old").fingerprint() == online.fingerprint()
    assert len(asked) == count


def test_a_processor_that_was_never_asked_for_is_missed_offline(client, tmp_path):
    """Without it the images would be normalised wrongly, and nobody would know."""
    folder, _, offline = client
    publish_vit(folder / "google" / "vit")
    load_pretrained("google/vit")
    for file in tmp_path.joinpath("cache").rglob("preprocessor_config.json"):
        file.unlink()
    offline()
    with pytest.raises(UserError, match=r"preprocessor_config\.json of google/vit is not in"):
        load_pretrained("google/vit")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/body", "no/body is no folder here"),
        ("some/gated", "is gated: accept its terms"),
        ("some/empty", "no config.json"),
        ("some/configured", "neither of model.safetensors, pytorch_model.bin"),
    ],
)
def test_repositories_that_cannot_be_had_are_told_apart(source, said, client):
    folder, *_ = client
    (folder / "some" / "empty").mkdir(parents=True)
    (folder / "some" / "configured").mkdir()
    (folder / "some" / "configured" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    assert said in str(caught.value)


# --- runs of ours, heads, features ---


def save_run(folder, model, classes, preprocess):
    folder.mkdir()
    header = {**model_header(model, classes, preprocess), "epoch": 3}
    save_weights(folder / "best.safetensors", model.state_dict(), header)
    return str(folder)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_run_of_ours_keeps_its_head_and_its_preprocessing(kind, tmp_path):
    preprocess = Preprocess(64, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.8, "bilinear")
    torch.manual_seed(0)
    if kind == "vit":
        config = ViTConfig(img_size=64, patch_size=8, embed_dim=32, num_heads=4, depth=2,
                           num_classes=10, drop_path_rate=0.2)  # fmt: skip
        model = shaken(VisionTransformer(config))
        options = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2}
        name, options = "vit_tiny_patch16_224", {**options, "num_classes": 10}
    else:
        name, options = "swin_tiny_patch4_window7_224", {**SMALL_SWIN, "window_size": 4}
        options = {**options, "num_classes": 10, "img_size": 64}
        model = shaken(build_timm_model(TimmConfig(name, options)))
    run = save_run(tmp_path / "run", model, DIGITS, preprocess)
    for source in (run, f"{run}/best.safetensors"):
        pretrained = load_pretrained(source, plain_only=True)
        assert pretrained.preprocess == preprocess
        assert_same_logits(pretrained, model, 64)
        assert "is kept" in reset_classifier(pretrained, DIGITS)
        assert_same_logits(pretrained, model, 64)
    rebuilt, header = load_model(Path(run) / "best.safetensors")
    assert Preprocess(**header["preprocess"]) == preprocess
    assert_same_logits(load_pretrained(run), rebuilt, 64)

    larger = load_pretrained(run, img_size=128)
    assert larger.preprocess == Preprocess(128, preprocess.mean, preprocess.std, 0.8, "bilinear")
    same = {k: v for k, v in options.items() if k not in ("num_classes", "img_size")}
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    expected = loaded_by_timm(name, tmp_path / "file.safetensors", 64, **same, img_size=128)
    assert_same_logits(larger, expected, 128)
    # What is trained further is rebuilt from its own header.
    again = save_run(tmp_path / "again", larger.model, DIGITS, larger.preprocess)
    assert_same_logits(load_pretrained(again), expected, 128)


def test_files_of_ours_that_are_no_model_are_refused(tmp_path):
    run = save_run(tmp_path / "head", nn.Linear(3, 2), ["a", "b"], Preprocess(8, [0.5], [0.5]))
    with pytest.raises(UserError, match="holds a Linear, which is no model"):
        load_pretrained(run)


SOURCES = {
    "vit": ("test_vit", {}),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "convnet": ("test_convnext", {}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_new_head_is_zero_and_the_rest_stays(kind, tmp_path):
    name, options = SOURCES[kind]
    options = {**options, "num_classes": 10}
    folder = exported(timms(name, **options), tmp_path / "source", **options)
    pretrained = load_pretrained(folder)
    size = pretrained.preprocess.img_size
    before = {k: v.clone() for k, v in pretrained.model.state_dict().items()}
    said = reset_classifier(pretrained, DIGITS)  # as many, but nobody knows of what
    assert "in place of the 10 released outputs" in said
    heads = [k for k in before if k.startswith("head") and "norm" not in k]
    heads = [k for k in heads if len(before[k]) == 10]
    assert heads
    for key, value in pretrained.model.state_dict().items():
        if key in heads:
            assert key in said
            assert not value.any()
        else:
            assert torch.equal(value, before[key])

    assert "for 3 classes" in reset_classifier(pretrained, ["a", "b", "c"])
    assert pretrained.model(torch.randn(2, 3, size, size)).shape == (2, 3)
    shaken(pretrained.model)
    classes = ["a", "b", "c"]
    run = save_run(tmp_path / "run", pretrained.model, classes, pretrained.preprocess)
    assert_same_logits(load_pretrained(run), pretrained.model, size)


def test_a_head_is_kept_only_for_the_same_classes_in_the_same_order(tmp_path):
    model = shaken(VisionTransformer(ViTConfig(**SMALL, num_classes=3)))
    run = save_run(tmp_path / "run", model, ["a", "b", "c"], Preprocess(32, [0.5] * 3, [0.5] * 3))
    assert "is kept" in reset_classifier(load_pretrained(run), ["a", "b", "c"])
    for classes in (["a", "c", "b"], ["a", "b"], ["x", "y", "z"]):
        pretrained = load_pretrained(run)
        assert "3 released outputs: head.weight, head.bias" in reset_classifier(pretrained, classes)
        assert not pretrained.model.head.weight.any()
        assert pretrained.model.config.num_classes == len(classes)


def test_weights_without_a_head_get_one(tmp_path):
    options = {**SMALL, "num_classes": 0}
    reference = timms("vit_tiny_patch16_224", **options)
    pretrained = load_pretrained(exported(reference, tmp_path / "vit", **options))
    assert "where none was released" in reset_classifier(pretrained, ["a", "b"])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(pretrained.model(images), torch.zeros(2, 2))
    torch.testing.assert_close(pooled_features(pretrained.model, images), reference(images))


@pytest.mark.parametrize("kind", ["vit", "mean", "swin", "convnet"])
def test_pooled_is_what_the_head_reads(kind, tmp_path):
    name, options = SOURCES["vit" if kind == "mean" else kind]
    options = {**options, "num_classes": 7}
    options |= {"global_pool": "avg"} if kind == "mean" else {}
    reference = timms(name, **options)
    model = load_pretrained(exported(reference, tmp_path / "source", **options)).model
    size = reference.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size)
    features = pooled_features(model, images)
    with torch.no_grad():
        tokens = reference.forward_features(images)
        expected = reference.forward_head(tokens, pre_logits=True)
        assert expected.std() > 1e-2
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(classifier(model)(features), model(images))
    assert features.shape == (2, model.get_classifier().in_features if kind in
                              ("swin", "convnet") else model.config.embed_dim)  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_random_weights_have_the_same_shape_and_nothing_learned(kind, tmp_path):
    name, options = SOURCES[kind]
    pretrained = load_pretrained(exported(timms(name, **options), tmp_path / "source", **options))
    reset_classifier(pretrained, DIGITS)
    torch.manual_seed(1)
    fresh = reinitialized(pretrained.model)
    state = pretrained.model.state_dict()
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    key = next(k for k in state if k.endswith("attn.qkv.weight"))
    assert not torch.isclose(fresh.state_dict()[key], state[key]).all()
    torch.manual_seed(1)
    again = reinitialized(pretrained.model)
    assert all(map(torch.equal, fresh.state_dict().values(), again.state_dict().values()))


def test_the_fingerprint_is_of_the_values_whatever_their_file(tmp_path):
    reference = timms("test_vit")
    torch.save({"model": reference.state_dict()}, tmp_path / "test_vit.pth")
    path = saved(reference, tmp_path / "test_vit.safetensors")
    prints = [load_pretrained(str(tmp_path / "test_vit.pth")).fingerprint()]
    prints.append(load_pretrained(path).fingerprint())
    with torch.no_grad():
        reference.blocks[3].mlp.fc1.bias[5] += 1e-6
    prints.append(load_pretrained(saved(reference, path)).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_a_crop_that_cannot_be_is_replaced_and_said(tmp_path):
    folder = Path(exported(timms("test_convnext"), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_pct": 1.15, "crop_mode": "squash", "interpolation": "area"}
    (folder / "config.json").write_text(json.dumps(config))
    pretrained = load_pretrained(str(folder))
    assert pretrained.preprocess.crop_pct == 1
    assert pretrained.preprocess.interpolation == "bicubic"
    assert any("'squash' with 1.15" in remark for remark in pretrained.remarks)
    assert any("'area'" in remark for remark in pretrained.remarks)
