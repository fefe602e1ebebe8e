"""Fine-tuning: what is trained, at which rate, and that the fast ways equal the slow ones."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from timm.optim import param_groups_layer_decay
from torch import nn

import finetune_swin
from lab.core import constants
from lab.core.checkpoints import save_weights
from lab.core.errors import UserError
from lab.core.runs import Run
from lab.data.augment import Augmentation, center_crop
from lab.data.datasets import load_data
from lab.data.images import Reading, read_image
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess
from lab.finetuning.linear_probe import cached_features, train_linear_probe
from lab.finetuning.modes import (
    RATES,
    default_learning_rate,
    learning_rate_warning,
    train_only_top,
    variant_of,
)
from lab.models import profiling
from lab.models.lora import add_lora, merge, merged_state
from lab.models.pretrained import classifier
from lab.models.registry import TimmConfig, build_timm_model, load_model, model_header
from lab.training.config import FitConfig
from lab.training.loop import fit, train_mode
from lab.training.optimizers import adamw, layers
from model import ConfigError, VisionTransformer, ViTConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ViTConfig(
    img_size=8, patch_size=4, in_chans=3, num_classes=10, embed_dim=32, depth=3, num_heads=2
)
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 2),
        "num_heads": (1, 2), "num_classes": 10}  # fmt: skip
FP32 = FitConfig(epochs=3, warmup_fraction=0.1, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def vit(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return VisionTransformer(config)


def timms_vit(config=CONFIG):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=config.embed_dim,
        depth=config.depth, num_heads=config.num_heads, num_classes=10,
    )  # fmt: skip


def open_run(folder, model, data, **constants):
    facts = {"model": profiling.profile_model(model, (3, 8, 8)), "dataset": data.summary()}
    return Run.open(folder, "run", constants, facts, fresh=False)


def gray_loaders(data, augmentation=None, batch_size=64):
    return Loaders(data, Preprocess(8, [0.3] * 3, [0.4] * 3), batch_size,
                   augmentation or Augmentation())  # fmt: skip


# --- Rates -------------------------------------------------------------------------------------


def rates(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (round(group.get("lr_scale", 1.0), 9), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2_cr_tiny_224", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("decay", [0.65, 0.9])
def test_layer_decay_gives_each_parameter_timms_rate_and_decay(name, decay):
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


def test_the_head_has_a_rate_of_its_own():
    model = vit()
    scales = rates(adamw(model, 1e-3, 0.05, layer_decay=0.5, head_lr_mult=10).param_groups, model)
    assert scales["head.weight"][0] == scales["head.bias"][0] == 10
    assert scales["blocks.2.mlp.fc1.weight"][0] == scales["norm.weight"][0] == 0.5
    assert scales["blocks.0.mlp.fc1.weight"][0] == 0.125
    assert scales["pos_embed"] == (0.0625, 0.0)


def test_rates_follow_the_mode_and_the_width():
    narrow, wide = vit(), vit(config=dataclasses.replace(CONFIG, embed_dim=64))
    for variant in RATES:
        assert default_learning_rate(narrow, variant) == pytest.approx(
            2 * default_learning_rate(wide, variant)
        )
        assert (
            learning_rate_warning(narrow, variant, default_learning_rate(narrow, variant)) is None
        )
    base = timm.create_model("vit_base_patch16_224", num_classes=10)
    assert default_learning_rate(base, "full") == RATES["full"]
    assert "LEARNING_RATE=0.001 is unusual for full" in learning_rate_warning(base, "full", 1e-3)
    variants = [variant_of(narrow, "top-k", blocks, 1.0) for blocks in (1, 2, 3)]
    assert variants == ["top-k", "full", "full"]  # two of three blocks are most of them
    assert variant_of(narrow, "full", 2, 0.7) == "layer-decay"
    assert variant_of(narrow, "lora", 2, 0.7) == "lora"


# --- What is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "first"), [(0, "head"), (1, "blocks.2"), (2, "blocks.1")])
def test_top_k_trains_the_last_blocks_the_norm_and_the_head(blocks, first, data, tmp_path):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_only_top(model, blocks)
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


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(UserError, match="TOP_K=4 must lie between 1 and 3"):
        train_only_top(vit(), 4)


def test_what_is_frozen_drops_nothing_and_keeps_its_statistics():
    model = timm.create_model("resnet18", num_classes=10)
    train_only_top(model, 1)
    train_mode(model)
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)
              and not m.weight.requires_grad]  # fmt: skip
    assert frozen
    assert not any(module.training for module in frozen)
    assert model.layer4[1].bn1.training
    dropping = vit(config=dataclasses.replace(CONFIG, drop_path_rate=0.9))
    train_only_top(dropping, 0)
    train_mode(dropping)
    images = torch.randn(4, 3, 8, 8)
    assert dropping(images).equal(dropping(images))


def test_lora_starts_as_the_model_and_adds_b_times_a(data, tmp_path):
    model = vit()
    images = torch.randn(3, 3, 8, 8)
    before, whole = model.state_dict(), model(images)
    before = {name: value.clone() for name, value in before.items()}
    add_lora(model, rank=2)
    model.head.requires_grad_(True)
    torch.testing.assert_close(model(images), whole, atol=1e-6, rtol=0)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 3 * 2 * ((32 + 96) + (32 + 32)) + 330
    loaders = gray_loaders(data)
    run = open_run(tmp_path, model, data)
    fit(model, adamw(model, 1e-2, 0.0), loaders, FP32, run)
    saved = torch.load(run.folder / "last.pt", weights_only=True)["model"]
    kept, _ = load_model(run.folder / "best.safetensors")  # a plain ViT again
    assert type(kept) is VisionTransformer
    state = kept.state_dict()
    best = json.loads((run.folder / "metrics.json").read_text())["best_epoch"]
    assert best == FP32.epochs  # so that last.pt holds the same weights
    for name, value in state.items():
        if ".attn." in name and name.endswith("weight"):
            part = name.removesuffix("weight") + "parametrizations.weight.0."
            added = saved[part + "B"].numpy() @ saved[part + "A"].numpy() / 2**0.5
            expected = before[name].numpy() + added
            assert abs(added).max() > 1e-3
            torch.testing.assert_close(value, torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
        elif not name.startswith("head"):
            assert value.equal(before[name]), name


def test_merging_changes_no_output():
    model = vit()
    add_lora(model, rank=4)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    images = torch.randn(2, 3, 8, 8)
    expected, state = model(images), merged_state(model)
    merge(model)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == state.keys() == vit().state_dict().keys()
    assert all(state[name].equal(value) for name, value in model.state_dict().items())


def test_lora_without_attention_layers_is_refused():
    with pytest.raises(UserError, match="no attention layers"):
        add_lora(timm.create_model("resnet18"), 4)
    with pytest.raises(UserError, match="LORA_RANK=33 must lie between 1 and 32"):
        add_lora(vit(), 33)


# --- The head on cached features ---------------------------------------------------------------


def features_of(model, loaders, place, views=0, weights="w", precision="no"):
    return cached_features(model, weights, loaders, views, place, precision)


def test_the_cached_way_ends_with_the_weights_of_the_uncached_way(data, tmp_path):
    uncached = vit(1)
    train_only_top(uncached, 0)
    how = dataclasses.replace(FP32, clip_grad=1.0)
    run = open_run(tmp_path / "1", uncached, data)
    history = fit(uncached, adamw(uncached, 1e-2, 0.05), gray_loaders(data), how, run)

    cached = vit(1)
    train_only_top(cached, 0)
    loaders, seconds = features_of(cached, gray_loaders(data), tmp_path)
    again = open_run(tmp_path / "2", cached, data)
    train_linear_probe(cached, loaders, how, again, ([1e-2], [0.05]), seconds)
    one, other = (load_file(r.folder / "best.safetensors") for r in (run, again))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3, msg=name)
    for mine, theirs in zip(again.history(), history, strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-4)
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
    assert again.metrics()["test_accuracy"] == pytest.approx(
        run.metrics()["test_accuracy"], abs=0.005
    )


def test_the_sweep_takes_what_validation_likes_best_and_tests_it_alone(data, tmp_path):
    model = vit(2)
    train_only_top(model, 0)
    loaders, _ = features_of(model, gray_loaders(data), tmp_path)
    run = open_run(tmp_path / "r", model, data)
    train_linear_probe(model, loaders, FP32, run, ([1e-4, 1e-1], [0.0, 0.5]), 7.0)
    metrics = run.metrics()
    sweep = metrics["sweep"]
    assert len(sweep) == 4
    assert sweep[metrics["chosen"]] == max(sweep.values()) == metrics["val_accuracy"]
    assert min(sweep.values()) < max(sweep.values())
    assert not list(run.folder.rglob("sweep/*/metrics.json"))
    assert not list(run.folder.rglob("sweep/*/predictions.csv"))
    assert metrics["training_seconds"] >= 7.0
    # The checkpoint alone predicts what was recorded.
    kept, header = load_model(run.folder / "best.safetensors")
    images = data.test.images(slice(None)).float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(header["preprocess"][k])[:, None, None] for k in ("mean", "std"))
    right = kept((images - mean) / std).argmax(1) == data.test.labels
    assert right.double().mean().item() == pytest.approx(metrics["test_accuracy"], abs=1e-6)


def test_features_are_computed_once_and_again_when_anything_changes(data, tmp_path):
    model = vit()
    turned = Augmentation(rotate=20)

    def kept():
        return len(list(tmp_path.glob("features-*.safetensors")))

    first, _ = features_of(model, gray_loaders(data), tmp_path)
    again, _ = features_of(nn.Identity(), gray_loaders(data), tmp_path)  # nothing is computed
    assert again.features["train"].equal(first.features["train"])
    assert kept() == 1
    features_of(model, gray_loaders(data, turned), tmp_path)  # plain views: no augmentation in it
    assert kept() == 1
    features_of(model, gray_loaders(data), tmp_path, weights="others")
    features_of(model, gray_loaders(data, turned), tmp_path, views=2)
    features_of(model, gray_loaders(data, Augmentation(rotate=30)), tmp_path, views=2)
    other = Loaders(data, Preprocess(8, [0.5] * 3, [0.4] * 3), 64, Augmentation())
    features_of(model, other, tmp_path)
    features_of(model, gray_loaders(load_data("digits", val_fraction=0.3)), tmp_path)
    assert kept() == 6


def test_views_are_augmented_and_each_epoch_draws_among_them(data, tmp_path):
    model = vit()
    loaders, _ = features_of(model, gray_loaders(data, Augmentation(rotate=40)), tmp_path, views=3)
    views = loaders.features["train"]
    assert views.shape == (3, 1295, 32)
    assert (views[0] != views[1]).any(1).double().mean() > 0.95
    drawn = torch.cat([features for features, _ in loaders.train(1)])
    order = torch.cat(loaders.order(1, 0))
    matches = (views[:, order] == drawn).all(2)  # (views, N)
    assert matches.any(0).all()
    assert (matches.double().mean(1) - 1 / 3).abs().max() < 0.06
    labels = torch.cat([labels for _, labels in loaders.train(1)])
    assert labels.equal(data.train.labels[order])


def test_grayscale_images_feed_a_model_of_three_channels(data):
    images, _ = next(gray_loaders(data).train(1))
    assert images.shape[1:] == (3, 8, 8)
    assert images[:, 0].equal(images[:, 2])
    colour = dataclasses.replace(data.train, store=data.train.store.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="3 channels do not fit a model that takes 1"):
        Loaders(dataclasses.replace(data, train=colour), Preprocess(8, [0.3], [0.4]), 8,
                Augmentation())  # fmt: skip


@pytest.mark.parametrize(("crop_pct", "method"), [(0.9, "bicubic"), (0.875, "bilinear"),
                                                  (1.0, "bicubic")])  # fmt: skip
def test_a_photograph_is_prepared_as_timm_prepares_it(crop_pct, method, tmp_path):
    smooth = F.interpolate(torch.rand(1, 3, 20, 20), (300, 300), mode="bicubic").clamp(0, 1)
    image = Image.fromarray((smooth[0] * 255).byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "x.png")
    to = Preprocess(96, [0.5] * 3, [0.5] * 3, crop_pct, method)
    pixels, _ = read_image(tmp_path / "x.png", Reading(to.resized, method))
    ours = (center_crop(torch.from_numpy(pixels.copy())[None], to) - 0.5) / 0.5
    theirs = create_transform(96, mean=to.mean, std=to.std, crop_pct=crop_pct,
                              interpolation=method)(image)  # fmt: skip
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


# --- Swin --------------------------------------------------------------------------------------


def test_image_sizes_are_accepted_just_where_windows_tile_every_stage():
    for patch, window, stages in ((4, 7, 4), (4, 16, 4), (2, 4, 3), (4, 8, 4)):
        for size in range(8, 600, 4):
            fine = True
            for stage in range(stages):
                patches, rest = divmod(size, patch * 2**stage)
                fine &= rest == 0 and (patches % window == 0 or patches < window)
            if fine:
                finetune_swin.check_size(size, patch, window, stages)
            else:
                with pytest.raises(UserError, match=r"nearest sizes that work: \d") as error:
                    finetune_swin.check_size(size, patch, window, stages)
                for near in re.findall(r"\d+", str(error.value).split("work:")[1]):
                    finetune_swin.check_size(int(near), patch, window, stages)


@pytest.mark.parametrize(("name", "expected"), [
    ("swin_tiny_patch4_window7_224", (4, 7, 4)), ("swinv2_tiny_window8_256", (4, 8, 4)),
    ("resnet18", None),
])  # fmt: skip
def test_windows_are_read_off_the_model(name, expected):
    assert finetune_swin.windows(timm.create_model(name)) == expected


def test_layers_of_a_swin_end_with_its_head():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    layer_of = layers(model)
    top = max(layer_of.values())
    assert {n for n, layer in layer_of.items() if layer == top} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    assert classifier(model) is model.head.fc


# --- From the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights: what is tested is the machinery."""
    place = tmp_path_factory.mktemp("weights")
    classes = [f"class {i}" for i in range(10)]
    tall = dataclasses.replace(CONFIG, img_size=16)
    header = model_header(vit(config=tall), classes, Preprocess(16, [0.5] * 3, [0.5] * 3))
    save_weights(place / "vit.safetensors", vit(config=tall).state_dict(), header)
    return place / "vit.safetensors"


