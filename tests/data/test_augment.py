"""lab/data/augment.py against torchvision, operation by operation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from lab.data import augment as A
from lab.data.augment import Augmentation, BatchRNG, augment
from lab.data.preprocess import Preprocess

SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(5)
BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(5, 13)


def sized(img_size):
    return Preprocess(img_size, [0.5], [0.5])


def affine(x, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return V.affine(
        x, angle, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR, center=center
    )


def degrees(m):
    return math.degrees(math.atan(0.99 * m))


# torchvision's TrivialAugmentWide: the operation at strength m in [0, 1], signed, on one image.
REFERENCES = {
    SHEAR_X: lambda x, m, s: affine(x, shear=(s * degrees(m), 0), center=[0, 0]),
    SHEAR_Y: lambda x, m, s: affine(x, shear=(0, s * degrees(m)), center=[0, 0]),
    TRANSLATE_X: lambda x, m, s: affine(x, translate=(int(s * int(32 * m)), 0)),
    TRANSLATE_Y: lambda x, m, s: affine(x, translate=(0, int(s * int(32 * m)))),
    ROTATE: lambda x, m, s: V.rotate(x, s * 135 * m, InterpolationMode.BILINEAR),
    BRIGHTNESS: lambda x, m, s: V.adjust_brightness(x, 1 + s * 0.99 * m),
    COLOR: lambda x, m, s: V.adjust_saturation(x, 1 + s * 0.99 * m),
    CONTRAST: lambda x, m, s: V.adjust_contrast(x, 1 + s * 0.99 * m),
    SHARPNESS: lambda x, m, s: V.adjust_sharpness(x, 1 + s * 0.99 * m),
    POSTERIZE: lambda x, m, s: V.posterize((x * 255).round().byte(), 8 - round(6 * m)) / 255,
    SOLARIZE: lambda x, m, s: V.solarize(x, 1 - m),
    AUTOCONTRAST: lambda x, m, s: V.autocontrast(x),
    EQUALIZE: lambda x, m, s: V.equalize(x),
}


MAGNITUDES = torch.tensor([0, 3, 10, 17, 29, 30]) / 30
SIGNS = torch.tensor([1.0, -1, 1, -1, 1, -1])


@pytest.mark.parametrize("number", REFERENCES)
@pytest.mark.parametrize("side", [16, 33])
def test_operation_matches_torchvision_image_by_image(number, side):
    torch.manual_seed(number)
    x = torch.randint(0, 256, (6, 3, side, side)) / 255
    ours = A._apply_operations(x, torch.full((6,), number), MAGNITUDES, SIGNS)
    for i in range(len(x)):
        m, sign = MAGNITUDES[i].item(), SIGNS[i].item()
        theirs = REFERENCES[number](x[i : i + 1], m, sign)
        torch.testing.assert_close(ours[i : i + 1], theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_batch_matches_torchvision_image_by_image(seed):
    """Operations that share a kernel do not disturb each other, and images keep their place."""
    torch.manual_seed(seed)
    count = (64, 5, 30, 1)[seed]
    x = torch.randint(0, 256, (count, 3, 16, 16)) / 255
    choice = torch.randint(14, (count,))
    m, sign = torch.randint(31, (count,)) / 30, torch.randint(2, (count,)) * 2.0 - 1
    ours = A._apply_operations(x, choice, m, sign)
    for i, number in enumerate(choice.tolist()):
        theirs = x[i : i + 1]
        if number in REFERENCES:
            theirs = REFERENCES[number](theirs, m[i].item(), sign[i].item())
        torch.testing.assert_close(ours[i : i + 1], theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_trivial_augment_uses_every_operation_and_keeps_the_range(channels):
    x = torch.rand(600, channels, 12, 12)
    out = A._trivial_augment(x, BatchRNG(0, 600))
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1
    same = (out == x).flatten(1).all(1).float().mean()
    assert 1 / 14 < same < 0.5  # the identity, and operations at strength zero
    turned = A._apply_operations(x[:1], torch.tensor([ROTATE]), torch.zeros(1), torch.ones(1))
    assert turned.allclose(x[:1], atol=1e-5)


def test_random_crop_and_flip_equal_torchvision_image_by_image():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    dx, dy = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 2, 2, 1, 0])
    flip = torch.tensor([True, False, True, False, False])
    ours = A._shift(images, 2, dx, dy, flip)
    padded = V.pad(images, [2, 2, 2, 2])
    for i in range(5):
        expected = V.crop(padded[i], int(dy[i]), int(dx[i]), 8, 8)
        expected = V.horizontal_flip(expected) if flip[i] else expected
        assert ours[i].equal(expected)


def test_resized_crop_matches_torchvision_on_whole_pixels():
    """A crop that needs no resizing is exact."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    top, left, side = 3, 5, 8  # the box of pixels [3, 11) x [5, 13)
    centre = [(2 * left + side) / 16 - 1, (2 * top + side) / 16 - 1]
    maps = torch.tensor([[[side / 16, 0, centre[0]], [0, side / 16, centre[1]]]])
    torch.testing.assert_close(
        A._warp(x, maps, side), V.crop(x, top, left, side, side), atol=1e-5, rtol=0
    )


