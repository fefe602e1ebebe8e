"""Parameter groups: learning rate and weight decay of each layer."""

import pytest
import timm
from timm.optim import param_groups_layer_decay

from lab.models.registry import classifier
from lab.training.optimizers import adamw, layers
from tests.finetuning.small import SWIN, timms_vit, vit


def rates(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (round(group.get("lr_scale", 1.0), 9), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2_cr_tiny_224", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("decay", [0.65, 0.9])
def test_layer_decay_and_weight_decay_equal_timms(name, decay):
    if name == "vit":
        ours, theirs = vit(), timms_vit()
    else:
        arguments = SWIN if name == "swin" else {"num_classes": 10}
        name = "swin_tiny_patch4_window7_224" if name == "swin" else name
        ours = theirs = timm.create_model(name, **arguments)
    expected = param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay() if hasattr(
            theirs, "no_weight_decay") else (), layer_decay=decay,
    )  # fmt: skip
    groups = adamw(ours, 1e-3, 0.05, layer_decay=decay).param_groups
    assert rates(groups, ours) == rates(expected, theirs)


def test_head_has_its_own_learning_rate():
    model = vit()
    scales = rates(adamw(model, 1e-3, 0.05, layer_decay=0.5, head_lr_mult=10).param_groups, model)
    assert scales["head.weight"][0] == scales["head.bias"][0] == 10
    assert scales["blocks.2.mlp.fc1.weight"][0] == scales["norm.weight"][0] == 0.5
    assert scales["blocks.0.mlp.fc1.weight"][0] == 0.125
    assert scales["pos_embed"] == (0.0625, 0.0)


def test_last_layer_of_a_swin_is_its_head():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    layer_of = layers(model)
    top = max(layer_of.values())
    assert {n for n, layer in layer_of.items() if layer == top} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    assert classifier(model) is model.head.fc
