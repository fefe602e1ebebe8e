"""Data: what is read, refused, split, kept and fetched, against torchvision, Pillow and numpy."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import socket
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms

from lab.core.errors import UserError
from lab.data import cache, datasets, images
from lab.data.datasets import Split, load_data
from lab.data.images import Reading, read_image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BICUBIC = transforms.InterpolationMode.BICUBIC


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """No test writes to the real user's cache, asks a proxy, or sees another's seed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "user-cache"


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(width=12, height=12, seed=0):
    return Image.fromarray(noise(width, height, seed))


def reference(image, size):
    """What torchvision's own transforms make of an image that Pillow has opened."""
    crop = transforms.Compose([transforms.Resize(size, BICUBIC), transforms.CenterCrop(size)])
    return np.asarray(crop(image.convert("RGB"))).transpose(2, 0, 1)


def make_folder(root, counts):
    """`counts`: "train/cat" -> images. Their left half is filled with the class, then the number;
    12 x 12 pixels are kept as they are, so both can be read back."""
    shades = {name: 10 * i for i, name in enumerate(sorted({Path(key).name for key in counts}))}
    for key, count in counts.items():
        (root / key).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = np.full((12, 12, 3), shades[Path(key).name], dtype=np.uint8)
            image[:, 6:] = number
            Image.fromarray(image).save(root / key / f"{number:03}.png")
    return root


def two_classes(root, train=4, others=2):
    return make_folder(
        root,
        {f"{s}/{c}": n for s, n in (("train", train), ("val", others), ("test", others))
         for c in ("cat", "dog")},
    )  # fmt: skip


def says(error, *parts):
    for part in parts:
        assert str(part) in str(error.value), f"{part!r} is not in: {error.value}"


def pixels(dataset):
    return [part.images(slice(None)) for part in (dataset.train, dataset.val, dataset.test)]


# --- One image ---


