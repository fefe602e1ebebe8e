"""Files that are made to run code, to block, or to fill the memory when they are opened."""

import os
import socket
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from sample_data import noise_image, says, two_classes

from lab.core import UserError
from lab.data import Preprocess, datasets, images, load_data
from lab.data.images import Reading, read_image

ROOT = Path(__file__).resolve().parents[2]
POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
(PROOF) (w) file closefile
showpage
"""


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that stands in for Ghostscript; returns the file that it writes when it runs."""
    folder, proof = tmp_path / "bin", tmp_path / "ghostscript was called"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{proof}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return proof


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_postscript_named_jpg_is_refused_without_calling_ghostscript(tmp_path, ghostscript):
    root = two_classes(tmp_path / "data")
    path = root / "train" / "cat" / "x.jpg"
    path.write_bytes(POSTSCRIPT)
    from PIL import Image

    with pytest.raises(OSError, match=r"."), Image.open(path) as image:  # what Pillow does
        image.load()
    assert ghostscript.exists()
    ghostscript.unlink()
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 9", "x.jpg: not an image")
    with pytest.raises(UserError, match=r"x\.jpg cannot be read: not an image"):
        datasets.load_images(str(path), "data", Preprocess(8, [0.5], [0.5]))
    assert datasets.native_size(str(root)) == 12
    assert not ghostscript.exists()


HEADS = (b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF-1.4", b"SIMPLE  =  T", b"\x89HDF\r\n\x1a\n",
         b"GRIB\0\0\0\1", b"\xd7\xcd\xc6\x9a\0\0")  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_only_listed_formats_are_opened_whatever_the_name(tmp_path, head, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(head + bytes(500))
    with pytest.raises(OSError, match="cannot identify"):
        images.open_image(path)


def test_pillow_opens_files_nowhere_else():
    """Only lab/data/images.py calls Image.open, with a list of formats."""
    callers = [path.name for path in (ROOT / "lab" / "data").glob("*.py")
               if "Image.open(" in path.read_text(encoding="utf-8")]  # fmt: skip
    assert callers == ["images.py"]


def make_special(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)  # the name of a socket is limited to about 100 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)


REASONS = {"fifo": "not a regular file", "socket": "not a regular file",
           "device": "not a regular file", "loop": "symbolic links"}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize("kind", REASONS)
def test_files_that_are_not_regular_are_named_and_never_read(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = two_classes(tmp_path / "data")
    path = root / "train" / "cat" / "x.jpg"
    make_special(path, kind)
    assert not stat.S_ISREG(path.lstat().st_mode)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 9", f"{path}: ", REASONS[kind])
    assert len(load_data(str(root), skip_unreadable=True).train) == 8
    preprocess = Preprocess(8, [0.5], [0.5])
    with pytest.raises(UserError, match=r"x\.jpg"):
        datasets.load_images(str(root / "train" / "cat"), "data", preprocess)
    with pytest.raises(UserError, match="IMAGES"):
        datasets.load_images(str(path), "data", preprocess)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_a_folder_that_links_to_itself_is_left_out(tmp_path):
    root = two_classes(tmp_path)
    (root / "train" / "cat" / "loop").symlink_to("loop")
    (root / "train" / "emu").symlink_to("emu")
    loaded = load_data(str(root))
    assert loaded.classes == ["cat", "dog"]
    assert "train/cat/loop, train/emu" in loaded.remarks[0]


def write_huge_png(path, side):
    """A PNG of side x side black pixels; it takes few bytes on disk."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + (side + 7) // 8) * 100)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
                     + chunk(b"IEND", b""))  # fmt: skip


def test_an_image_of_30000_x_30000_pixels_is_refused_with_a_sentence(tmp_path):
    root = two_classes(tmp_path)
    path = root / "train" / "cat" / "huge.png"
    write_huge_png(path, 30_000)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    says(error, "1 of 9", "huge.png: more than 178,956,970 pixels: make the image smaller")
    with pytest.raises(UserError, match="make the image smaller"):
        datasets.load_images(str(path), "data", Preprocess(8, [0.5], [0.5]))
    with pytest.raises(ValueError, match="make the image smaller"):
        read_image(path, Reading(8))


UNFINISHED = """
import os, sys, threading
from lab.data import cache, load_data
def wait(*_):
    os.write(1, b"decoding\\n")  # several threads do this, and print() would mix their lines
    threading.Event().wait()
cache.read_image = wait
load_data(sys.argv[1])
"""


def test_files_of_a_killed_process_are_removed_and_those_of_a_running_one_are_kept(tmp_path):
    root = two_classes(tmp_path)
    place = root / "vit-lab-cache"
    command = [sys.executable, "-c", UNFINISHED, str(root)]
    for running in (True, False):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "decoding\n"
            (left,) = place.glob("*.part")
            os.utime(left, (0, 0))  # as if it had been decoding for hours
            if running:
                load_data(str(root))
                assert left.exists()
        finally:
            process.kill()
            process.communicate()
        noise_image(seed=running).save(root / "train" / "cat" / "000.png")  # decode again
        load_data(str(root))
        assert not left.exists()
        noise_image(seed=7 + running).save(root / "train" / "cat" / "000.png")
    assert load_data(str(root)).remarks == []
