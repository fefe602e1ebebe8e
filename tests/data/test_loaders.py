"""Batches: what is refused, and how they reach the device."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_data import says, two_classes

from lab.core import UserError
from lab.data import Augmentation, Loaders, Preprocess, load_data
from lab.data.augment import to_device

LAB_DATA = Path(__file__).resolve().parents[2] / "lab" / "data"


def test_color_images_for_a_grayscale_model_are_refused_with_a_remedy(tmp_path):
    data = load_data(str(two_classes(tmp_path / "pets")))
    with pytest.raises(UserError) as error:
        Loaders(data, Preprocess(12, [0.5], [0.5]), 4, Augmentation())
    says(error, "images of pets have 3 channels", "expects 1", "PRETRAINED or MODEL")


def test_grayscale_images_fit_every_model():
    data = load_data("digits")
    for channels in (1, 3):
        preprocess = Preprocess(8, [0.5] * channels, [0.5] * channels)
        images, _ = next(Loaders(data, preprocess, 4, Augmentation()).train(1))
        assert images.shape == (4, channels, 8, 8)


@pytest.fixture
def photographs(tmp_path):
    """Wide photographs, with whole images of 72 pixels for crops to 64 pixels; gray by column."""
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(6):
            columns = np.tile(np.linspace(0, 255, 200), (100, 1)).astype(np.uint8)
            Image.fromarray(columns).save(tmp_path / "train" / name / f"{number}.png")
    return load_data(str(tmp_path), size=80, crop_size=72)


def test_training_crops_see_the_ends_of_photographs_but_evaluation_does_not(photographs):
    preprocess = Preprocess(64, [0.0] * 3, [1.0] * 3, 0.8)
    crops = Augmentation(rrc_min_area=0.3)
    loaders = Loaders(photographs, preprocess, 4, crops)
    seen = torch.cat([images for epoch in range(10) for images, _ in loaders.train(epoch)])
    assert seen.min() < 0.1  # the central square has the columns from 0.25 to 0.75
    assert seen.max() > 0.9
    views = torch.cat([images for _, images, _ in loaders.evaluation("train", view=1)])
    assert views.min() < 0.2
    for augmentation, split in ((crops, "train"), (crops, "val"), (Augmentation(), "train")):
        loaders = Loaders(photographs, preprocess, 4, augmentation)
        images = torch.cat([images for _, images, _ in loaders.evaluation(split)])
        assert images.min() > 0.25
        assert images.max() < 0.75


def test_whole_photographs_belong_to_the_images_and_labels_of_their_split(photographs):
    train = photographs.train
    assert train.whole.store.shape[-1] == 72
    assert train.whole.rows.equal(train.rows)
    assert train.whole.labels.equal(train.labels)
    assert train.whole.names == train.names
    assert train.whole.aspect_ratios.tolist() == [2.0] * 12
    assert photographs.val.names == photographs.val.whole.names


def test_random_numbers_of_a_step_do_not_depend_on_the_number_of_processes():
    data = load_data("digits")
    preprocess = Preprocess(8, [0.5], [0.5])
    whole = Loaders(data, preprocess, 12, Augmentation(), seed=3).batch_rng(2, 5, 12).uniform()
    parts = []
    for rank in range(3):
        loaders = Loaders(data, preprocess, 12, Augmentation(), seed=3)
        loaders.to(torch.device("cpu"), rank, 3)
        parts.append(loaders.batch_rng(2, 5, 4).uniform())
    assert torch.cat(parts).equal(whole)
    seeds = {loaders.step_seed(epoch, step) for epoch in (1, 2) for step in (1, 2)}
    assert len(seeds) == 4


@pytest.mark.parametrize(("device", "asynchronous"), [("cuda", True), ("cuda:1", True),
                                                      ("mps", False), ("cpu", False)])  # fmt: skip
def test_copies_are_asynchronous_on_cuda_only(device, asynchronous):
    """On MPS the source may be freed before it is read."""
    copies = []

    class Recorded:
        def to(self, device, non_blocking=False):
            copies.append((str(device), non_blocking))

    to_device(Recorded(), torch.device(device))
    assert copies == [(device, asynchronous)]


def test_no_other_copy_is_asynchronous():
    found = {path.name: path.read_text(encoding="utf-8").count("non_blocking")
             for path in LAB_DATA.glob("*.py")}  # fmt: skip
    assert {name for name, count in found.items() if count} == {"augment.py"}
    assert found["augment.py"] == 1


def test_a_batch_size_that_makes_no_sense_is_refused(tmp_path):
    data = load_data("digits")
    with pytest.raises(UserError, match="BATCH_SIZE=0"):
        Loaders(data, Preprocess(8, [0.5], [0.5]), 0, Augmentation())
    with pytest.raises(UserError, match=r"CROP_PADDING=9 is larger than the images \(8 pixels\)"):
        Loaders(data, Preprocess(8, [0.5], [0.5]), 64, Augmentation(crop_padding=9))
    loaders = Loaders(data, Preprocess(8, [0.5], [0.5]), 64, Augmentation())
    with pytest.raises(UserError, match="use 63"):
        loaders.to(torch.device("cpu"), 0, 3)
    assert Loaders(dataclasses.replace(data), loaders.preprocess, 10**6, Augmentation()).steps == 1
