"""cnn_baseline.py: blocks equal timm's, the size matches the ViT's, runs equal train.py's."""

import json

import numpy as np
import pytest
import torch
from timm.models.resnet import BasicBlock, downsample_avg
from torch import nn

import cnn_baseline
from lab.core import UserError
from lab.models import load_pretrained, profile_model
from lab.models.cnn import CNNConfig, ResidualBlock, ResidualCNN, matched_cnn
from model import ConfigError, VisionTransformer, ViTConfig
from tests.in_process import run_script


def mixed(module: nn.Module) -> nn.Module:
    """Weights and statistics as after training: nothing is zero or one."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.2)
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("in_dim", "dim", "stride"), [(5, 5, 1), (5, 8, 2), (4, 7, 1)])
def test_block_is_timms_basic_block(in_dim, dim, stride, training):
    ours = mixed(ResidualBlock(in_dim, dim, stride, 0.0)).train(training)
    shortcut = None
    if stride > 1 or in_dim != dim:
        shortcut = downsample_avg(in_dim, dim, kernel_size=1, stride=stride)
    theirs = BasicBlock(in_dim, dim, stride, shortcut).train(training)
    theirs.load_state_dict(ours.state_dict())
    for size in ((8, 8), (7, 5)):
        x = torch.randn(3, in_dim, *size)
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_new_block_is_its_shortcut():
    model = ResidualCNN(CNNConfig(3, 5, (6, 12)))
    block = model.layers[0][0].eval()
    x = torch.rand(2, 6, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(
    ("stem", "size", "grid"), [(1, 8, 2), (1, 28, 7), (1, 32, 8), (4, 224, 14)]
)
def test_each_stage_halves_the_resolution(stem, size, grid):
    model = ResidualCNN(CNNConfig(3, 5, (4, 6, 8), stem_stride=stem)).eval()
    images = torch.randn(2, 3, size, size)
    features = model.forward_features(images)
    assert features.shape == (2, 8, grid, grid)
    expected = features.mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def some_vits() -> list[ViTConfig]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(8):
        patch = int(rng.choice([2, 4, 8]))
        heads = int(rng.integers(1, 5))
        found.append(ViTConfig(
            img_size=patch * int(rng.integers(2, 9)), patch_size=patch,
            in_chans=int(rng.choice([1, 3])), num_classes=int(rng.integers(2, 40)),
            embed_dim=heads * int(rng.integers(12, 40)), depth=int(rng.integers(2, 9)),
            num_heads=heads, drop_path_rate=0.1,
        ))  # fmt: skip
    large = {"img_size": 110, "patch_size": 22}  # the CNN's stem cuts off the remainder
    return [*found, ViTConfig(**large, num_classes=7, embed_dim=96, depth=3, num_heads=3)]


@pytest.mark.parametrize("match", ["params", "macs"])
@pytest.mark.parametrize("vit", some_vits(), ids=lambda v: f"{v.embed_dim}x{v.depth}@{v.img_size}")
def test_twin_is_within_one_per_cent(vit, match):
    key = "parameters" if match == "params" else "macs"
    image = (vit.in_chans, vit.img_size, vit.img_size)
    target = profile_model(VisionTransformer(vit), image)[key]
    config, said = matched_cnn(vit, target, match)
    found = profile_model(ResidualCNN(config), image)[key]
    assert found == said
    assert abs(found / target - 1) <= 0.01
    assert (config.in_chans, config.num_classes) == (vit.in_chans, vit.num_classes)
    ratios = np.array(config.dims) / config.dims[0]
    # The narrowest are 2 or 3 channels wide.
    assert np.allclose(ratios, 2 ** np.arange(len(ratios)), rtol=0.5)


def test_a_vit_too_small_for_a_twin_is_refused():
    with pytest.raises(UserError, match=r"400 params to within 1 %.*larger ViT"):
        matched_cnn(ViTConfig(img_size=8, patch_size=4, num_classes=2, in_chans=1), 400, "params")


def test_shapes_that_cannot_be_are_refused():
    for words in ({"dims": ()}, {"dims": (4, 0)}, {"blocks": 0}, {"num_classes": 0}):
        with pytest.raises(ConfigError, match=next(iter(words))):
            CNNConfig(**words)


def test_a_run_differs_from_train_py_only_in_the_model(tmp_path):
    words = ["--dataset", "digits", "--epochs", "1", "--embed-dim", "32", "--depth", "2"]
    cnn = run_script(["cnn_baseline.py", *words], tmp_path)
    assert cnn.status == 0, cnn.err
    (folder,) = (tmp_path / "results" / "cnn_baseline").iterdir()
    config = json.loads((folder / "config.json").read_text())
    twin_of = config["twin_of"]
    assert twin_of["model"] == "vit_32x2"
    assert abs(config["model"]["parameters"] / twin_of["parameters"] - 1) < 0.01
    assert f"parameters: ViT {twin_of['parameters']:,}, CNN " in cnn.out
    vit = run_script(["train.py", *words], tmp_path)
    assert vit.status == 0, vit.err
    (other,) = (tmp_path / "results" / "train").iterdir()
    theirs = json.loads((other / "config.json").read_text())
    different = {"VIT", "MATCH", *cnn_baseline.EXCLUDED}
    ours, expected = (
        {name: value for name, value in run["constants"].items() if name not in different}
        for run in (config, theirs)
    )
    assert ours == expected
    assert config["data"] == theirs["data"]
    assert theirs["model"]["parameters"] == twin_of["parameters"]
    assert theirs["model"]["macs"] == twin_of["macs"]

    again = run_script(
        ["cnn_baseline.py", *words[:4], "--vit", str(other), "--match", "macs"], tmp_path
    )
    assert again.status == 0, again.err
    (second,) = (p for p in (tmp_path / "results" / "cnn_baseline").iterdir() if p != folder)
    config = json.loads((second / "config.json").read_text())
    assert config["twin_of"]["model"] == "vit_32x2"
    same = {name: config["constants"][name] for name in cnn_baseline.SIZES}
    assert same == {name: theirs["constants"][name] for name in cnn_baseline.SIZES}
    assert abs(config["model"]["macs"] / theirs["model"]["macs"] - 1) < 0.01

    loaded = load_pretrained(str(folder))
    assert loaded.classes == [str(i) for i in range(10)]
    images = torch.randn(2, 1, 8, 8)
    assert loaded.model(images).shape == (2, 10)
    other_weights = loaded.reinitialized()
    assert other_weights.config == loaded.model.config
    with pytest.raises(UserError, match="is a CNN"):
        load_pretrained(str(folder), plain_only=True)


def test_a_twin_of_nothing_is_a_sentence(tmp_path):
    done = run_script(["cnn_baseline.py", "--vit", "nowhere"], tmp_path)
    assert done.status == 2
    assert "VIT='nowhere' is not a finished run" in done.err
