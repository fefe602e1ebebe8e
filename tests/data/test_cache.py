"""The cache of decoded photographs: what is trusted, and what is decoded again."""

import errno
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_data import noise_image, same, says, two_classes

from lab.core import UserError
from lab.data import cache, images
from lab.data.datasets import load_data
from lab.data.images import Reading, read_image


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder that has been loaded once, and a counter of the images decoded since then."""
    root = two_classes(tmp_path / "data")
    first = load_data(str(root))
    decoded = []
    read = images.read_image
    monkeypatch.setattr(cache, "read_image", lambda *args: decoded.append(args) or read(*args))
    return root, first, decoded


def test_second_load_decodes_nothing_and_gives_the_same_data(cached):
    root, first, decoded = cached
    assert same(load_data(str(root)), first)
    assert decoded == []


def test_cache_is_used_for_relative_paths_and_after_the_folder_moves(cached, tmp_path, monkeypatch):
    root, first, decoded = cached
    monkeypatch.chdir(root.parent)
    assert same(load_data("data"), first)
    assert same(load_data("data/../data/"), first)
    shutil.move(root, tmp_path / "elsewhere")
    assert same(load_data(str(tmp_path / "elsewhere")), first)
    assert decoded == []


def test_every_size_has_its_own_cache(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise_image(100, 80, number).save(tmp_path / "train" / name / f"{number}.png")
    for size in (32, 64, 32):
        load_data(str(tmp_path), size=size)
    kept = sorted(path.name for path in (tmp_path / "vit-lab-cache").iterdir())
    assert kept == [
        f"train-{size}-bicubic.{ending}" for size in (32, 64) for ending in ("json", "npy")
    ]


def change(path):
    noise_image(seed=9).save(path)


def touch(path):
    os.utime(path, ns=(0, 0))


def add(path):
    noise_image(seed=9).save(path.with_name("new.png"))


def rename(path):
    path.rename(path.with_name("zzz.png"))


@pytest.mark.parametrize("edit", [change, touch, add, rename, Path.unlink])
def test_changed_touched_added_renamed_and_removed_files_are_noticed(cached, edit):
    root, first, decoded = cached
    edit(root / "train" / "cat" / "001.png")
    again = load_data(str(root))
    assert len(decoded) == len(again.train)  # only train
    fresh = root.with_name("fresh")
    shutil.copytree(root, fresh, ignore=shutil.ignore_patterns("vit-lab-cache"))
    assert same(again, load_data(str(fresh)))
    assert same(again, first) == (edit is touch)


def test_file_of_different_size_but_same_time_is_noticed(cached):
    root, first, _ = cached
    path = root / "train" / "cat" / "001.png"
    time = path.stat().st_mtime_ns
    change(path)
    os.utime(path, ns=(time, time))
    assert not same(load_data(str(root)), first)


def test_renamed_file_of_same_size_and_time_is_noticed(tmp_path):
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
def test_damaged_cache_is_written_again(cached, ending, content):
    root, first, decoded = cached
    path = root / "vit-lab-cache" / f"train-12-bicubic.{ending}"
    whole = path.read_bytes()
    path.unlink()  # `first` still maps it: truncating it in place would end in a bus error
    if content != "gone":
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8


def test_cached_array_of_wrong_shape_is_not_used(cached):
    root, first, decoded = cached
    path = root / "vit-lab-cache" / "train-12-bicubic.npy"
    path.unlink()  # `first` still maps it
    np.save(path, np.zeros((7, 3, 12, 12), np.uint8))
    assert same(load_data(str(root)), first)
    assert len(decoded) == 8


def test_unwritable_folder_is_cached_in_the_users_cache_folder(tmp_path, monkeypatch, user_cache):
    root = two_classes(tmp_path / "data")
    (root / "vit-lab-cache").touch()  # a file in place of the folder
    first = load_data(str(root))
    assert len(list(user_cache.rglob("*.npy"))) == 3
    monkeypatch.setattr(cache, "decode_into", None)
    assert same(load_data(str(root)), first)


def test_cache_in_a_folder_that_became_read_only_is_still_used(cached, monkeypatch):
    root, first, decoded = cached

    def read_only(dir):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", read_only)
    assert same(load_data(str(root)), first)
    assert decoded == []


def test_error_for_no_writable_cache_folder_names_the_variable_to_set(tmp_path, user_cache):
    root = two_classes(tmp_path / "data")
    (root / "vit-lab-cache").touch()
    user_cache.touch()
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME"):
        load_data(str(root))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved here")
def test_full_disk_is_reported_before_decoding(tmp_path, monkeypatch):
    root = two_classes(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(cache, "decode_into", None)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "No space left on device", root / "vit-lab-cache", "IMG_SIZE")
    assert list((root / "vit-lab-cache").iterdir()) == []


def test_a_file_system_without_locks_can_hold_the_cache(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(cache, "flock", no_locks)
    root = two_classes(tmp_path)
    assert len(load_data(str(root)).train) > 0
    assert not list((root / "vit-lab-cache").glob("*.part"))


def test_whole_images_of_two_interpolations_have_two_caches(tmp_path):
    for i in range(6):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise_image(90, 90, seed=i).save(tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg")
    for interpolation in ("bicubic", "bilinear", "bicubic"):
        load_data(str(tmp_path), interpolation=interpolation, crop_size=40)
    names = {path.stem for path in (tmp_path / "vit-lab-cache").glob("train-40-*.npy")}
    assert names == {"train-40-whole-bicubic", "train-40-whole-bilinear"}


@pytest.mark.parametrize("before", [True, False], ids=["old cache", "no cache"])
def test_interrupted_decoding_stops_immediately_and_leaves_no_usable_cache(
    tmp_path, monkeypatch, before
):
    root = two_classes(tmp_path / "data", train=200)
    if before:
        load_data(str(root))
        touch(root / "train" / "cat" / "000.png")
    read, calls = images.read_image, []
    is_interrupted = threading.Event()

    def held(path, size):
        calls.append(path)
        if path.parent.name != "cat" or int(path.stem) > 5:
            is_interrupted.wait()
        return read(path, size)

    def interrupted(iterable, **_):
        for number, item in enumerate(iterable):
            if number == 5:
                is_interrupted.set()  # the threads may end what they have begun
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", held)
        patch.setattr(cache, "tqdm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_data(str(root))
    assert len(calls) < 300
    left = {path.name for path in (root / "vit-lab-cache").iterdir()}
    assert "train-12-bicubic.json" not in left
    assert not [name for name in left if "part" in name]
    again = load_data(str(root))
    assert (
        again.train.images(slice(None))[:, 0, 0, 0].tolist() == (10 * again.train.labels).tolist()
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of open files")
def test_interrupted_decoding_on_windows_leaves_a_file_that_the_next_run_removes(
    tmp_path, monkeypatch
):
    """Windows has no flock and removes no file that is open or memory-mapped."""
    root, unlink = two_classes(tmp_path / "data"), Path.unlink

    def unlink_closed(path, missing_ok=False):
        opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        if str(path) in opened or str(path) in Path("/proc/self/maps").read_text():
            raise PermissionError(errno.EACCES, "used by another process", str(path))
        unlink(path, missing_ok)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "flock", None)
    monkeypatch.setattr(Path, "unlink", unlink_closed)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_data(str(root))
    (leftover,) = (root / "vit-lab-cache").iterdir()
    os.utime(leftover, (0, 0))
    load_data(str(root))
    assert not leftover.exists()


def test_concurrent_loads_all_succeed(tmp_path):
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
