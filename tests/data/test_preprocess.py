"""Images are prepared for a pretrained model as timm prepares them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.v2.functional import center_crop

from lab.core import UserError
from lab.data import Augmentation, Loaders, Preprocess, load_data
from lab.data.images import Reading, read_image
from tests.finetuning.small import gray_loaders


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def test_grayscale_images_are_repeated_for_three_channels(data):
    images, _ = next(gray_loaders(data).train(1))
    assert images.shape[1:] == (3, 8, 8)
    assert images[:, 0].equal(images[:, 2])
    colour = dataclasses.replace(data.train, store=data.train.store.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="3 channels, but the model expects 1"):
        Loaders(dataclasses.replace(data, train=colour), Preprocess(8, [0.3], [0.4]), 8,
                Augmentation())  # fmt: skip


@pytest.mark.parametrize(("crop_pct", "method"), [(0.9, "bicubic"), (0.875, "bilinear"),
                                                  (1.0, "bicubic")])  # fmt: skip
def test_photograph_is_prepared_as_in_timm(crop_pct, method, tmp_path):
    smooth = F.interpolate(torch.rand(1, 3, 20, 20), (300, 300), mode="bicubic").clamp(0, 1)
    image = Image.fromarray((smooth[0] * 255).byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "x.png")
    to = Preprocess(96, [0.5] * 3, [0.5] * 3, crop_pct, method)
    pixels, _ = read_image(tmp_path / "x.png", Reading(to.resized, method))
    ours = (to.center_crop(torch.from_numpy(pixels.copy())[None]) - 0.5) / 0.5
    theirs = create_transform(96, mean=to.mean, std=to.std, crop_pct=crop_pct,
                              interpolation=method)(image)  # fmt: skip
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("margin", [1, 2, 3, 5])
def test_center_crop_equals_torchvisions_for_odd_margins(margin):
    side = 10 + margin
    images = torch.arange(side**2).to(torch.uint8).reshape(1, 1, side, side)
    cropped = Preprocess(10, [0.5], [0.5], crop_pct=10 / side).center_crop(images)
    assert torch.equal(cropped, center_crop(images, [10, 10]) / 255)
