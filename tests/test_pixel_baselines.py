"""benchmarks.pixel_baselines: the split that decides, and the accuracies that it records."""

import json
import sys

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import pixel_baselines
from lab.core import UserError
from lab.data import load_data


def run(monkeypatch, place, *flags):
    monkeypatch.setattr(sys, "argv", ["pixel_baselines.py", "--out", str(place), *flags])
    pixel_baselines.main()
    (path,) = place.iterdir()
    return json.loads(path.read_text())


def test_both_classifiers_beat_a_nearest_neighbor_of_shuffled_labels(monkeypatch, tmp_path):
    record = run(monkeypatch, tmp_path, "--dataset", "digits")
    data = load_data("digits")
    (train, labels), (test, expected) = map(pixel_baselines.pixels, (data.train, data.test))
    assert train.min() == 0
    assert train.max() == 1
    shuffled = np.random.default_rng(0).permutation(labels)
    chance = KNeighborsClassifier(1).fit(train, shuffled).score(test, expected)
    nearest = KNeighborsClassifier(1).fit(train, labels).score(test, expected)
    svm, linear = record["models"]
    assert chance < 0.3 < 0.9 < linear["test_accuracy"] < svm["test_accuracy"]
    assert abs(svm["test_accuracy"] - nearest) < 0.03
    for row in record["models"]:
        low, high = row["test_accuracy_95"]
        assert low < row["test_accuracy"] < high
        assert row["test_images"] == len(expected)
        assert row["C"] in [model.C for model in pixel_baselines.MODELS[row["model"]]]


def test_photographs_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="DATASET='pets' consists of photographs"):
        run(monkeypatch, tmp_path, "--dataset", "pets")
