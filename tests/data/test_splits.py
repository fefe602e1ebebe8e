"""Splits, channel statistics and fingerprints."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import torch
from sample_data import make_folder, noise_image, two_classes
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from lab.core import UserError
from lab.data import datasets, make_mnist_5k
from lab.data.datasets import load_data
from lab.data.splits import Split


def labelled(counts, seed=0):
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(
        np.arange(len(counts)), counts)))  # fmt: skip
    store = torch.arange(len(labels))[:, None, None, None].to(torch.uint8)
    return datasets.full_split(store, labels, [str(i) for i in range(len(labels))])


def test_stratified_split_is_stratified_disjoint_and_complete():
    rng = np.random.default_rng(0)
    for seed in range(100):
        counts = rng.integers(2, 40, rng.integers(2, 12))
        share = rng.uniform(0.01, 0.99)
        split = labelled(counts, seed)
        kept, away = datasets.stratified_split(split, share, [str(i) for i in range(len(counts))])
        assert sorted(kept.rows.tolist() + away.rows.tolist()) == list(range(counts.sum()))
        for part in (kept, away):
            assert part.labels.equal(split.labels[part.rows])
            assert part.names == [str(row) for row in part.rows.tolist()]
            assert part.labels.unique().numel() == len(counts)  # every class in both
        wanted = (share * counts).clip(1, counts - 1)
        assert np.abs(away.labels.bincount().numpy() - wanted).max() <= 0.5


def test_splits_neither_depend_on_global_seeds_nor_change_them():
    prints = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        prints.add(load_data("digits").summary()["fingerprint"])
        assert torch.get_rng_state().equal(before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert len(prints) == 1


def test_test_split_does_not_depend_on_val_fraction(tmp_path):
    make_folder(tmp_path, {"train/cat": 20, "train/dog": 31})
    for dataset in ("digits", str(tmp_path)):
        tests = [load_data(dataset, val_fraction=share).test.names for share in (0.1, 0.3, 0.9)]
        assert tests[0] == tests[1] == tests[2]


def test_existing_splits_are_used_and_missing_ones_come_from_train(tmp_path):
    root = two_classes(tmp_path, train=10, others=3)
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [20, 6, 6]
    assert {name.split("/")[0] for name in loaded.val.names} == {"val"}
    assert loaded.remarks == []
    shutil.rmtree(root / "val")
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [18, 2, 6]
    assert {name.split("/")[0] for name in loaded.val.names} == {"train"}
    assert loaded.remarks == ["no folder val/: a fixed part of train/ is used instead"]
    shutil.rmtree(root / "test")
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [14, 2, 4]
    assert len({*loaded.train.names, *loaded.val.names, *loaded.test.names}) == 20


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_val_fraction_outside_zero_to_one_is_refused(share):
    with pytest.raises(UserError, match="VAL_FRACTION"):
        load_data("digits", val_fraction=share)


def test_image_size_must_be_positive():
    with pytest.raises(UserError, match="IMG_SIZE"):
        load_data("pets", size=0)


def test_digits_equal_scikit_learn_up_to_scale():
    loaded, bunch = load_data("digits"), load_digits()
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [1295, 143, 359]
    seen = []
    for part in (loaded.train, loaded.val, loaded.test):
        rows = [int(name) for name in part.names]
        expected = np.rint(bunch.images[rows] * 255 / 16)
        assert (part.images(slice(None))[:, 0].numpy() == expected).all()
        assert (part.labels.numpy() == bunch.target[rows]).all()
        assert part.images(slice(None)).dtype == torch.uint8
        seen += rows
    assert sorted(seen) == list(range(1797))
    assert loaded.classes == [str(c) for c in bunch.target_names]


def test_mnist_5k_is_the_published_file_with_a_fixed_test_split():
    with np.load(make_mnist_5k.TARGET) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert content == make_mnist_5k.CONTENT_SHA256
    assert make_mnist_5k.TARGET.stat().st_size < 10**6
    seen = []
    for fraction in (0.1, 0.3):
        loaded = load_data("mnist-5k", val_fraction=fraction)
        for part in (loaded.train, loaded.val, loaded.test):
            rows = [int(name) for name in part.names]
            assert (part.images(slice(None))[:, 0].numpy() == images[rows]).all()
            assert (part.labels.numpy() == labels[rows]).all()
        assert loaded.test.labels.bincount().tolist() == [100] * 10
        assert loaded.val.labels.bincount().tolist() == [round(400 * fraction)] * 10
        assert len(loaded.train) + len(loaded.val) == 4000
        seen.append(loaded.test.names)
    assert seen[0] == seen[1]
    assert loaded.classes == list("0123456789")
    assert datasets.native_size("mnist-5k") == 28


def test_mnist_5k_holds_handwritten_digits():
    """A linear model on raw pixels, trained on 3,600 images, reaches about 84 %."""
    loaded = load_data("mnist-5k")
    (x, y), (test_x, test_y) = (
        (part.images(slice(None)).flatten(1).numpy() / 255, part.labels.numpy())
        for part in (loaded.train, loaded.test)
    )
    assert 0.8 < RidgeClassifier(10).fit(x, y).score(test_x, test_y) < 0.9


def test_handwritten_digits_are_kinds_of_their_own():
    kinds = {name: datasets.dataset_kind(name) for name in datasets.DATASETS}
    assert kinds == {"mnist-5k": "mnist-5k", "mnist": "mnist-5k", "digits": "digits",
                     "fashion-mnist": "small", "cifar10": "small", "cifar100": "small",
                     "pets": "photographs"}  # fmt: skip


def test_channel_statistics_equal_numpy(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(90):
            noise_image(12, 12, number).point(lambda v: v // 2).save(
                tmp_path / "train" / name / f"{number}.png"
            )
    for dataset in ("digits", str(tmp_path)):
        loaded = load_data(dataset)
        values = loaded.train.images(slice(None)).numpy() / 255
        np.testing.assert_allclose(loaded.mean, values.mean((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(loaded.std, values.std((0, 2, 3)), rtol=1e-6)


def test_channel_statistics_of_many_images_use_an_evenly_spaced_sample():
    store = torch.arange(25_000).remainder(250).to(torch.uint8)[:, None, None, None]
    split = datasets.full_split(store, torch.zeros(25_000, dtype=torch.int64), [""] * 25_000)
    mean, std = datasets.channel_statistics(split)
    values = store[::3].numpy() / 255
    assert mean == pytest.approx([values.mean()])
    assert std == pytest.approx([values.std()])


def test_the_fingerprint_changes_with_a_pixel_a_label_or_a_class_name_only():
    loaded = load_data("digits")
    first = loaded.summary()["fingerprint"]
    assert load_data("digits").summary()["fingerprint"] == first
    assert (
        dataclasses.replace(loaded, name="other", mean=[0], remarks=["x"]).summary()["fingerprint"]
        == first
    )
    prints = {first}
    for split in ("train", "val", "test"):
        part = getattr(loaded, split)
        for index in (0, len(part) - 1):
            store, labels = part.store.clone(), part.labels.clone()
            store[part.rows[index], 0, 7, 7] ^= 1
            labels[index] = (labels[index] + 1) % 10
            for changed in (Split(store, part.rows, part.labels, part.names),
                            Split(part.store, part.rows, labels, part.names)):  # fmt: skip
                prints.add(dataclasses.replace(loaded, **{split: changed}).summary()["fingerprint"])
    renamed = dataclasses.replace(loaded, classes=[*loaded.classes[:9], "nine"])
    prints.add(renamed.summary()["fingerprint"])
    assert len(prints) == 1 + 3 * 2 * 2 + 1


def test_splits_are_the_same_in_every_version():
    """Recorded results are comparable only if nobody changes the seed of the splits."""
    data = load_data("digits")
    assert data.val.rows[:6].tolist() == [12, 30, 42, 47, 49, 52]
    assert data.test.rows[:6].tolist() == [1, 11, 18, 19, 20, 21]