def test_rgb_images_equal_torchvisions_resize_and_center_crop(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(60):  # portrait and landscape, odd and even, larger and smaller
        width, height, size = (int(n) for n in rng.integers(4, 90, 3))
        image = picture(width, height, seed)
        image.save(tmp_path / "x.png")
        ours, remark = read_image(tmp_path / "x.png", Reading(size))
        assert (ours == reference(image, size)).all(), (width, height, size)
        assert ours.dtype == np.uint8
        assert remark is None


def test_a_jpeg_photograph_equals_torchvisions_bit_by_bit(tmp_path):
    picture(301, 203).save(tmp_path / "x.jpg", quality=90)
    with Image.open(tmp_path / "x.jpg") as image:
        assert (read_image(tmp_path / "x.jpg", Reading(64))[0] == reference(image, 64)).all()


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("L", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("P", "png"), ("P", "gif"),
     ("1", "png"), ("1", "tif"), ("YCbCr", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "ppm")],
)  # fmt: skip
def test_other_modes_without_transparency_equal_pillows_conversion(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    picture(31, 22).convert(mode).save(path)
    with Image.open(path) as image:
        assert (read_image(path, Reading(16))[0] == reference(image, 16)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_become_white_and_the_others_stay(tmp_path, mode):
    alpha = np.full((16, 16), 255, dtype=np.uint8)
    alpha[:, 8:] = 0
    image = picture(16, 16).convert("L" if mode == "LA" else "RGB")
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


def test_half_transparency_is_mixed_with_white(tmp_path):
    rgba = np.dstack([noise(16, 16), noise(16, 16, 1, channels=1)])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    difference = read_image(tmp_path / "x.png", Reading(16))[0] - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1


def gray(array):
    """An expected gray image (H, W), in shares of white, as uint8 (3, H, W)."""
    return np.broadcast_to(np.rint(255 * array).astype(np.uint8), (3, *array.shape))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_keep_their_range(tmp_path, ending):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = tmp_path / f"x.{ending}"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode == "I;16"
        assert np.asarray(image.convert("RGB")).mean() > 250  # convert alone clips to white
    assert (read_image(path, Reading(16))[0] == gray(values / 65535)).all()


@pytest.mark.parametrize("white", [255, 65535, 2**30])
def test_integers_of_32_bits_keep_their_range(tmp_path, white):
    values = np.linspace(0, white, 256).astype(np.int32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert (read_image(tmp_path / "x.tif", Reading(16))[0] == gray(values / white)).all()


@pytest.mark.parametrize(("low", "white"), [(0, 1), (0, 255), (0, 65535), (-1, 1), (-1000, 3000)])
def test_floats_keep_their_range(tmp_path, low, white):
    values = np.linspace(low, white, 256).astype(np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected = gray((values.astype(np.float64) - low) / (white - low))
    assert (read_image(tmp_path / "x.tif", Reading(16))[0] == expected).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_images_of_many_bits_stay_in_range(tmp_path, dtype, value):
    Image.fromarray(np.full((8, 8), value, dtype)).save(tmp_path / "x.tif")
    expected = 255 if value and dtype == np.float32 else value
    assert (read_image(tmp_path / "x.tif", Reading(8))[0] == expected).all()


TURNS = Image.Transpose
UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright (EXIF 2.3, tag 0x0112)
    1: None, 2: TURNS.FLIP_LEFT_RIGHT, 3: TURNS.ROTATE_180, 4: TURNS.FLIP_TOP_BOTTOM,
    5: TURNS.TRANSPOSE, 6: TURNS.ROTATE_270, 7: TURNS.TRANSVERSE, 8: TURNS.ROTATE_90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    picture(40, 24).save(path, exif=exif)
    turn = UPRIGHT[orientation]
    with Image.open(path) as stored:
        upright = stored.transpose(turn) if turn is not None else stored
        assert (read_image(path, Reading(16))[0] == reference(upright, 16)).all()


def test_broken_exif_does_not_make_an_image_unreadable(tmp_path):
    picture(24, 24).save(tmp_path / "x.png")
    picture(24, 24).save(tmp_path / "y.png", exif=b"Exif\0\0garbage")
    ours = [read_image(tmp_path / name, Reading(16))[0] for name in ("x.png", "y.png")]
    assert (ours[0] == ours[1]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (3, 50), (2, 3)])
def test_tiny_images_are_enlarged_as_by_torchvision_and_named(tmp_path, shape):
    image = picture(*shape)
    image.save(tmp_path / "x.png")
    ours, remark = read_image(tmp_path / "x.png", Reading(16))
    assert (ours == reference(image, 16)).all()
    assert remark == f"{shape[0]}x{shape[1]} pixels"


def test_a_strip_of_one_pixel_does_not_become_a_wall_of_memory(tmp_path):
    Image.new("RGB", (60_000, 1), (7, 80, 9)).save(tmp_path / "x.png")
    ours, remark = read_image(tmp_path / "x.png", Reading(256))  # 60,000 x 256 rows would be 12 GB
    assert (ours == np.array([7, 80, 9])[:, None, None]).all()
    assert remark == "60000x1 pixels"


# --- Images that cannot be read ---

NO_IMAGES = ("text.jpg", "zero.jpg", "folder.jpg", "cut.jpg", "cut.png", "gone.png", "nan.tif")


def add_broken(folder):
    """One of each of NO_IMAGES."""
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.jpg").touch()
    (folder / "folder.jpg").mkdir()
    for ending, kind in (("jpg", "JPEG"), ("png", "PNG")):
        file = io.BytesIO()
        picture(64, 64).save(file, kind)
        (folder / f"cut.{ending}").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (folder / "gone.png").symlink_to("nowhere.png")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tif")


def test_unreadable_images_are_named_together_and_stop_the_run(tmp_path):
    root = two_classes(tmp_path)
    add_broken(root / "train" / "cat")
    for _ in range(2):  # the second time from what the first one kept
        with pytest.raises(UserError) as error:
            load_data(str(root))
        says(error, f"{len(NO_IMAGES)} of 15 images", "--skip-unreadable")
        says(error, *(root / "train" / "cat" / name for name in NO_IMAGES))
        assert str(error.value).count("text.jpg") == 1  # no path twice in a line


def test_skipped_images_are_named_and_the_labels_of_the_others_stay_theirs(tmp_path):
    root = two_classes(tmp_path)
    add_broken(root / "train" / "cat")
    add_broken(root / "test" / "dog")
    for _ in range(2):
        loaded = load_data(str(root), skip_unreadable=True)
        assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [8, 4, 4]
        for part in (loaded.train, loaded.val, loaded.test):
            assert part.images(slice(None))[:, 0, 0, 0].tolist() == (10 * part.labels).tolist()
            for name, label in zip(part.names, part.labels.tolist(), strict=True):
                assert Path(name).parent.name == ("cat", "dog")[label]
        left_out = [remark for remark in loaded.remarks if "unreadable" in remark]
        assert [remark.split()[0] for remark in left_out] == [str(len(NO_IMAGES))] * 2
        assert all(name in remark for name in NO_IMAGES for remark in left_out)


def test_skipping_does_not_decode_again_and_not_skipping_still_stops(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    add_broken(root / "train" / "cat")
    with pytest.raises(UserError):
        load_data(str(root))
    load_data(str(root), skip_unreadable=True)  # val and test are decoded here
    with monkeypatch.context() as patch:
        patch.setattr(cache, "fill", None)
        load_data(str(root), skip_unreadable=True)
    with pytest.raises(UserError, match="cannot be read"):
        load_data(str(root))


def test_an_image_that_becomes_readable_again_is_read(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    with monkeypatch.context() as patch:  # as on a network drive that hangs for a moment
        patch.setattr(images, "to_rgb", lambda _: os.stat("no/such/drive"))
        with pytest.raises(UserError, match="8 of 8 images cannot be read"):
            load_data(str(root))
    assert len(load_data(str(root)).train) == 8


def test_a_long_list_of_unreadable_images_is_cut_but_counted(tmp_path):
    root = two_classes(tmp_path)
    for number in range(30):
        (root / "train" / "cat" / f"bad{number:02}.jpg").touch()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "30 of 38", "bad09.jpg", "... and 20 more")
    assert "bad10.jpg" not in str(error.value)


@pytest.mark.parametrize("given", [True, False], ids=["splits given", "splits carved"])
def test_a_class_whose_images_are_all_unreadable_is_an_error_even_when_skipping(tmp_path, given):
    root = two_classes(tmp_path)
    if not given:
        shutil.rmtree(root / "val")
        shutil.rmtree(root / "test")
    for path in (root / "train" / "dog").iterdir():
        path.write_text("broken")
    with pytest.raises(UserError, match="no training image of dog could be read"):
        load_data(str(root), skip_unreadable=True)


def test_a_split_whose_images_are_all_unreadable_is_an_error_even_when_skipping(tmp_path):
    root = two_classes(tmp_path)
    for path in (root / "val").glob("*/*"):
        path.write_text("broken")
    with pytest.raises(UserError, match="no val image of"):
        load_data(str(root), skip_unreadable=True)


def test_a_decompression_bomb_is_named_and_not_decoded(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    picture(90, 90).save(root / "train" / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 9", "bomb.png", "decompression bomb")


def test_tiny_images_of_a_folder_are_named_in_a_remark(tmp_path):
    root = two_classes(tmp_path)
    picture(1, 9).save(root / "train" / "cat" / "strip.png")
    assert (
        "1 images under 4 pixels enlarged: strip.png (1x9 pixels)" in load_data(str(root)).remarks
    )


# --- Folders ---


def test_files_that_are_no_images_and_hidden_ones_are_counted_and_named(tmp_path):
    root = two_classes(tmp_path)
    cat = root / "train" / "cat"
    (cat / "notes.txt").touch()
    (cat / "._000.png").touch()
    (root / "train" / ".DS_Store").touch()
    picture().save(root / "train" / "loose.png")
    (cat / ".ipynb_checkpoints").mkdir()
    picture().save(cat / ".ipynb_checkpoints" / "copy.png")  # would be a second copy
    (root / "train" / ".git").mkdir()
    loaded = load_data(str(root))
    assert len(loaded.train) == 8
    assert loaded.classes == ["cat", "dog"]
    (remark,) = loaded.remarks
    assert remark.startswith("6 files left out")
    for name in ("notes.txt", "._000.png", ".DS_Store", "loose.png", ".ipynb_checkpoints", ".git"):
        assert name in remark


def test_an_empty_class_is_an_error_that_names_it(tmp_path):
    root = two_classes(tmp_path)
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "phone.heic").touch()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "no images", "emu", ".jpg")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks_is_an_error_that_names_it(tmp_path, split):
    root = two_classes(tmp_path)
    make_folder(root, {f"{split}/emu": 1})
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, root / split, "emu", "add them to train/")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_missing_from_a_given_split_is_remarked(tmp_path, split):
    root = two_classes(tmp_path)
    shutil.rmtree(root / split / "dog")
    loaded = load_data(str(root))
    assert loaded.remarks == [f"no {split} images of dog: not scored there"]


@pytest.mark.parametrize(("count", "given"), [(1, "none"), (2, "none"), (1, "test"), (1, "val")])
def test_a_class_too_small_to_be_split_is_an_error_that_names_it(tmp_path, count, given):
    root = make_folder(tmp_path, {"train/cat": 9, "train/emu": count, "train/dog": 9})
    if given != "none":
        make_folder(root, {f"{given}/{name}": 1 for name in ("cat", "dog", "emu")})
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "emu", "too few", "Add some")


def test_a_class_with_one_image_is_fine_where_all_splits_are_given(tmp_path):
    root = two_classes(tmp_path)
    make_folder(root, {f"{split}/emu": 1 for split in ("train", "val", "test")})
    loaded = load_data(str(root))
    assert loaded.train.labels.bincount().tolist() == [4, 4, 1]


def test_a_folder_without_train_says_what_it_holds_and_where_images_go(tmp_path):
    make_folder(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(error, "no folder train/", "cat/, dog/", tmp_path / "train", "<class>/*.jpg")


@pytest.mark.parametrize("name", ["no/such/folder", "CIFAR10", "imagenet"])
def test_a_dataset_that_is_neither_folder_nor_name_lists_the_names(name):
    for load in (load_data, datasets.native_size):
        with pytest.raises(UserError) as error:
            load(name)
        says(error, repr(name), *datasets.DATASETS, "train/<class>/")


def test_a_file_as_dataset_is_refused(tmp_path):
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match="neither a folder nor one of"):
        load_data(str(tmp_path / "x.zip"))


@pytest.mark.parametrize("classes", [0, 1])
def test_a_train_folder_needs_two_classes(tmp_path, classes):
    (tmp_path / "train").mkdir()
    make_folder(tmp_path, {f"train/class{i}": 3 for i in range(classes)})
    picture().save(tmp_path / "train" / "loose.png")
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(error, f"{classes} class folder", "two or more")


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_split_folder_is_an_error(tmp_path, split):
    root = two_classes(tmp_path)
    shutil.rmtree(root / split)
    (root / split).mkdir()
    with pytest.raises(UserError, match=f"{split} of .* holds no images"):
        load_data(str(root))


def test_spaces_unicode_upper_case_and_nested_folders_work(tmp_path):
    root = tmp_path / "my photos ü"
    make_folder(root, {"train/große Katze": 3, "train/犬": 3})
    nested = root / "train" / "犬" / "2024" / "a b.c"
    nested.mkdir(parents=True)
    picture(seed=1).save(nested / "ÄÖ 1.PNG")
    picture(seed=2).save(nested / "x.JPeG")
    loaded = load_data(str(root))
    assert loaded.classes == ["große Katze", "犬"]
    assert loaded.name == "my photos ü"
    every = loaded.train.names + loaded.val.names + loaded.test.names
    assert len(every) == 8
    assert "train/犬/2024/a b.c/ÄÖ 1.PNG" in every


def test_names_lead_from_the_folder_to_the_image(tmp_path):
    root = two_classes(tmp_path)
    loaded = load_data(str(root))
    for part in (loaded.train, loaded.val, loaded.test):
        for name, image in zip(part.names, part.images(slice(None)), strict=True):
            assert (read_image(root / name, Reading(12))[0] == image.numpy()).all()


def test_names_that_are_not_unicode_can_be_printed_and_written(tmp_path):
    root = two_classes(tmp_path / "data")
    cat = os.fsencode(root / "train" / "cat")
    try:
        os.rename(cat + b"/000.png", cat + b"/\xff\xfe.png")
        os.mkdir(os.fsencode(root) + b"/train/\xe9mu")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    picture().save(Path(os.fsdecode(os.fsencode(root) + b"/train/\xe9mu/x.png")))
    Path(os.fsdecode(cat + b"/\xff.jpg")).touch()
    Path(os.fsdecode(cat + b"/\xff.txt")).touch()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 10", "?.jpg")
    str(error.value).encode()
    os.rename(root, os.fsencode(tmp_path) + b"/d\xffta")
    loaded = load_data(os.fsdecode(os.fsencode(tmp_path) + b"/d\xffta"), skip_unreadable=True)
    assert loaded.classes == ["cat", "dog", "?mu"]
    assert "train/cat/??.png" in loaded.train.names
    "".join([*loaded.train.names, *loaded.classes, *loaded.remarks, loaded.name]).encode()


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = two_classes(tmp_path / "data")
    make_folder(tmp_path / "elsewhere", {"emu": 3})
    (root / "train" / "emu").symlink_to(tmp_path / "elsewhere" / "emu")
    (root / "train" / "cat" / "link.png").symlink_to(tmp_path / "elsewhere" / "emu" / "000.png")
    (root / "train" / "cat" / "back").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "up").symlink_to(root / "train")
    make_folder(root / "train" / "cat", {"more": 1})
    (root / "train" / "cat" / "more" / "again").symlink_to(root / "train" / "cat" / "more")
    loaded = load_data(str(root))
    assert loaded.train.labels.bincount().tolist() == [6, 4, 3]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    iterdir = Path.iterdir

    def locked(path):
        if path.name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(UserError, match="dog cannot be listed: Permission denied"):
        load_data(str(root))


@pytest.mark.parametrize(("sides", "expected"), [([12] * 9, 12), ([30, 31, 45], 32), ([64], 64),
                                                 ([65], None), ([300, 20, 400], None)])  # fmt: skip
def test_the_native_size_is_the_typical_shorter_side_or_none_for_photographs(
    tmp_path, sides, expected
):
    for number, side in enumerate(sides):
        folder = tmp_path / "train" / str(number)
        folder.mkdir(parents=True)
        (folder / "broken.jpg").touch()
        picture(side + 40, side).save(folder / "x.png")
    assert datasets.native_size(str(tmp_path)) == expected


def test_photographs_are_kept_an_eighth_larger_than_the_model_takes(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            picture(100, 80, number).save(tmp_path / "train" / name / f"{number}.png")
    assert load_data(str(tmp_path), size=64).train.store.shape[1:] == (3, 64, 64)


# --- The cache ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder that has been loaded once, and a counter of the images decoded since then."""
    root = two_classes(tmp_path / "data")
    first = load_data(str(root))
    decoded = []
    read = images.read_image
    monkeypatch.setattr(cache, "read_image", lambda *args: decoded.append(args) or read(*args))
    return root, first, decoded


def same(left, right):
    """Equal pixels and labels in every split."""
    return left.summary()["fingerprint"] == right.summary()["fingerprint"]


def test_a_second_load_decodes_nothing_and_gives_the_same(cached):
    root, first, decoded = cached
    assert same(load_data(str(root)), first)
    assert decoded == []


def test_the_cache_is_also_that_of_the_relative_path_and_of_the_moved_folder(
    cached, tmp_path, monkeypatch
):
    root, first, decoded = cached
    monkeypatch.chdir(root.parent)
    assert same(load_data("data"), first)
    assert same(load_data("data/../data/"), first)
    shutil.move(root, tmp_path / "elsewhere")
    assert same(load_data(str(tmp_path / "elsewhere")), first)
    assert decoded == []


def test_another_size_has_a_cache_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            picture(100, 80, number).save(tmp_path / "train" / name / f"{number}.png")
    for size in (32, 64, 32):
        load_data(str(tmp_path), size=size)
    kept = sorted(path.name for path in (tmp_path / "vit-lab-cache").iterdir())
    assert kept == [
        f"train-{size}-bicubic.{ending}" for size in (32, 64) for ending in ("json", "npy")
    ]


def change(path):
    picture(seed=9).save(path)


def touch(path):
    os.utime(path, ns=(0, 0))


def add(path):
    picture(seed=9).save(path.with_name("new.png"))


def rename(path):
    path.rename(path.with_name("zzz.png"))


@pytest.mark.parametrize("edit", [change, touch, add, rename, Path.unlink])
def test_a_file_changed_touched_added_renamed_or_removed_is_noticed(cached, edit):
    root, first, decoded = cached
    edit(root / "train" / "cat" / "001.png")
    again = load_data(str(root))
    assert len(decoded) == len(again.train)  # train alone
    fresh = root.with_name("fresh")
    shutil.copytree(root, fresh, ignore=shutil.ignore_patterns("vit-lab-cache"))
    assert same(again, load_data(str(fresh)))
    assert same(again, first) == (edit is touch)


def test_a_file_of_another_size_is_noticed_though_its_time_is_the_same(cached):
    root, first, _ = cached
    path = root / "train" / "cat" / "001.png"
    time = path.stat().st_mtime_ns
    change(path)
    os.utime(path, ns=(time, time))
    assert not same(load_data(str(root)), first)


def test_a_new_name_is_noticed_though_sizes_and_times_are_the_same(tmp_path):
    root = two_classes(tmp_path)
    for path in root.glob("*/*/*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        os.utime(path.with_suffix(".bmp"), ns=(0, 0))
        path.unlink()
    load_data(str(root))
    cat = root / "train" / "cat"
    (cat / "000.bmp").rename(cat / "zzz.bmp")  # what was first is now last
    loaded = load_data(str(root)).train
    for name, image in zip(loaded.names, loaded.images(slice(None)), strict=True):
        assert (read_image(root / name, Reading(12))[0] == image.numpy()).all()


@pytest.mark.parametrize("ending", ["npy", "json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b"null", "half", "gone"])
def test_a_cache_that_is_broken_is_made_again(cached, ending, content):
    root, first, decoded = cached
    path = root / "vit-lab-cache" / f"train-12-bicubic.{ending}"
    whole = path.read_bytes()
    path.unlink()  # `first` still maps it: cut short in place, that would die of a bus error
    if content != "gone":
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8


def test_an_array_of_another_shape_is_not_trusted(cached):
    root, first, decoded = cached
    path = root / "vit-lab-cache" / "train-12-bicubic.npy"
    path.unlink()  # `first` still maps it
    np.save(path, np.zeros((7, 3, 12, 12), np.uint8))
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8


def test_an_unwritable_folder_is_cached_among_the_users_caches(tmp_path, monkeypatch, user_cache):
    root = two_classes(tmp_path / "data")
    (root / "vit-lab-cache").touch()  # a file where the folder would be: nobody can write there
    first = load_data(str(root))
    assert len(list(user_cache.rglob("*.npy"))) == 3
    monkeypatch.setattr(cache, "fill", None)
    assert same(load_data(str(root)), first)


def test_a_cache_in_a_folder_that_is_read_only_by_now_is_still_used(cached, monkeypatch):
    root, first, decoded = cached

    def read_only(dir):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", read_only)
    assert same(load_data(str(root)), first)
    assert decoded == []


def test_no_place_for_a_cache_is_an_error_that_says_what_to_set(tmp_path, user_cache):
    root = two_classes(tmp_path / "data")
    (root / "vit-lab-cache").touch()
    user_cache.touch()
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME"):
        load_data(str(root))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved here")
def test_a_full_disk_is_an_error_before_decoding(tmp_path, monkeypatch):
    root = two_classes(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(cache, "fill", None)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "No space left on device", root / "vit-lab-cache", "IMG_SIZE")
    assert list((root / "vit-lab-cache").iterdir()) == []


@pytest.mark.parametrize("before", [True, False], ids=["old cache", "no cache"])
def test_an_interrupted_decode_stops_at_once_and_leaves_nothing_that_is_trusted(
    tmp_path, monkeypatch, before
):
    root = two_classes(tmp_path / "data", train=200)
    if before:
        load_data(str(root))
        touch(root / "train" / "cat" / "000.png")
    read, calls = images.read_image, []

    def slow(path, size):
        calls.append(path)
        threading.Event().wait(0.002)
        return read(path, size)

    def interrupted(iterable, **_):
        for number, item in enumerate(iterable):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", slow)
        patch.setattr(cache, "tqdm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_data(str(root))
    assert len(calls) < 300
    left = {path.name for path in (root / "vit-lab-cache").iterdir()}
    assert "train-12.json" not in left
    assert not [name for name in left if "part" in name]
    again = load_data(str(root))
    assert (
        again.train.images(slice(None))[:, 0, 0, 0].tolist() == (10 * again.train.labels).tolist()
    )


def test_two_loads_at_the_same_time_both_succeed(tmp_path):
    root = two_classes(tmp_path, train=50)
    prints = []
    threads = [
        threading.Thread(
            target=lambda: prints.append(load_data(str(root)).summary()["fingerprint"])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prints) == 4
    assert len(set(prints)) == 1
    assert len(list((root / "vit-lab-cache").iterdir())) == 6


# --- Splits, statistics, fingerprint ---


def labelled(counts, seed=0):
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(
        np.arange(len(counts)), counts)))  # fmt: skip
    store = torch.arange(len(labels))[:, None, None, None].to(torch.uint8)
    return datasets.full_split(store, labels, [str(i) for i in range(len(labels))])


def test_a_carved_split_is_stratified_disjoint_and_complete():
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


def test_splits_do_not_depend_on_global_seeds_or_leave_traces_in_them():
    prints = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        prints.add(load_data("digits").summary()["fingerprint"])
        assert torch.get_rng_state().equal(before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert len(prints) == 1


def test_the_test_split_does_not_depend_on_the_share_of_validation(tmp_path):
    make_folder(tmp_path, {"train/cat": 20, "train/dog": 31})
    for dataset in ("digits", str(tmp_path)):
        tests = [load_data(dataset, val_fraction=share).test.names for share in (0.1, 0.3, 0.9)]
        assert tests[0] == tests[1] == tests[2]


def test_a_given_split_is_used_and_the_others_are_carved_out_of_train(tmp_path):
    root = two_classes(tmp_path, train=10, others=3)
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [20, 6, 6]
    assert {name.split("/")[0] for name in loaded.val.names} == {"val"}
    assert loaded.remarks == []
    shutil.rmtree(root / "val")
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [18, 2, 6]
    assert {name.split("/")[0] for name in loaded.val.names} == {"train"}
    assert loaded.remarks == ["no folder val/: a fixed share of train/ takes its place"]
    shutil.rmtree(root / "test")
    loaded = load_data(str(root))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [14, 2, 4]
    assert len({*loaded.train.names, *loaded.val.names, *loaded.test.names}) == 20


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_of_validation_outside_zero_to_one_is_refused(share):
    with pytest.raises(UserError, match="VAL_FRACTION"):
        load_data("digits", val_fraction=share)


def test_an_image_size_that_is_not_positive_is_refused():
    with pytest.raises(UserError, match="IMG_SIZE"):
        load_data("pets", size=0)


def test_digits_equal_scikit_learns_up_to_the_scale():
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


def test_channel_statistics_equal_numpys(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(90):
            picture(12, 12, number).point(lambda v: v // 2).save(
                tmp_path / "train" / name / f"{number}.png"
            )
    for dataset in ("digits", str(tmp_path)):
        loaded = load_data(dataset)
        values = loaded.train.images(slice(None)).numpy() / 255
        np.testing.assert_allclose(loaded.mean, values.mean((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(loaded.std, values.std((0, 2, 3)), rtol=1e-6)


def test_channel_statistics_of_many_images_come_from_an_even_sample():
    store = torch.arange(25_000).remainder(250).to(torch.uint8)[:, None, None, None]
    split = datasets.full_split(store, torch.zeros(25_000, dtype=torch.int64), [""] * 25_000)
    mean, std = datasets.channel_statistics(split)
    values = store[::3].numpy() / 255
    assert mean == pytest.approx([values.mean()])
    assert std == pytest.approx([values.std()])


def test_the_fingerprint_changes_with_one_pixel_or_label_and_only_then():
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
    assert len(prints) == 1 + 3 * 2 * 2


# --- Downloads, by torchvision's own code, from a server of ours ---


@pytest.fixture
def www(tmp_path):
    """A folder that is served, its address, and the paths asked for."""
    folder = tmp_path / "www"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port():
    """An address of this machine where nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return md5(path.read_bytes())


CIFARS = {"cifar10": ("CIFAR10", 10, 4), "cifar100": ("CIFAR100", 100, 3)}


def publish_cifar(folder, address, patch, dataset):
    """Puts a tiny archive in the official layout into `folder`; returns what it holds."""
    name, classes, each = CIFARS[dataset]  # `each`: images of a class in a file
    kind = getattr(torchvision.datasets, name)
    lists = {"train_list": kind.train_list, "test_list": kind.test_list}
    files, expected = {}, {}
    for which, entries in lists.items():
        checked, parts = [], []
        for seed, (name, _) in enumerate(entries):
            rng = np.random.default_rng([seed, len(which)])
            labels = rng.permutation(np.arange(classes).repeat(each)).tolist()
            rows = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            key = "labels" if dataset == "cifar10" else "fine_labels"
            content = pickle.dumps({"data": rows, key: labels})
            files[f"{kind.base_folder}/{name}"] = content
            checked.append([name, md5(content)])
            parts.append((rows.reshape(-1, 3, 32, 32), labels))
        patch.setattr(kind, which, checked)
        expected[which[:-5]] = [np.concatenate(part) for part in zip(*parts, strict=True)]
    meta = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    files[f"{kind.base_folder}/{kind.meta['filename']}"] = meta
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    patch.setattr(kind, "tgz_md5", archive(folder / kind.filename, files))
    patch.setattr(kind, "url", f"{address}/{kind.filename}")
    return expected


def publish_fashion(folder, address, patch, dataset="fashion-mnist"):
    kind, resources, expected = torchvision.datasets.FashionMNIST, [], {}
    for which, name in (("train", "train"), ("test", "t10k")):
        rng = np.random.default_rng(len(which))
        labels = rng.permutation(np.arange(10, dtype=np.uint8).repeat(12))
        rows = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        expected[which] = [rows[:, None], labels]
        for what, array in (("images-idx3", rows), ("labels-idx1", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            content = gzip.compress(head + array.tobytes())
            (folder / f"{name}-{what}-ubyte.gz").write_bytes(content)
            resources.append((f"{name}-{what}-ubyte.gz", md5(content)))
    patch.setattr(kind, "resources", resources)
    patch.setattr(kind, "mirrors", [f"{address}/"])
    return expected


BREEDS = ("Abyssinian", "american_bulldog", "Bengal")


def publish_pets(folder, address, patch, dataset="pets"):
    pictures, lists, expected = {}, {"trainval": [], "test": []}, {}
    for label, breed in enumerate(BREEDS):
        for number in range(16):
            file = io.BytesIO()
            Image.new("RGB", (90, 70), (80 * label, 5 * number, 0)).save(file, "JPEG", quality=95)
            pictures[f"images/{breed}_{number}.jpg"] = file.getvalue()
            which = "test" if number < 6 else "trainval"
            lists[which].append(f"{breed}_{number} {label + 1} 1 1")
            expected.setdefault(which, []).append(label)
    texts = {f"annotations/{n}.txt": "\n".join(lines).encode() for n, lines in lists.items()}
    texts["annotations/README"] = b"x"
    resources = [
        (f"{address}/{name}.tar.gz", archive(folder / f"{name}.tar.gz", files))
        for name, files in (("images", pictures), ("annotations", texts))
    ]
    patch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", resources)
    return expected


PUBLISH = {"cifar10": publish_cifar, "cifar100": publish_cifar,
           "fashion-mnist": publish_fashion, "pets": publish_pets}  # fmt: skip


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_small_dataset_is_downloaded_once_and_read_as_published(
    www, tmp_path, monkeypatch, dataset
):
    folder, address, asked = www
    expected = PUBLISH[dataset](folder, address, monkeypatch, dataset)
    loaded = load_data(dataset, str(tmp_path / "data"))
    assert asked
    asked.clear()
    loaded = load_data(dataset, str(tmp_path / "data"))
    assert asked == []
    for which, parts in (("train", (loaded.train, loaded.val)), ("test", (loaded.test,))):
        rows = torch.cat([part.rows for part in parts])
        assert rows.sort().values.tolist() == list(range(len(expected[which][1])))
        assert (torch.cat([p.images(slice(None)) for p in parts]).numpy()
                == expected[which][0][rows]).all()  # fmt: skip
        assert (torch.cat([p.labels for p in parts]).numpy() == expected[which][1][rows]).all()
    assert loaded.train.store.is_contiguous()
    classes = 100 if dataset == "cifar100" else 10
    assert len(loaded.classes) == classes
    of_a_class = len(expected["train"][1]) // classes
    assert loaded.val.labels.bincount().tolist() == [max(1, round(0.1 * of_a_class))] * classes


def test_pets_are_downloaded_once_and_keep_the_official_split(www, tmp_path, monkeypatch):
    folder, address, asked = www
    expected = publish_pets(folder, address, monkeypatch)
    monkeypatch.setattr(datasets, "OFFICIAL_PETS", {"trainval": 30, "test": 18})
    for _ in range(2):
        loaded = load_data("pets", str(tmp_path / "data"), size=64)
        assert loaded.test.labels.tolist() == expected["test"]
        assert [len(part) for part in (loaded.train, loaded.val)] == [27, 3]
        assert loaded.classes == ["Abyssinian", "American Bulldog", "Bengal"]
        assert loaded.remarks == []
        assert loaded.test.names[0] == "images/Abyssinian_0.jpg"
        for part in (loaded.train, loaded.val, loaded.test):
            red = part.images(slice(None))[:, 0].float().mean((1, 2))
            assert (red - 80 * part.labels).abs().max() < 3
    assert len([path for path in asked if path.startswith('"GET') or "images.tar" in path]) <= 4


def test_a_breed_that_only_the_test_list_lacks_stays_a_class(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    load_data("pets", str(tmp_path / "data"), size=64)
    listed = tmp_path / "data" / "oxford-iiit-pet" / "annotations" / "test.txt"
    listed.write_text("\n".join(listed.read_text().split("\n")[:12]))
    loaded = load_data("pets", str(tmp_path / "data"), size=64)
    assert loaded.classes == ["Abyssinian", "American Bulldog", "Bengal"]
    assert "no test images of Bengal: not scored there" in loaded.remarks


def test_a_home_folder_in_data_dir_is_expanded(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_data("pets", "~/data", size=64)
    assert (tmp_path / "home/data/oxford-iiit-pet/vit-lab-cache/train-64-bicubic.npy").exists()
    assert not (tmp_path / "~").exists()


def place_named_by(error):
    """Where a message says that fetched files go."""
    return Path(re.search(r"put that into (.*), packed", str(error.value))[1])


@pytest.mark.parametrize("trouble", ["no network", "404", "wrong checksum"])
@pytest.mark.parametrize("dataset", PUBLISH)
def test_a_failed_download_says_what_to_fetch_and_where_and_doing_so_works(
    www, tmp_path, monkeypatch, dataset, trouble
):
    folder, address, _ = www
    address = closed_port() if trouble == "no network" else address
    PUBLISH[dataset](folder, address, monkeypatch, dataset)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink() if trouble == "404" else path.write_bytes(b"someone's login page")
    with pytest.raises(UserError) as error:
        load_data(dataset, str(tmp_path / "data"), size=64)
    reason = {"no network": "refused", "404": "404", "wrong checksum": "corrupted"}[trouble]
    says(error, reason, *(f"{address}/{name}" for name in good))
    says(error, "python train.py --dataset digits")
    place = place_named_by(error)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in good.items():
        (place / name).write_bytes(content)
    shutil.rmtree(folder)  # nothing is served any more
    loaded = load_data(dataset, str(tmp_path / "data"), size=64)
    assert len(loaded.test) > 0


def test_an_interrupted_extraction_of_pets_is_reported_and_its_advice_works(
    www, tmp_path, monkeypatch
):
    folder, address, asked = www
    publish_pets(folder, address, monkeypatch)
    load = partial(load_data, "pets", str(tmp_path / "data"), size=64)
    base = tmp_path / "data" / "oxford-iiit-pet"
    first = load()
    for number in (3, 4):
        (base / "images" / f"Bengal_{number}.jpg").unlink()
    with pytest.raises(UserError) as error:
        load()
    says(error, "2 images are missing", "Bengal_3.jpg", "Bengal_4.jpg", base / "images", "Delete")
    shutil.rmtree(base / "images")
    asked.clear()
    assert same(load(), first)
    assert asked == []  # the archive was there


@pytest.mark.parametrize("lost", ["annotations", "annotations/trainval.txt"])
def test_pets_without_annotations_are_unpacked_again_or_reported(www, tmp_path, monkeypatch, lost):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    load = partial(load_data, "pets", str(tmp_path / "data"), size=64)
    base = tmp_path / "data" / "oxford-iiit-pet"
    first = load()
    if lost == "annotations":
        shutil.rmtree(base / lost)
    else:
        (base / lost).unlink()
        with pytest.raises(UserError) as error:
            load()
        says(error, "trainval.txt", base, "delete what is unpacked there")
        shutil.rmtree(base / "images")
        shutil.rmtree(base / "annotations")
    assert same(load(), first)


def test_pets_without_annotations_or_network_say_what_to_fetch(www, tmp_path, monkeypatch):
    folder, _, _ = www
    publish_pets(folder, closed_port(), monkeypatch)
    with tarfile.open(folder / "images.tar.gz") as tar:
        tar.extractall(tmp_path / "data" / "oxford-iiit-pet", filter="data")
    with pytest.raises(UserError) as error:
        load_data("pets", str(tmp_path / "data"), size=64)
    says(error, "annotations.tar.gz", "oxford-iiit-pet", "python train.py --dataset digits")


@pytest.mark.parametrize("damage", [b"", b"half"])
def test_unpacked_fashion_mnist_that_was_cut_short_is_reported(www, tmp_path, monkeypatch, damage):
    folder, address, _ = www
    publish_fashion(folder, address, monkeypatch)
    load = partial(load_data, "fashion-mnist", str(tmp_path / "data"))
    first = load()
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:999] if damage else b"")
    with pytest.raises(UserError) as error:
        load()
    says(error, raw, "delete what is unpacked there")
    path.unlink()
    assert same(load(), first)


def test_cifar_that_was_cut_short_is_unpacked_again(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_cifar(folder, address, monkeypatch, "cifar10")
    load = partial(load_data, "cifar10", str(tmp_path / "data"))
    first = load()
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    assert same(load(), first)


@pytest.mark.parametrize("lines", ["", "Abyssinian_0 1 1 1\nBengal_0 3 1 1\n", "Abyssinian_0 1"])
def test_pets_lists_that_make_no_sense_are_reported(www, tmp_path, monkeypatch, lines):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    load_data("pets", str(tmp_path / "data"), size=64)
    base = tmp_path / "data" / "oxford-iiit-pet"
    (base / "annotations" / "trainval.txt").write_text(lines)
    with pytest.raises(UserError) as error:
        load_data("pets", str(tmp_path / "data"), size=64)
    says(error, base)


# --- Real photographs, where they are at hand ---


def linked_pets(name, tmp_path):
    """A data folder that points to the shared photographs, so that nothing is written there."""
    theirs = SHARED / name / "oxford-iiit-pet"
    if not theirs.is_dir():
        pytest.skip(f"the photographs of {name} are not at hand")
    base = tmp_path / "oxford-iiit-pet"
    base.mkdir()
    for part in ("images", "annotations"):
        (base / part).symlink_to(theirs / part)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes", "classes"), [("pets-sample", (259, 111), 37), ("pets-3breeds", (300, 298), 3)]
)
def test_a_sample_of_pets_has_the_breeds_of_its_file_names(tmp_path, name, sizes, classes):
    loaded = load_data("pets", linked_pets(name, tmp_path), size=32)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == sizes
    assert len(loaded.classes) == classes
    assert f"not the official Pets: {sizes[0]} trainval images, not 3680" in loaded.remarks
    assert f"not the official Pets: {sizes[1]} test images, not 3669" in loaded.remarks
    for part in (loaded.train, loaded.val, loaded.test):
        for path, label in zip(part.names, part.labels.tolist(), strict=True):
            breed = Path(path).stem.rsplit("_", 1)[0].replace("_", " ").title()
            assert loaded.classes[label] == breed
        with Image.open(Path(tmp_path, "oxford-iiit-pet", part.names[0])) as image:
            assert (part.images(torch.tensor(0)).numpy() == reference(image, 32)).all()
