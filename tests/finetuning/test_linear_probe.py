"""The linear probe: cached features give the head that training on images gives."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lab.core import UserError, runtime
from lab.core.checkpoints import load_weights
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.finetuning import cached_features, linear_probe, set_trainable, train_linear_probe
from lab.finetuning.linear_probe import FeatureCosts
from lab.models import load_model, profile_model
from lab.training import evaluation, fit
from lab.training.optimizers import adamw
from tests.finetuning.small import FP32, gray_loaders, open_run, vit


def features_of(model, loaders, place, views=0, weights="w", precision="no"):
    return cached_features(model, weights, loaders, views, place, precision)


def test_cached_features_give_the_weights_of_training_on_images(data, tmp_path):
    uncached = vit(1)
    set_trainable(uncached, "head", 0, 0)
    how = dataclasses.replace(FP32, clip_grad=1.0)
    run = open_run(tmp_path / "1", uncached, data)
    history = fit(uncached, adamw(uncached, 1e-2, 0.05), gray_loaders(data), how, run)

    cached = vit(1)
    set_trainable(cached, "head", 0, 0)
    loaders, costs = features_of(cached, gray_loaders(data), tmp_path)
    again = open_run(tmp_path / "2", cached, data)
    train_linear_probe(cached, loaders, how, again, ([1e-2], [0.05]), costs)
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


def test_sweep_tests_only_the_head_that_is_best_on_validation(data, tmp_path):
    model = vit(2)
    set_trainable(model, "head", 0, 0)
    loaders, _ = features_of(model, gray_loaders(data), tmp_path)
    run = open_run(tmp_path / "r", model, data)
    costs = FeatureCosts(seconds=7.0, peak_memory_mb=10**6, forward_passes=5)
    train_linear_probe(model, loaders, FP32, run, ([1e-4, 1e-1], [0.0, 0.5]), costs)
    metrics = run.metrics()
    sweep = metrics["sweep"]
    assert len(sweep) == 4
    assert sweep[metrics["chosen"]] == max(sweep.values()) == metrics["val_accuracy"]
    assert min(sweep.values()) < max(sweep.values())
    assert not list(run.folder.rglob("sweep/*/metrics.json"))
    assert not list(run.folder.rglob("sweep/*/predictions.csv"))
    assert metrics["training_seconds"] >= 7.0
    assert metrics["peak_memory_mb"] == 10**6
    head = profile_model(model.head, (32,))["training_flops"]
    images = 4 * sum(row["images"] for row in run.history())
    expected = 5 * 2 * profile_model(model, (3, 8, 8))["macs"] + images * head
    assert metrics["training_flops"] == expected
    # The checkpoint by itself gives the recorded accuracy.
    kept, preprocess, _ = load_model(run.folder)
    images = data.test.images(slice(None)).float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (preprocess.mean, preprocess.std))
    right = kept((images - mean) / std).argmax(1) == data.test.labels
    assert right.double().mean().item() == pytest.approx(metrics["test_accuracy"], abs=1e-6)


def test_features_are_computed_again_only_if_something_changes(data, tmp_path):
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


@pytest.mark.parametrize("views", [0, 2])
def test_features_of_repeated_images_are_computed_once(data, tmp_path, views):
    """Augmented views differ between the repetitions of an image, so they are all computed."""
    model, count = vit(), []
    model.patch_embed.register_forward_hook(lambda _, images, __: count.append(len(images[0])))
    few = datasets.subsample(data, 0.1)
    loaders, costs = features_of(model, gray_loaders(few), tmp_path, views)
    unique = len(few.train.rows.unique())
    assert unique < len(few.train) / 9
    passes = views * len(few.train) or unique
    assert costs.forward_passes == passes
    assert sum(count) == passes + len(few.val) + len(few.test)
    assert costs.peak_memory_mb > 0
    cached, again = features_of(model, gray_loaders(few), tmp_path, views)
    assert again == costs
    assert cached.features["train"].equal(loaders.features["train"])
    if not views:
        x = gray_loaders(few).normalize(few.train.images(slice(None)).expand(-1, 3, -1, -1))
        with torch.no_grad():
            expected = linear_probe.Backbone(model)(x)
        torch.testing.assert_close(loaders.features["train"][0], expected, atol=1e-4, rtol=1e-3)


def test_views_are_augmented_and_each_epoch_picks_among_them(data, tmp_path):
    model = vit()
    loaders, _ = features_of(model, gray_loaders(data, Augmentation(rotate=40)), tmp_path, views=3)
    views = loaders.features["train"]
    assert views.shape == (3, 1295, 32)
    assert (views[0] != views[1]).any(1).double().mean() > 0.95
    drawn = torch.cat([features for features, _ in loaders.train(1)])
    order = torch.cat(loaders.epoch_indices(1, 0))
    matches = (views[:, order] == drawn).all(2)  # (views, N)
    assert matches.any(0).all()
    assert (matches.double().mean(1) - 1 / 3).abs().max() < 0.06
    labels = torch.cat([labels for _, labels in loaders.train(1)])
    assert labels.equal(data.train.labels[order])


def test_features_depend_on_the_code(data, tmp_path, monkeypatch, capsys):
    model, loaders = vit(), gray_loaders(data)
    first, _ = features_of(model, loaders, tmp_path)
    assert "32 features per image, computed in" in capsys.readouterr().out
    again, _ = features_of(vit(5), loaders, tmp_path)
    assert "32 features per image, read from the cache" in capsys.readouterr().out
    assert again.features["test"].equal(first.features["test"])
    hashes = runtime.code_hashes(Path(linear_probe.__file__))
    assert {"model.py", "lab/data/augment.py"} <= hashes.keys()
    monkeypatch.setattr(runtime, "code_hashes", lambda *_: {"model.py": "edited"})
    other, _ = features_of(vit(5), loaders, tmp_path)
    assert "computed in" in capsys.readouterr().out
    assert not other.features["test"].equal(first.features["test"])


def test_views_depend_on_the_batch_size(data, tmp_path):
    model, turned = vit(), Augmentation(rotate=40)
    views = [
        features_of(model, gray_loaders(data, turned, size), tmp_path, views=1)[0].features["train"]
        for size in (64, 16, 64)
    ]
    assert not views[0].equal(views[1])
    assert views[0].equal(views[2])
    features_of(model, gray_loaders(data, batch_size=64), tmp_path)
    count = len(list(tmp_path.iterdir()))
    features_of(model, gray_loaders(data, batch_size=16), tmp_path)
    assert len(list(tmp_path.iterdir())) == count  # without augmentation it does not matter


class Interrupted(nn.Module):
    """A backbone that is interrupted instead of computing another batch."""

    def __init__(self, model, interrupt):
        super().__init__()
        self.model, self.interrupt, self.left = model, interrupt, 10**6

    def forward_features(self, images):
        if self.left == 0:
            self.interrupt()
            raise KeyboardInterrupt
        self.left -= 1
        return self.model.forward_features(images)

    def forward_head(self, features, pre_logits):
        return self.model.forward_head(features, pre_logits)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("views", [0, 2])
def test_interrupted_features_resume(data, tmp_path, monkeypatch, capsys, views, killed):
    """After Ctrl-C at the next batch; after a kill from what has been saved every minute."""
    place, left_by_kill = tmp_path / "interrupted", tmp_path / "killed"

    def interrupt():
        if killed:
            shutil.copytree(place, left_by_kill)

    if killed:
        monkeypatch.setattr(evaluation, "SAVE_SECONDS", -1)
    loaders, model = gray_loaders(data, Augmentation(rotate=20), 16), Interrupted(vit(), interrupt)
    left = model.left
    whole, _ = features_of(model, loaders, tmp_path / "whole", views)
    model.left = left - model.left - 2  # all batches but two
    with pytest.raises(KeyboardInterrupt):
        features_of(model, loaders, place, views)
    if killed:
        shutil.rmtree(place)
        left_by_kill.rename(place)
    capsys.readouterr()
    spent = sum(load_weights(path)[1]["seconds"] for path in place.glob("*.unfinished"))
    model.left = 2
    resumed, costs = features_of(model, loaders, place, views)
    assert model.left == 0
    assert costs.seconds > spent > 0
    assert "resuming after" in capsys.readouterr().out
    for split, features in whole.features.items():
        assert features.equal(resumed.features[split])
    assert [path.suffix for path in place.iterdir()] == [".safetensors"]


def test_too_little_memory_ends_with_advice(data, tmp_path):
    class Large(nn.Module):
        forward_head = None

        def forward_features(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"not enough memory.*BATCH_SIZE \(now 64\)"):
        features_of(Large(), gray_loaders(data), tmp_path)
