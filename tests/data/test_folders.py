"""Folders of images: what is read, left out and refused."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_data import make_folder, noise_image, same, says, two_classes

from lab.core import UserError
from lab.data import Preprocess, datasets
from lab.data.datasets import load_data
from lab.data.images import Reading, read_image


def test_hidden_files_and_other_files_are_counted_and_named(tmp_path):
    root = two_classes(tmp_path)
    cat = root / "train" / "cat"
    (cat / "notes.txt").touch()
    (cat / "._000.png").touch()
    (root / "train" / ".DS_Store").touch()
    noise_image().save(root / "train" / "loose.png")
    (cat / ".ipynb_checkpoints").mkdir()
    noise_image().save(cat / ".ipynb_checkpoints" / "copy.png")  # would be a second copy
    (root / "train" / ".git").mkdir()
    loaded = load_data(str(root))
    assert len(loaded.train) == 8
    assert loaded.classes == ["cat", "dog"]
    (remark,) = loaded.remarks
    assert remark.startswith("files skipped (6;")
    for name in ("notes.txt", "._000.png", ".DS_Store", "loose.png", ".ipynb_checkpoints", ".git"):
        assert name in remark


def test_empty_class_is_refused_by_name(tmp_path):
    root = two_classes(tmp_path)
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "phone.heic").touch()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "no images", "emu", ".jpg")


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_missing_from_train_is_refused_by_name(tmp_path, split):
    root = two_classes(tmp_path)
    make_folder(root, {f"{split}/emu": 1})
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, root / split, "emu", "add them to train/")


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_missing_from_val_or_test_is_noted(tmp_path, split):
    root = two_classes(tmp_path)
    shutil.rmtree(root / split / "dog")
    loaded = load_data(str(root))
    assert loaded.remarks == [f"no {split} images of dog, so these are not evaluated"]


@pytest.mark.parametrize(("count", "given"), [(1, "none"), (2, "none"), (1, "test"), (1, "val")])
def test_class_too_small_to_split_is_refused_by_name(tmp_path, count, given):
    root = make_folder(tmp_path, {"train/cat": 9, "train/emu": count, "train/dog": 9})
    if given != "none":
        make_folder(root, {f"{given}/{name}": 1 for name in ("cat", "dog", "emu")})
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "emu", "only one image left for training", "Add some")


def test_class_with_one_image_is_accepted_if_all_splits_exist(tmp_path):
    root = two_classes(tmp_path)
    make_folder(root, {f"{split}/emu": 1 for split in ("train", "val", "test")})
    loaded = load_data(str(root))
    assert loaded.train.labels.bincount().tolist() == [4, 4, 1]


def test_class_folders_without_train_get_a_fixed_split_and_the_user_is_told(tmp_path):
    root = make_folder(tmp_path / "data", {"cat": 20, "dog": 10})
    (root / "README.txt").touch()
    parts = []
    for _ in range(2):
        loaded = load_data(str(root))
        parts.append([part.names for part in (loaded.train, loaded.val, loaded.test)])
        assert loaded.classes == ["cat", "dog"]
        assert [len(names) for names in parts[-1]] == [21, 3, 6]
        assert loaded.test.labels.bincount().tolist() == [4, 2]
        assert datasets.native_size(str(root)) == 12
        split, left_out = loaded.remarks
        assert split.startswith("no folder train/: each class is split into training, validation")
        assert "README.txt" in left_out
    assert parts[0] == parts[1]  # also with vit-lab-cache/ beside the classes
    same_images = make_folder(tmp_path / "other", {"train/cat": 20, "train/dog": 10})
    assert same(load_data(str(same_images)), loaded)


def test_loose_images_are_counted_and_the_message_says_how_to_arrange_them(tmp_path):
    for number in range(30):
        noise_image().save(tmp_path / f"{number}.jpg")
    for load in (load_data, datasets.native_size):
        with pytest.raises(UserError) as error:
            load(str(tmp_path))
        says(error, "30 images", tmp_path / "<class>", tmp_path / "train" / "<class>", "--images")


def test_unlabeled_test_images_are_not_called_missing(tmp_path):
    root = two_classes(tmp_path, train=10)
    shutil.rmtree(root / "test", ignore_errors=True)
    (root / "test").mkdir()
    noise_image().save(root / "test" / "1.jpg")
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "test contains 1 images, but no class folders", "predict.py --images")


def test_an_empty_folder_says_where_images_go(tmp_path):
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(error, "contains no images (no folders)", tmp_path / "<class>")


@pytest.mark.parametrize("name", ["Train", "TRAIN", "training", "seg_train", "training_set"])
def test_a_misnamed_training_folder_is_to_be_renamed(tmp_path, name):
    make_folder(tmp_path, {f"{name}/cat": 3, f"{name}/dog": 3})
    if (tmp_path / "train").is_dir():
        pytest.skip("this file system ignores case")
    with pytest.raises(UserError, match=f"rename {name}/ to train/"):
        load_data(str(tmp_path))


def test_a_class_whose_name_contains_train_is_a_class(tmp_path):
    make_folder(tmp_path, {"steam train": 3, "dog": 3})
    assert load_data(str(tmp_path)).classes == ["dog", "steam train"]


@pytest.mark.parametrize(("name", "split"), [("valid", "val"), ("Validation", "val"),
                                             ("testing", "test"),
                                             ("seg_test", "test")])  # fmt: skip
def test_a_misnamed_split_folder_is_named_in_a_remark(tmp_path, name, split):
    root = two_classes(tmp_path, train=10)
    (root / split).rename(root / name)
    assert load_data(str(root)).remarks == [
        f"no folder {split}/: a fixed part of train/ is used instead "
        f"(to use {name}/, rename it to {split}/)"
    ]


@pytest.mark.parametrize("split", ["val", "valid", "test"])
def test_other_splits_without_train_are_not_taken_for_classes(tmp_path, split):
    make_folder(tmp_path, {f"{split}/cat": 3, f"{split}/dog": 3})
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(error, "no folder train/", split, tmp_path / "train" / "<class>")


def test_classes_that_are_one_folder_too_deep_are_found(tmp_path):
    make_folder(tmp_path, {"train/images/cat": 3, "train/images/dog": 3})
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(
        error, "only the class folder images", "cat, dog", repr(str(tmp_path / "train" / "images"))
    )
    deeper = load_data(str(tmp_path / "train" / "images"))
    assert deeper.classes == ["cat", "dog"]


def test_folders_inside_of_class_folders_are_reported(tmp_path):
    root = two_classes(tmp_path)
    make_folder(root, {"train/cat/persian": 2, "train/cat/siamese": 2})
    loaded = load_data(str(root))
    assert loaded.train.labels.bincount().tolist() == [8, 4]
    (remark,) = loaded.remarks
    assert "cat/persian, cat/siamese" in remark
    assert "belong to the outer class" in remark


@pytest.mark.parametrize(("size", "cut"), [((80, 80), None), ((80, 60), None), ((99, 140), "29%"),
                                           ((160, 90), "44%")])  # fmt: skip
def test_a_crop_that_leaves_out_much_of_the_images_is_reported(tmp_path, size, cut):
    for name in ("cat", "dog"):
        for split in ("train", "val", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            noise_image(*size).save(tmp_path / split / name / "x.png")
    expected = [f"the center crop removes {cut} of a typical image"] if cut else []
    assert [remark.split(".")[0] for remark in load_data(str(tmp_path)).remarks] == expected


def test_every_way_to_write_a_folder_has_one_canonical_name(tmp_path, monkeypatch):
    root = two_classes(tmp_path / "my pets")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ("my pets", "my pets/", "./my pets", "link", "~/my pets", str(root), "link/../my pets")
    assert {datasets.canonical_name(way) for way in ways} == {str(root)}
    for name in (*datasets.DATASETS, "no/such/folder/"):
        assert datasets.canonical_name(name) == name


def test_names_with_control_characters_are_printed_without_them(tmp_path):
    names = {"\x1b[31mred\x07": "?[31mred?", "a\nb": "a?b", "\u202egnp": "?gnp"}
    names |= {name: name for name in ("\u0645\u06cc\u200c\u062e", "é 犬 👩\u200d🔬")}
    root = make_folder(tmp_path, {f"train/{name}": 3 for name in names})
    (root / "train" / "\x1b[2J.txt").touch()
    loaded = load_data(str(root))
    assert sorted(loaded.classes) == sorted(names.values())
    assert "train/?[2J.txt" in loaded.describe()
    assert "\x1b" not in loaded.describe() + "".join(loaded.train.names)


@pytest.mark.parametrize("name", ["no/such/folder", "CIFAR10", "imagenet", "x" * 5000])
def test_unknown_dataset_error_lists_the_names(name):
    for load in (load_data, datasets.native_size):
        with pytest.raises(UserError) as error:
            load(name)
        says(error, repr(name), *datasets.DATASETS, "train/<class>/")
        assert ("did you mean cifar10?" in str(error.value)) == (name == "CIFAR10")


def test_file_as_dataset_is_refused(tmp_path):
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match="neither a folder nor one of"):
        load_data(str(tmp_path / "x.zip"))


@pytest.mark.parametrize("classes", [0, 1])
def test_train_folder_needs_two_classes(tmp_path, classes):
    (tmp_path / "train").mkdir()
    make_folder(tmp_path, {f"train/class{i}": 3 for i in range(classes)})
    noise_image().save(tmp_path / "train" / "loose.png")
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path))
    says(error, ("no class folders", "only the class folder class0")[classes], "at least two")


@pytest.mark.parametrize("split", ["val", "test"])
def test_empty_split_folder_is_refused(tmp_path, split):
    root = two_classes(tmp_path)
    shutil.rmtree(root / split)
    (root / split).mkdir()
    with pytest.raises(UserError, match=f"{split} contains no images"):
        load_data(str(root))


def test_spaces_unicode_upper_case_and_nested_folders_work(tmp_path):
    root = tmp_path / "my photos ü"
    make_folder(root, {"train/große Katze": 3, "train/犬": 3})
    nested = root / "train" / "犬" / "2024" / "a b.c"
    nested.mkdir(parents=True)
    noise_image(seed=1).save(nested / "ÄÖ 1.PNG")
    noise_image(seed=2).save(nested / "x.JPeG")
    loaded = load_data(str(root))
    assert loaded.classes == ["große Katze", "犬"]
    assert loaded.name == "my photos ü"
    every = loaded.train.names + loaded.val.names + loaded.test.names
    assert len(every) == 8
    assert "train/犬/2024/a b.c/ÄÖ 1.PNG" in every


def test_image_names_are_paths_relative_to_the_folder(tmp_path):
    root = two_classes(tmp_path)
    loaded = load_data(str(root))
    for part in (loaded.train, loaded.val, loaded.test):
        for name, image in zip(part.names, part.images(slice(None)), strict=True):
            assert (read_image(root / name, Reading(12))[0] == image.numpy()).all()


def test_names_that_are_not_unicode_can_be_printed_and_encoded(tmp_path):
    root = two_classes(tmp_path / "data")
    cat = os.fsencode(root / "train" / "cat")
    try:
        os.rename(cat + b"/000.png", cat + b"/\xff\xfe.png")
        os.mkdir(os.fsencode(root) + b"/train/\xe9mu")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    noise_image().save(Path(os.fsdecode(os.fsencode(root) + b"/train/\xe9mu/x.png")))
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


def test_links_are_followed_except_cycles(tmp_path):
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
    assert len(datasets.image_files(f"'{root / 'train' / 'cat'}'")) == 6 + 4 + 3  # and in `up`
    assert len(datasets.image_files(f"'{root / 'train' / 'emu'}'")) == 3


@pytest.mark.parametrize("name", ["dog", "root", "train"])
def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, name):
    root = two_classes(tmp_path / "root")
    iterdir, is_dir = Path.iterdir, Path.is_dir

    def locked(method):
        def call(path):
            if path.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return method(path)

        return call

    monkeypatch.setattr(Path, "iterdir", locked(iterdir))
    if name == "train":  # the folder around it does not permit access
        monkeypatch.setattr(Path, "is_dir", locked(is_dir))
    if name == "root":
        (root / "train").rename(root / "training")
    with pytest.raises(UserError, match=rf"cannot list .*{name}: Permission denied"):
        load_data(str(root))


def test_many_files_may_be_named_at_once(tmp_path, monkeypatch):
    """All names together are longer than the name of a file may be."""
    monkeypatch.chdir(tmp_path)
    names = [f"{'a' * 20}-{number:03}.png" for number in range(200)]
    for name in names:
        noise_image().save(name)
    source = " ".join(names)
    assert list(datasets.image_files(source)) == [Path(name) for name in names]
    loaded = datasets.load_images(source, "data", Preprocess(12, [0.5] * 3, [0.5] * 3))
    assert loaded.name == "200-images"


@pytest.mark.parametrize(("sides", "expected"), [([12] * 9, 12), ([30, 31, 45], 32), ([64], 64),
                                                 ([65], None), ([300, 20, 400], None)])  # fmt: skip
def test_native_size_is_the_median_shorter_side_or_none_for_photographs(tmp_path, sides, expected):
    for number, side in enumerate(sides):
        folder = tmp_path / "train" / str(number)
        folder.mkdir(parents=True)
        (folder / "broken.jpg").touch()
        noise_image(side + 40, side).save(folder / "x.png")
    assert datasets.native_size(str(tmp_path)) == expected


def test_photographs_are_stored_at_the_requested_size(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise_image(100, 80, number).save(tmp_path / "train" / name / f"{number}.png")
    assert load_data(str(tmp_path), size=64).train.store.shape[1:] == (3, 64, 64)


@pytest.mark.parametrize(("highest", "noted"), [(4095, True), (9000, False)])
def test_16_bit_images_that_use_little_of_their_range_are_reported(tmp_path, highest, noted):
    root = two_classes(tmp_path)
    for name in ("cat", "dog"):
        values = np.linspace(0, highest, 144).astype(np.uint16).reshape(12, 12)
        Image.fromarray(values).save(root / "train" / name / "000.png")
    note = f"the 16-bit images use only values up to {highest:,} of 65,535"
    assert any(note in remark for remark in load_data(str(root)).remarks) == noted


@pytest.mark.parametrize(("largest", "size", "stored"), [
    (200, 224, 200), (200, 96, 96), (200, 40, 40), (200, 28, 40), (40, 224, 40),
])  # fmt: skip
def test_larger_images_among_small_ones_keep_their_detail(tmp_path, largest, size, stored):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number, side in enumerate((40, 40, 40, largest)):
            noise_image(side, side).save(tmp_path / "train" / name / f"{number}.png")
    assert load_data(str(tmp_path), size=size).train.store.shape[1:] == (3, stored, stored)
