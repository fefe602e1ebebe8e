"""Reading one image: equal to torchvision and Pillow for every mode, size and orientation."""

import numpy as np
import pytest
from PIL import Image
from sample_data import noise, noise_image, reference

from lab.data.images import Reading, read_image


def test_rgb_images_equal_torchvision_resize_and_center_crop(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(60):  # portrait and landscape, odd and even, larger and smaller
        width, height, size = (int(n) for n in rng.integers(4, 90, 3))
        image = noise_image(width, height, seed)
        image.save(tmp_path / "x.png")
        ours, original = read_image(tmp_path / "x.png", Reading(size))
        assert (ours == reference(image, size)).all(), (width, height, size)
        assert ours.dtype == np.uint8
        assert original == (width, height)


def test_jpeg_photograph_equals_torchvision_exactly(tmp_path):
    noise_image(301, 203).save(tmp_path / "x.jpg", quality=90)
    with Image.open(tmp_path / "x.jpg") as image:
        assert (read_image(tmp_path / "x.jpg", Reading(64))[0] == reference(image, 64)).all()


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("L", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("P", "png"), ("P", "gif"),
     ("1", "png"), ("1", "tif"), ("YCbCr", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "ppm")],
)  # fmt: skip
def test_modes_without_transparency_equal_pillow_conversion(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    noise_image(31, 22).convert(mode).save(path)
    with Image.open(path) as image:
        assert (read_image(path, Reading(16))[0] == reference(image, 16)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_become_white_and_the_others_stay(tmp_path, mode):
    alpha = np.full((16, 16), 255, dtype=np.uint8)
    alpha[:, 8:] = 0
    image = noise_image(16, 16).convert("L" if mode == "LA" else "RGB")
    path = tmp_path / ("x.tif" if mode == "PA" else "x.png")
    if mode == "P":
        index = np.where(alpha == 0, 0, noise(16, 16, channels=1) % 3 + 1).astype(np.uint8)
        indexed = Image.fromarray(index, "P")
        indexed.putpalette([9, 9, 9, 200, 10, 20, 30, 90, 40, 5, 6, 250])
        image = indexed.convert("RGB")
        indexed.save(path, transparency=0)
    elif mode == "PA":
        image = image.convert("P")
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    else:
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[:, 8:] = 255
    assert (read_image(path, Reading(16))[0] == expected.transpose(2, 0, 1)).all()


def test_partial_transparency_is_blended_with_white(tmp_path):
    rgba = np.dstack([noise(16, 16), noise(16, 16, 1, channels=1)])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    difference = read_image(tmp_path / "x.png", Reading(16))[0] - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1


def gray(array):
    """A gray image (H, W) in [0, 1] as uint8 (3, H, W)."""
    return np.broadcast_to(np.rint(255 * array).astype(np.uint8), (3, *array.shape))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("highest", [65535, 4095, 255])
def test_16_bit_images_keep_their_range(tmp_path, ending, highest):
    values = np.linspace(0, highest, 256).astype(np.uint16).reshape(16, 16)
    path = tmp_path / f"x.{ending}"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode == "I;16"
        assert np.asarray(image.convert("RGB")).mean() > 100  # Pillow clips to white
    assert (read_image(path, Reading(16))[0] == gray(values / 65535)).all()


@pytest.mark.parametrize("white", [255, 65535, 2**30])
def test_32_bit_integer_images_keep_their_range(tmp_path, white):
    values = np.linspace(0, white, 256).astype(np.int32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert (read_image(tmp_path / "x.tif", Reading(16))[0] == gray(values / white)).all()


@pytest.mark.parametrize(("low", "white"), [(0, 1), (0, 255), (0, 65535), (-1, 1), (-1000, 3000)])
def test_float_images_keep_their_range(tmp_path, low, white):
    values = np.linspace(low, white, 256).astype(np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected = gray((values.astype(np.float64) - low) / (white - low))
    assert (read_image(tmp_path / "x.tif", Reading(16))[0] == expected).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_high_bit_depth_images_stay_in_range(tmp_path, dtype, value):
    Image.fromarray(np.full((8, 8), value, dtype)).save(tmp_path / "x.tif")
    expected = {np.uint16: 0, np.int32: value, np.float32: 255 * value}[dtype]
    assert (read_image(tmp_path / "x.tif", Reading(8))[0] == expected).all()


TURNS = Image.Transpose
UPRIGHT = {  # EXIF orientation (EXIF 2.3, tag 0x0112) -> the transpose that undoes it
    1: None, 2: TURNS.FLIP_LEFT_RIGHT, 3: TURNS.ROTATE_180, 4: TURNS.FLIP_TOP_BOTTOM,
    5: TURNS.TRANSPOSE, 6: TURNS.ROTATE_270, 7: TURNS.TRANSVERSE, 8: TURNS.ROTATE_90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_every_exif_orientation_is_applied(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    noise_image(40, 24).save(path, exif=exif)
    turn = UPRIGHT[orientation]
    with Image.open(path) as stored:
        upright = stored.transpose(turn) if turn is not None else stored
        assert (read_image(path, Reading(16))[0] == reference(upright, 16)).all()


def test_broken_exif_does_not_make_an_image_unreadable(tmp_path):
    noise_image(24, 24).save(tmp_path / "x.png")
    noise_image(24, 24).save(tmp_path / "y.png", exif=b"Exif\0\0garbage")
    ours = [read_image(tmp_path / name, Reading(16))[0] for name in ("x.png", "y.png")]
    assert (ours[0] == ours[1]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (3, 50), (2, 3)])
def test_tiny_images_are_enlarged_like_torchvision(tmp_path, shape):
    image = noise_image(*shape)
    image.save(tmp_path / "x.png")
    ours, original = read_image(tmp_path / "x.png", Reading(16))
    assert (ours == reference(image, 16)).all()
    assert original == shape


def test_a_whole_image_is_squeezed_into_a_square(tmp_path):
    image = noise_image(50, 20)
    image.save(tmp_path / "x.png")
    ours, original = read_image(tmp_path / "x.png", Reading(16, whole=True))
    assert (ours.transpose(1, 2, 0) == np.asarray(image.resize((16, 16), Image.BICUBIC))).all()
    assert original == (50, 20)


def test_one_pixel_strip_needs_little_memory(tmp_path):
    """Resizing it to a height of 256 pixels first would take 12 GB."""
    Image.new("RGB", (60_000, 1), (7, 80, 9)).save(tmp_path / "x.png")
    ours, original = read_image(tmp_path / "x.png", Reading(256))
    assert (ours == np.array([7, 80, 9])[:, None, None]).all()
    assert original == (60_000, 1)