def test_crop_boxes_stay_inside_and_have_the_requested_area():
    draw = BatchRNG(0, 2000)
    maps = A._crop_boxes(draw, 0.25, None)
    wide, high, x, y = maps[:, 0, 0], maps[:, 1, 1], maps[:, 0, 2], maps[:, 1, 2]
    assert (x.abs() + wide).max() <= 1 + 1e-6
    assert (y.abs() + high).max() <= 1 + 1e-6
    area = wide * high
    assert area.min() >= 0.18  # a clamped side can fall below a quarter
    assert area.max() <= 1
    assert (wide / high).log().abs().max() <= math.log(4 / 3) + 1e-5
    assert area.mean() == pytest.approx(0.6, abs=0.05)


def test_crops_of_whole_photographs_match_torchvisions_crops_of_the_originals(monkeypatch):
    """The stored image is squeezed into a square; the crops have the original's proportions."""
    pixels = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    photograph = F.interpolate(pixels, (360, 480), mode="bicubic").clamp(0, 1)
    size, how = 112, Augmentation(rrc_min_area=0.3)
    assert how.crop_size(size) == 205  # sqrt(0.3) of it are 112
    whole = V.resize((photograph * 255).byte(), [205, 205], antialias=True)
    rng = BatchRNG(0, 40)
    boxes = A._crop_boxes(BatchRNG(0, 40), 0.3, None, torch.full((40,), 480 / 360))
    ours = augment(whole.repeat(40, 1, 1, 1), sized(size), how, rng, torch.full((40,), 480 / 360))
    assert ours.shape == (40, 3, size, size)
    for crop, theta in zip(ours, boxes, strict=True):
        width, height = theta[0, 0] * 480, theta[1, 1] * 360
        left = (theta[0, 2] + 1) / 2 * 480 - width / 2
        top = (theta[1, 2] + 1) / 2 * 360 - height / 2
        box = [round(v.item()) for v in (top, left, height, width)]
        theirs = V.resized_crop(photograph, *box, [size, size], antialias=True)[0]
        assert (crop - theirs).abs().mean() < 0.006
        if theta[0, 0] < 1 and theta[1, 1] < 1:  # else a side was cut to fit
            assert 3 / 4 - 1e-5 <= width / height <= 4 / 3 + 1e-5
    left, right = (boxes[:, 0, 2] - boxes[:, 0, 0]).min(), (boxes[:, 0, 2] + boxes[:, 0, 0]).max()
    assert left < -0.9  # 0.75 would be the edge of the central square
    assert right > 0.9


def test_a_crop_that_shrinks_an_image_does_not_alias():
    """Stripes of one pixel become gray, not stripes of another width."""
    stripes = (torch.arange(40) % 2 * 255).byte().expand(1, 1, 40, 40)
    x = augment(stripes, sized(22), Augmentation(rrc_min_area=1.0), BatchRNG(3, 1))
    assert (x - 0.5).abs().max() < 0.3


def test_the_size_of_stored_photographs_is_bounded():
    assert Augmentation().crop_size(224) == 0
    assert Augmentation(rrc_min_area=1.0).crop_size(224) == 224
    assert Augmentation(rrc_min_area=0.3).crop_size(224) == 409
    assert Augmentation(rrc_min_area=0.08).crop_size(224) == 448


def test_random_erasing_erases_whole_rectangles_with_the_given_probability():
    x = torch.ones(2000, 3, 24, 24)
    draw = BatchRNG(0, 2000)
    out = A.erase(x, 0.25, draw)
    erased = (out == 0).all(1)  # (B, H, W), the same in every channel
    assert (out == 0).any(1).equal(erased)
    hit = erased.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.04)
    rows, columns = erased.any(2), erased.any(1)
    assert erased.equal(rows[:, :, None] & columns[:, None, :])
    share = erased[hit].float().mean((1, 2))
    assert share.min() > 0
    assert share.max() < 0.45


