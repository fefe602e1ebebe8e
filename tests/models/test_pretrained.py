"""Runs of this project, heads, features and fingerprints of pretrained models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_model, load_pretrained
from lab.models.registry import TimmConfig, build_timm_model, classifier, pooled_features
from model import VisionTransformer, ViTConfig
from tests.models.reference import (
    DIGITS,
    SMALL,
    SMALL_SWIN,
    TINY,
    assert_same_logits,
    exported,
    loaded_by_timm,
    save_run,
    saved,
    timms,
)
from tests.shaken import shaken


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_run_keeps_its_head_and_preprocessing(kind, tmp_path):
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
        assert "is kept" in pretrained.reset_classifier(DIGITS)
        assert_same_logits(pretrained, model, 64)
    moved = Path(run).rename(tmp_path / "moved and renamed")
    rebuilt, found, classes = load_model(moved)
    assert (found, classes) == (preprocess, DIGITS)
    moved.rename(run)
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


def test_file_with_only_a_head_is_refused(tmp_path):
    run = save_run(tmp_path / "head", nn.Linear(3, 2), ["a", "b"], Preprocess(8, [0.5], [0.5]))
    with pytest.raises(UserError, match="contains a Linear, which this project cannot load"):
        load_pretrained(run)


SOURCES = {
    "vit": ("test_vit", {}),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "convnet": ("test_convnext", {}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_new_head_is_zero_and_the_rest_stays(kind, tmp_path):
    name, options = SOURCES[kind]
    options = {**options, "num_classes": 10}
    folder = exported(timms(name, **options), tmp_path / "source", **options)
    pretrained = load_pretrained(folder)
    size = pretrained.preprocess.img_size
    before = {k: v.clone() for k, v in pretrained.model.state_dict().items()}
    message = pretrained.reset_classifier(DIGITS)  # the same number, but unknown classes
    assert "replaces the pretrained head (10 outputs)" in message
    heads = [k for k in before if k.startswith("head") and "norm" not in k]
    heads = [k for k in heads if len(before[k]) == 10]
    assert heads
    for key, value in pretrained.model.state_dict().items():
        if key in heads:
            assert key in message
            assert not value.any()
        else:
            assert torch.equal(value, before[key])

    assert "for 3 classes" in pretrained.reset_classifier(["a", "b", "c"])
    assert pretrained.model(torch.randn(2, 3, size, size)).shape == (2, 3)
    shaken(pretrained.model)
    classes = ["a", "b", "c"]
    run = save_run(tmp_path / "run", pretrained.model, classes, pretrained.preprocess)
    assert_same_logits(load_pretrained(run), pretrained.model, size)


def test_head_is_kept_only_for_the_same_classes_in_order(tmp_path):
    model = shaken(VisionTransformer(ViTConfig(**SMALL, num_classes=3)))
    run = save_run(tmp_path / "run", model, ["a", "b", "c"], Preprocess(32, [0.5] * 3, [0.5] * 3))
    assert "is kept" in load_pretrained(run).reset_classifier(["a", "b", "c"])
    for classes in (["a", "c", "b"], ["a", "b"], ["x", "y", "z"]):
        pretrained = load_pretrained(run)
        assert (
            "(head.weight, head.bias) replaces the pretrained head (3 outputs)"
            in pretrained.reset_classifier(classes)
        )
        assert not pretrained.model.head.weight.any()
        assert pretrained.model.config.num_classes == len(classes)


def test_weights_without_a_head_get_one(tmp_path):
    options = {**SMALL, "num_classes": 0}
    reference = timms("vit_tiny_patch16_224", **options)
    pretrained = load_pretrained(exported(reference, tmp_path / "vit", **options))
    assert "the weights have no head" in pretrained.reset_classifier(["a", "b"])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(pretrained.model(images), torch.zeros(2, 2))
    torch.testing.assert_close(pooled_features(pretrained.model, images), reference(images))


@pytest.mark.parametrize("kind", ["vit", "mean", "swin", "convnet"])
def test_pooled_features_are_the_input_of_the_head(kind, tmp_path):
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
def test_reinitialized_model_has_new_weights_of_the_same_shapes(kind, tmp_path):
    name, options = SOURCES[kind]
    pretrained = load_pretrained(exported(timms(name, **options), tmp_path / "source", **options))
    pretrained.reset_classifier(DIGITS)
    torch.manual_seed(1)
    fresh = pretrained.reinitialized()
    state = pretrained.model.state_dict()
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    key = next(k for k in state if k.endswith("attn.qkv.weight"))
    assert not torch.isclose(fresh.state_dict()[key], state[key]).all()
    torch.manual_seed(1)
    again = pretrained.reinitialized()
    assert all(map(torch.equal, fresh.state_dict().values(), again.state_dict().values()))


def test_fingerprint_depends_on_values_not_on_the_file(tmp_path):
    reference = timms("test_vit")
    torch.save({"model": reference.state_dict()}, tmp_path / "test_vit.pth")
    path = saved(reference, tmp_path / "test_vit.safetensors")
    prints = [load_pretrained(str(tmp_path / "test_vit.pth")).fingerprint()]
    prints.append(load_pretrained(path).fingerprint())
    with torch.no_grad():
        reference.blocks[3].mlp.fc1.bias[5] += 1e-6
    prints.append(load_pretrained(saved(reference, path)).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_unsupported_crop_is_replaced_with_a_remark(tmp_path):
    folder = Path(exported(timms("test_convnext"), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_pct": 1.15, "crop_mode": "squash", "interpolation": "area"}
    (folder / "config.json").write_text(json.dumps(config))
    pretrained = load_pretrained(str(folder))
    assert pretrained.preprocess.crop_pct == 1
    assert pretrained.preprocess.interpolation == "bicubic"
    assert any("'squash' (crop_pct 1.15)" in remark for remark in pretrained.remarks)
    assert any("'area'" in remark for remark in pretrained.remarks)