def run_script(script, place, *words):
    command = [sys.executable, script, "--data-dir", str(place / "data"), "--results-dir",
               str(place / "results"), "--epochs", "2", "--precision", "fp32", *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_every_mode_side_by_side(weights, tmp_path):
    words = ("--pretrained", str(weights), "--mode", "all")
    status, out, err = run_script("finetune.py", tmp_path, *words)
    assert status == 0, err
    picture = Path(out.splitlines()[-1])
    assert picture.stat().st_size > 20_000
    table = picture.with_suffix(".md").read_text()
    modes = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert modes == ["scratch", "head", "top 1", "top 2", "LoRA 8", "full, decay 0.7", "full"]
    records = {}
    for path in (tmp_path / "results").glob("*/config.json"):
        config = json.loads(path.read_text())
        metrics = json.loads(path.with_name("metrics.json").read_text())
        assert f"{config['model']['trainable_parameters']:,} | " in table
        assert f"{100 * metrics['test_accuracy']:.1f} % (" in table
        assert config["pretrained"]["notes"]
        records[path.parent.name] = config
    assert len(records) == 7
    assert records["digits-vit-head-s0"]["model"]["trainable_parameters"] == 330
    (kept,) = (tmp_path / "results").glob("*-head-s0/best.safetensors")
    before = kept.stat().st_mtime_ns
    status, out, _ = run_script("finetune.py", tmp_path, *words[:2], "--mode", "head")
    assert status == 0
    assert "this run is finished" in out
    assert kept.stat().st_mtime_ns == before


def test_a_run_of_ours_is_fine_tuned_and_keeps_its_head(weights, tmp_path):
    words = ("--pretrained", str(weights), "--mode", "top-k", "--top-k", "1")
    status, _, err = run_script("finetune.py", tmp_path, *words)
    assert status == 0, err
    (folder,) = (tmp_path / "results").iterdir()
    status, out, err = run_script("finetune.py", tmp_path, "--pretrained", str(folder),
                                  "--learning-rate", "0.5")  # fmt: skip
    assert status == 0, err
    assert "is kept: it knows these 10 classes" in out
    assert "warning: LEARNING_RATE=0.5 is unusual for full" in out


@pytest.mark.parametrize(("words", "said"), [
    (("--mode", "top-k", "--top-k", "9"), "TOP_K=9 must lie between 1 and 3"),
    (("--mode", "lora", "--lora-rank", "0"), "LORA_RANK=0 must lie between 1 and 32"),
    (("--mode", "head", "--augment-views", "-1"), "AUGMENT_VIEWS=-1"),
    (("--layer-decay", "0"), r"LAYER_DECAY=0.0 must lie in (0, 1]"),
    (("--img-size", "18"), "patch_size=4 must divide img_size=18"),
    (("--head-lr-mult", "0"), "HEAD_LR_MULT=0.0"),
    (("--mode", "half"), "invalid choice: 'half'"),
])  # fmt: skip
def test_a_mistake_ends_with_a_sentence(words, said, weights, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("finetune_again", ROOT / "finetune.py")
    script = importlib.util.module_from_spec(spec)  # a copy: flags change its constants
    spec.loader.exec_module(script)
    places = ["--data-dir", str(tmp_path), "--results-dir", str(tmp_path / "r")]
    argv = ["--pretrained", str(weights), "--epochs", "1", "--precision", "fp32", *places, *words]
    with pytest.raises((UserError, ConfigError, SystemExit)) as error:
        script.finetune(constants.override(script, argv), plain_only=True)
    assert said in f"{error.value}{capsys.readouterr().err}"


def test_finetune_swin_takes_any_architecture_and_names_sizes(tmp_path):
    torch.manual_seed(0)
    arguments = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 8,
                 "depths": [1, 1], "num_heads": [1, 2], "num_classes": 3}  # fmt: skip
    model = build_timm_model(TimmConfig("swin_tiny_patch4_window7_224", arguments))
    path = tmp_path / "swin.safetensors"
    header = model_header(model, ["a", "b", "c"], Preprocess(64, [0.5] * 3, [0.5] * 3))
    save_weights(path, model.state_dict(), header)
    status, _, err = run_script("finetune_swin.py", tmp_path, "--model", str(path),
                                "--img-size", "36")  # fmt: skip
    assert status == 2
    assert "IMG_SIZE=36: windows of 4 x 4" in err
    status, out, err = run_script("finetune_swin.py", tmp_path, "--model", str(path),
                                  "--img-size", "32", "--mode", "head")  # fmt: skip
    assert status == 0, err
    assert "a new head for 10 classes, in place of the 3 released outputs" in out
    kept, header = load_model(next((tmp_path / "results").glob("*/best.safetensors")))
    assert type(kept).__name__ == "SwinTransformer"
    assert header["preprocess"]["img_size"] == 32
    assert "--pretrained" not in run_script("finetune_swin.py", tmp_path, "--help")[1]