EVERYTHING = Augmentation(
    crop_padding=2, flip=True, rotate=10, scale=0.1, translate=0.5, auto_augment="trivial"
)
CROPPED = Augmentation(rrc_min_area=0.3, flip=True, auto_augment="trivial")


@pytest.mark.parametrize("how", [EVERYTHING, CROPPED])
def test_same_seed_gives_same_batch_and_images_get_different_parameters(how):
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).repeat(32, 1, 1, 1)
    first, again, other = (augment(images, sized(16), how, BatchRNG(s, 32)) for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert len(torch.unique(first, dim=0)) > 24


def test_augmentation_does_not_depend_on_the_number_of_processes():
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    together = augment(images, sized(16), EVERYTHING, BatchRNG(5, 12))
    shares = [
        augment(part, sized(16), EVERYTHING, BatchRNG(5, 4, rank=rank, world=3))
        for rank, part in enumerate(images.split(4))
    ]
    assert torch.cat(shares).allclose(together, atol=1e-6)


def test_rotation_scale_and_translation_match_torchvision_image_by_image(monkeypatch):
    """torchvision gets the same random parameters."""
    drawn = []

    class Spy(BatchRNG):
        def uniform(self, low=0.0, high=1.0):
            drawn.append(super().uniform(low, high))
            return drawn[-1]

    images = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    how = Augmentation(rotate=20, scale=0.2, translate=3)
    ours = augment(images, sized(16), how, Spy(0, 6))
    angle, scale, dx, dy = drawn
    for i in range(6):
        move = torch.tensor([dx[i], dy[i]]) * 8  # half of 16 pixels is 1 in coordinates
        # Both rotate and scale about the center. Ours then translates in the coordinates of the
        # input, torchvision in those of the output, so the translation is rotated back.
        turn = A._rotation(-angle[i : i + 1].deg2rad())[0, :, :2]
        x, y = (-(scale[i] * turn) @ move).tolist()
        theirs = V.affine(
            images[i : i + 1] / 255, -angle[i].item(), [x, y], scale[i].item(), [0.0, 0.0],
            InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(ours[i : i + 1], theirs, atol=2e-3, rtol=0)


def test_default_augmentation_changes_nothing():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert augment(images, sized(8), Augmentation(), BatchRNG(0, 4)).equal(images / 255)
    assert sized(8).center_crop(images).equal(images / 255)


def test_center_crop_matches_torchvision():
    images = torch.randint(0, 256, (2, 3, 37, 37), dtype=torch.uint8)
    kept = Preprocess(32, [0.5], [0.5], crop_pct=32 / 37).center_crop(images)
    assert kept.equal(V.center_crop(images, [32, 32]) / 255)
    for side, method in ((56, "bicubic"), (20, "bilinear")):
        to = Preprocess(side, [0.5], [0.5], crop_pct=0.875, interpolation=method)
        theirs = V.resize(images / 255, [to.resized], InterpolationMode(method), antialias=True)
        theirs = V.center_crop(theirs.clamp(0, 1), [side, side])
        torch.testing.assert_close(to.center_crop(images), theirs, atol=1e-6, rtol=0)


def test_half_of_the_images_are_flipped_and_only_on_request():
    images = torch.zeros(1000, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    draw = BatchRNG(0, 1000)
    flipped = augment(images, sized(4), Augmentation(flip=True), draw)[:, 0, 0, 3].mean()
    assert flipped.item() == pytest.approx(0.5, abs=0.06)
    cropped = augment(images, sized(4), Augmentation(rrc_min_area=1.0, flip=True), draw)
    assert 300 < (cropped[:, 0, 1, 3] > cropped[:, 0, 1, 0]).sum() < 700
    assert augment(images, sized(4), Augmentation(), draw).equal(images / 255)


def test_translation_reaches_its_limit_and_not_more():
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    preprocess = Preprocess(32, [0.5], [0.5])
    out = augment(images, preprocess, Augmentation(translate=4.0), BatchRNG(0, 400))
    columns = out.sum((1, 2))  # (B, W)
    moved = (columns * torch.arange(32)).sum(1) / columns.sum(1) - 16  # pixels
    assert 3.5 < moved.abs().max() <= 4.001
