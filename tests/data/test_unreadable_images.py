"""Images that cannot be read stop a run or are left out, and are named either way."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_data import noise_image, says, two_classes

from lab.core import UserError
from lab.data import cache, images
from lab.data.datasets import load_data

NO_IMAGES = ("text.jpg", "zero.jpg", "folder.jpg", "cut.jpg", "cut.png", "gone.png", "nan.tif")


def add_broken(folder):
    """One of each of NO_IMAGES."""
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.jpg").touch()
    (folder / "folder.jpg").mkdir()
    for ending, kind in (("jpg", "JPEG"), ("png", "PNG")):
        file = io.BytesIO()
        noise_image(64, 64).save(file, kind)
        (folder / f"cut.{ending}").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (folder / "gone.png").symlink_to("nowhere.png")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tif")


def test_unreadable_images_are_named_together_and_stop_the_run(tmp_path):
    root = two_classes(tmp_path)
    add_broken(root / "train" / "cat")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError) as error:
            load_data(str(root))
        says(error, f"{len(NO_IMAGES)} of 15 images", "--skip-unreadable")
        says(error, *(root / "train" / "cat" / name for name in NO_IMAGES))
        assert str(error.value).count("text.jpg") == 1  # the path is not repeated


def test_skipped_images_are_named_and_other_images_keep_their_labels(tmp_path):
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
        assert [remark.split(":")[0] for remark in left_out] == [
            f"unreadable images skipped ({len(NO_IMAGES)})"
        ] * 2
        assert all(name in remark for name in NO_IMAGES for remark in left_out)


def test_skipping_uses_the_cache_and_not_skipping_still_stops(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    add_broken(root / "train" / "cat")
    with pytest.raises(UserError):
        load_data(str(root))
    load_data(str(root), skip_unreadable=True)  # val and test are decoded here
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode_into", None)
        load_data(str(root), skip_unreadable=True)
    with pytest.raises(UserError, match="cannot be read"):
        load_data(str(root))


def test_image_that_becomes_readable_again_is_read(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    with monkeypatch.context() as patch:  # like a network drive that is briefly unavailable
        patch.setattr(images, "_to_rgb", lambda _: os.stat("no/such/drive"))
        with pytest.raises(UserError, match="8 of 8 images cannot be read"):
            load_data(str(root))
    assert len(load_data(str(root)).train) == 8


def test_long_list_of_unreadable_images_is_abbreviated_but_counted(tmp_path):
    root = two_classes(tmp_path)
    for number in range(30):
        (root / "train" / "cat" / f"bad{number:02}.jpg").touch()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "30 of 38", "bad09.jpg", "... and 20 more")
    assert "bad10.jpg" not in str(error.value)


@pytest.mark.parametrize("given", [True, False], ids=["splits given", "splits carved"])
def test_class_without_readable_images_is_refused_even_when_skipping(tmp_path, given):
    root = two_classes(tmp_path)
    if not given:
        shutil.rmtree(root / "val")
        shutil.rmtree(root / "test")
    for path in (root / "train" / "dog").iterdir():
        path.write_text("broken")
    with pytest.raises(UserError, match="no training image of dog could be read"):
        load_data(str(root), skip_unreadable=True)


def test_split_without_readable_images_is_refused_even_when_skipping(tmp_path):
    root = two_classes(tmp_path)
    for path in (root / "val").glob("*/*"):
        path.write_text("broken")
    with pytest.raises(UserError, match="no val image of"):
        load_data(str(root), skip_unreadable=True)


def test_decompression_bomb_is_named_and_not_decoded(tmp_path, monkeypatch):
    root = two_classes(tmp_path)
    noise_image(90, 90).save(root / "train" / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 9", "bomb.png", "more than 2,000 pixels")


def test_tiny_images_of_a_folder_are_noted(tmp_path):
    root = two_classes(tmp_path)
    noise_image(1, 9).save(root / "train" / "cat" / "strip.png")
    assert (
        "images under 4 pixels enlarged (1): strip.png (1x9 pixels)" in load_data(str(root)).remarks
    )
