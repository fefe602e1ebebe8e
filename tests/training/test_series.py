"""Runs over seeds, on a share of the training images, and with TensorBoard."""

import random
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
import train
from lab.core import Run, UserError, constants
from lab.data.datasets import subsample
from lab.finetuning.comparison import row_of
from lab.training import config
from lab.training.results import TensorBoardLogger, each_seed, summarize_seeds

SMALL = ["--dataset", "digits", "--embed-dim", "16", "--depth", "1", "--num-heads", "1",
         "--epochs", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def constants_as_written(monkeypatch):
    """A command line changes a script's constants; the next test finds them as in the file."""
    for script in (train, finetune):
        for name in filter(str.isupper, list(vars(script))):
            monkeypatch.setattr(script, name, getattr(script, name))


def run(place, *words, script=train):
    """What the command line would do, in this process; the runs' folders by name."""
    argv = ["--results-dir", str(place), *words]
    if script is train:
        values = constants.override(train, [*SMALL, *argv])
        summarize_seeds([train.train(again, train.build) for again in each_seed(values)])
    else:
        finetune.run_modes(constants.override(finetune, argv), plain_only=True)
    return {folder.name: Run(folder) for folder in place.iterdir() if folder.is_dir()}


def weights(of):
    return load_file(of.folder / "best.safetensors")


def test_a_series_of_seeds_is_the_runs_that_each_seed_gives(tmp_path, capsys):
    series = run(tmp_path / "series", "--seed", "3", "--num-seeds", "2")
    said = capsys.readouterr().out
    alone = run(tmp_path / "alone", "--seed", "4")
    assert sorted(series) == ["digits-vit_16x1-s3", "digits-vit_16x1-s4"]
    one, other = weights(series["digits-vit_16x1-s4"]), weights(alone["digits-vit_16x1-s4"])
    assert all(torch.equal(one[key], other[key]) for key in one)
    first = weights(series["digits-vit_16x1-s3"])
    assert any(not torch.equal(one[key], first[key]) for key in one)
    percent = [100 * series[name].metrics()["test_accuracy"] for name in sorted(series)]
    assert f"over 2 seeds: mean {statistics.mean(percent):.2f} %" in said
    assert f"deviation {statistics.stdev(percent):.2f} percentage points" in said


def test_a_finished_series_is_not_trained_again_and_grows(tmp_path, capsys):
    run(tmp_path, "--num-seeds", "1")
    before = (tmp_path / "digits-vit_16x1-s0" / "history.csv").stat().st_mtime_ns
    runs = run(tmp_path, "--num-seeds", "2")
    assert "this run is finished" in capsys.readouterr().out
    assert (tmp_path / "digits-vit_16x1-s0" / "history.csv").stat().st_mtime_ns == before
    assert len(runs) == 2


def test_names_of_seeds_do_not_collide(tmp_path):
    assert sorted(run(tmp_path, "--num-seeds", "2", "--name", "mine")) == ["mine-s0", "mine-s1"]


def test_no_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="NUM_SEEDS=0 must be at least 1"):
        run(tmp_path, "--num-seeds", "0")


def test_modes_are_compared_by_mean_and_deviation_over_seeds(tmp_path):
    weights = Path(__file__).resolve().parents[2] / "weights" / "vit_64x4_mnist5k.safetensors"
    head = ["--pretrained", str(weights), "--dataset", "digits",
            "--data-dir", str(tmp_path / "data"), "--mode", "head", "--precision", "fp32",
            "--epochs", "1", "--learning-rate", "0.01", "--weight-decay", "0"]  # fmt: skip
    runs = run(tmp_path / "runs", *head, "--num-seeds", "2", script=finetune)
    accuracies = [100 * made.metrics()["test_accuracy"] for made in runs.values()]
    row = row_of(list(runs.values()))
    assert row["accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert row["high"] - row["accuracy"] == pytest.approx(statistics.stdev(accuracies))
    assert row_of([runs[min(runs)]])["error_bar"] == "95 % interval"


def test_shares_are_stratified_nested_and_repeated_evenly(data):
    rng = random.Random(1)
    shares = sorted(rng.uniform(0.005, 0.95) for _ in range(6))
    total = torch.bincount(data.train.labels)
    inside = set()
    for share in shares:
        part = subsample(data, share)
        rows, uses = part.train.rows.unique(return_counts=True)
        assert inside <= set(rows.tolist()) <= set(data.train.rows.tolist())
        inside = set(rows.tolist())
        assert len(part.train) == len(data.train)
        assert uses.max() - uses.min() <= 1
        labels = dict(zip(data.train.rows.tolist(), data.train.labels.tolist(), strict=True))
        count = torch.bincount(torch.tensor([labels[row] for row in inside]), minlength=10)
        assert (count >= 1).all()
        assert ((count - share * total).abs() <= 1).all()
        assert [labels[row] for row in part.train.rows.tolist()] == part.train.labels.tolist()
        assert part.val is data.val
        assert part.test is data.test


def test_a_share_knows_only_its_own_images(data):
    part = subsample(data, 0.01)
    pixels = data.train.store[part.train.rows.unique()].double() / 255
    assert part.mean[0] == pytest.approx(pixels.mean().item())
    assert part.std[0] == pytest.approx(pixels.std(correction=0).item())
    assert part.summary()["train_images"] == len(part.train.rows.unique()) == 10
    assert part.fingerprint != data.fingerprint


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(data, share):
    with pytest.raises(UserError, match="TRAIN_FRACTION"):
        subsample(data, share)


def test_the_whole_is_the_dataset_itself(data):
    assert subsample(data, 1.0) is data


def test_a_run_on_a_share_keeps_its_steps_and_says_so(tmp_path):
    (made,) = run(tmp_path, "--train-fraction", "0.1").values()
    assert made.folder.name == "digits-of0.1-vit_16x1-s0"
    whole = 20 * 64  # images in the full batches of an epoch of all 1,295
    assert [row["images"] for row in made.history()] == [whole, whole]
    assert made.config()["dataset"]["train_images"] == 129
    assert "129 of 1,295 training images" in made.config()["dataset"]["remarks"][0]


def test_tensorboard_shows_the_history(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (made,) = run(tmp_path, "--tensorboard").values()
    # As if the run had been killed in epoch 2 and had gone on.
    again = TensorBoardLogger(made.folder, 2)
    again.add(made.history()[1])
    events = accumulator.EventAccumulator(str(made.folder / "tensorboard")).Reload()
    for tag, column in (("loss/val", "val_loss"), ("accuracy/train", "train_accuracy")):
        points = events.Scalars(tag)
        assert [point.step for point in points] == [1, 2]
        wanted = [row[column] for row in made.history()]
        assert [point.value for point in points] == pytest.approx(wanted)
    assert {"learning_rate", "seconds"} <= {
        tag.partition("/")[2] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_that_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run(tmp_path, "--tensorboard")
    assert not tmp_path.exists() or not any(tmp_path.iterdir())
