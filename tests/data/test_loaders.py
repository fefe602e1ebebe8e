"""Batches: what is refused, and how they reach the device."""

import dataclasses
from pathlib import Path

import pytest
import torch
from sample_data import says, two_classes

from lab.core import UserError
from lab.data import Augmentation, Loaders, Preprocess, load_data
from lab.data.augment import to_device

LAB_DATA = Path(__file__).resolve().parents[2] / "lab" / "data"


def test_color_images_for_a_grayscale_model_are_refused_with_a_remedy(tmp_path):
    data = load_data(str(two_classes(tmp_path / "pets")))
    with pytest.raises(UserError) as error:
        Loaders(data, Preprocess(12, [0.5], [0.5]), 4, Augmentation())
    says(error, "images of pets have 3 channels", "takes 1", "WEIGHTS", "color or grayscale")


def test_grayscale_images_fit_every_model():
    data = load_data("digits")
    for channels in (1, 3):
        preprocess = Preprocess(8, [0.5] * channels, [0.5] * channels)
        images, _ = next(Loaders(data, preprocess, 4, Augmentation()).train(1))
        assert images.shape == (4, channels, 8, 8)


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
    loaders = Loaders(data, Preprocess(8, [0.5], [0.5]), 64, Augmentation())
    with pytest.raises(UserError, match="use 63"):
        loaders.to(torch.device("cpu"), 0, 3)
    assert Loaders(dataclasses.replace(data), loaders.preprocess, 10**6, Augmentation()).steps == 1
