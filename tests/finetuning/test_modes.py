"""What each mode trains and freezes, and its learning rate."""

import dataclasses

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from lab.core import UserError
from lab.finetuning import default_learning_rate, learning_rate_warning, set_trainable, variant_of
from lab.finetuning.modes import _LEARNING_RATES
from lab.training import fit, loop
from lab.training.optimizers import adamw
from tests.finetuning.small import CONFIG, FP32, gray_loaders, open_run, vit


def test_learning_rate_depends_on_mode_and_width():
    narrow, wide = vit(), vit(config=dataclasses.replace(CONFIG, embed_dim=64))
    for variant in _LEARNING_RATES:
        assert default_learning_rate(narrow, variant) == pytest.approx(
            2 * default_learning_rate(wide, variant)
        )
        assert (
            learning_rate_warning(narrow, variant, default_learning_rate(narrow, variant)) is None
        )
    base = timm.create_model("vit_base_patch16_224", num_classes=10)
    assert default_learning_rate(base, "full") == _LEARNING_RATES["full"]
    assert "LEARNING_RATE=0.001 is unusual for full" in learning_rate_warning(base, "full", 1e-3)
    variants = [variant_of(narrow, "top-k", blocks, 1.0) for blocks in (1, 2, 3)]
    assert variants == ["top-k", "full", "full"]  # two of three blocks are most of them
    assert variant_of(narrow, "full", 2, 0.7) == "layer-decay"
    assert variant_of(narrow, "lora", 2, 0.7) == "lora"


@pytest.mark.parametrize(("blocks", "first"), [(0, "head"), (1, "blocks.2"), (2, "blocks.1")])
def test_top_k_trains_the_last_blocks_the_norm_and_the_head(blocks, first, data, tmp_path):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_trainable(model, "top-k" if blocks else "head", blocks, 0)
    wanted = ["head", "norm", "blocks.2", "blocks.1"][: 1 if blocks == 0 else blocks + 2]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if n.startswith(tuple(f"{w}." for w in wanted))}
    run = open_run(tmp_path, model, data)
    fit(
        model, adamw(model, 1e-2, 0.5), gray_loaders(data), dataclasses.replace(FP32, epochs=1), run
    )
    moved = {n for n, v in load_file(run.folder / "best.safetensors").items()
             if not v.equal(before[n])}  # fmt: skip
    assert moved == trained


def test_too_many_blocks_are_refused():
    with pytest.raises(UserError, match="TOP_K=4 must lie between 1 and 3"):
        set_trainable(vit(), "top-k", 4, 0)


def test_an_unknown_mode_is_refused_and_trains_nothing():
    """As after the edit `MODE = "Head"`, which also removes the annotation."""
    with pytest.raises(UserError, match="MODE='Head' is not one of full, head"):
        set_trainable(vit(), "Head", 1, 8)


def test_frozen_parts_have_no_dropout_and_keep_their_statistics():
    model = timm.create_model("resnet18", num_classes=10)
    set_trainable(model, "top-k", 1, 0)
    loop.train_mode(model)
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)
              and not m.weight.requires_grad]  # fmt: skip
    assert frozen
    assert not any(module.training for module in frozen)
    assert model.layer4[1].bn1.training
    dropping = vit(config=dataclasses.replace(CONFIG, drop_path_rate=0.9))
    set_trainable(dropping, "head", 0, 0)
    loop.train_mode(dropping)
    images = torch.randn(4, 3, 8, 8)
    assert dropping(images).equal(dropping(images))


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet18", "distilled"])
def test_head_mode_trains_only_the_output_layer(kind):
    """The norm before the output layer is pretrained, so it is not part of the head."""
    if kind == "vit":
        model = vit(config=dataclasses.replace(CONFIG, global_pool="avg", class_token=False))
    else:
        names = {"convnext": "test_convnext", "distilled": "deit_tiny_distilled_patch16_224"}
        model = timm.create_model(names.get(kind, kind), num_classes=10)
    set_trainable(model, "head", 0, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {"vit": ["head"], "convnext": ["head.fc"], "resnet18": ["fc"],
              "distilled": ["head", "head_dist"]}[kind]  # fmt: skip
    assert trained == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_norm_before_the_head_has_the_learning_rate_of_the_last_block():
    model = vit(config=dataclasses.replace(CONFIG, global_pool="avg", class_token=False))
    groups = adamw(model, 1e-3, 0.05, layer_decay=0.5, head_lr_mult=10).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales["head.weight"] == scales["head.bias"] == 10
    assert scales["fc_norm.weight"] == scales["fc_norm.bias"] == 0.5
    assert scales["blocks.2.norm1.weight"] == 0.5
