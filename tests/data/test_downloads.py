"""Downloads through torchvision's own code from a local server, and real photographs."""

import gzip
import hashlib
import http.server
import io
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
from sample_data import reference, same, says

from lab.core import UserError
from lab.data import sources
from lab.data.datasets import load_data

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def www(tmp_path):
    """A folder that a local server serves, its address, and the requests it received."""
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
    """A local address without a server."""
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
    """Puts a tiny archive in the official layout into `folder`; returns its content."""
    name, classes, each = CIFARS[dataset]  # `each`: images per class and file
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


def publish_mnist(folder, address, patch, dataset="fashion-mnist"):
    name = "MNIST" if dataset == "mnist" else "FashionMNIST"
    kind, resources, expected = getattr(torchvision.datasets, name), [], {}
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
    photographs, lists, expected = {}, {"trainval": [], "test": []}, {}
    for label, breed in enumerate(BREEDS):
        for number in range(16):
            file = io.BytesIO()
            Image.new("RGB", (90, 70), (80 * label, 5 * number, 0)).save(file, "JPEG", quality=95)
            photographs[f"images/{breed}_{number}.jpg"] = file.getvalue()
            which = "test" if number < 6 else "trainval"
            lists[which].append(f"{breed}_{number} {label + 1} 1 1")
            expected.setdefault(which, []).append(label)
    texts = {f"annotations/{n}.txt": "\n".join(lines).encode() for n, lines in lists.items()}
    texts["annotations/README"] = b"x"
    resources = [
        (f"{address}/{name}.tar.gz", archive(folder / f"{name}.tar.gz", files))
        for name, files in (("images", photographs), ("annotations", texts))
    ]
    patch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", resources)
    return expected


PUBLISH = {"cifar10": publish_cifar, "cifar100": publish_cifar, "mnist": publish_mnist,
           "fashion-mnist": publish_mnist, "pets": publish_pets}  # fmt: skip


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_small_dataset_is_downloaded_once_and_equals_the_published_data(
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


def test_pets_is_downloaded_once_and_keeps_the_official_split(www, tmp_path, monkeypatch):
    folder, address, asked = www
    expected = publish_pets(folder, address, monkeypatch)
    monkeypatch.setattr(sources, "OFFICIAL_PETS", {"trainval": 30, "test": 18})
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


def test_breed_without_test_images_is_still_a_class(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    load_data("pets", str(tmp_path / "data"), size=64)
    listed = tmp_path / "data" / "oxford-iiit-pet" / "annotations" / "test.txt"
    listed.write_text("\n".join(listed.read_text().split("\n")[:12]))
    loaded = load_data("pets", str(tmp_path / "data"), size=64)
    assert loaded.classes == ["Abyssinian", "American Bulldog", "Bengal"]
    assert "no test images of Bengal, so these are not evaluated" in loaded.remarks


def test_tilde_in_data_dir_is_expanded(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_data("pets", "~/data", size=64)
    assert (tmp_path / "home/data/oxford-iiit-pet/vit-lab-cache/train-64-bicubic.npy").exists()
    assert not (tmp_path / "~").exists()


def place_named_by(error):
    """The folder in which a message asks the user to put downloads."""
    return Path(re.search(r"Put them into (.*) without", str(error.value))[1])


@pytest.mark.parametrize("trouble", ["no network", "404", "wrong checksum"])
@pytest.mark.parametrize("dataset", PUBLISH)
def test_advice_after_a_failed_download_works(www, tmp_path, monkeypatch, dataset, trouble):
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
    shutil.rmtree(folder)  # the server has nothing left
    loaded = load_data(dataset, str(tmp_path / "data"), size=64)
    assert len(loaded.test) > 0


def test_advice_after_an_interrupted_extraction_of_pets_works(www, tmp_path, monkeypatch):
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
        says(error, "trainval.txt", base, "delete what has been unpacked there")
        shutil.rmtree(base / "images")
        shutil.rmtree(base / "annotations")
    assert same(load(), first)


def test_pets_without_annotations_and_network_names_the_missing_download(
    www, tmp_path, monkeypatch
):
    folder, _, _ = www
    publish_pets(folder, closed_port(), monkeypatch)
    with tarfile.open(folder / "images.tar.gz") as tar:
        tar.extractall(tmp_path / "data" / "oxford-iiit-pet", filter="data")
    with pytest.raises(UserError) as error:
        load_data("pets", str(tmp_path / "data"), size=64)
    says(error, "annotations.tar.gz", "oxford-iiit-pet", "python train.py --dataset digits")


@pytest.mark.parametrize("damage", [b"", b"half"])
def test_truncated_fashion_mnist_is_reported(www, tmp_path, monkeypatch, damage):
    folder, address, _ = www
    publish_mnist(folder, address, monkeypatch)
    load = partial(load_data, "fashion-mnist", str(tmp_path / "data"))
    first = load()
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:999] if damage else b"")
    with pytest.raises(UserError) as error:
        load()
    says(error, raw, "delete what has been unpacked there")
    path.unlink()
    assert same(load(), first)


def test_truncated_cifar_is_unpacked_again(www, tmp_path, monkeypatch):
    folder, address, _ = www
    publish_cifar(folder, address, monkeypatch, "cifar10")
    load = partial(load_data, "cifar10", str(tmp_path / "data"))
    first = load()
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    assert same(load(), first)


@pytest.mark.parametrize("lines", ["", "Abyssinian_0 1 1 1\nBengal_0 3 1 1\n", "Abyssinian_0 1"])
def test_invalid_pets_lists_are_reported(www, tmp_path, monkeypatch, lines):
    folder, address, _ = www
    publish_pets(folder, address, monkeypatch)
    load_data("pets", str(tmp_path / "data"), size=64)
    base = tmp_path / "data" / "oxford-iiit-pet"
    (base / "annotations" / "trainval.txt").write_text(lines)
    with pytest.raises(UserError) as error:
        load_data("pets", str(tmp_path / "data"), size=64)
    says(error, base)


# --- Real photographs, if available ---


def linked_pets(name, tmp_path):
    """A data folder with links to the photographs, so nothing is written next to them."""
    theirs = SHARED / name / "oxford-iiit-pet"
    if not theirs.is_dir():
        pytest.skip(f"the photographs of {name} are not available")
    base = tmp_path / "oxford-iiit-pet"
    base.mkdir()
    for part in ("images", "annotations"):
        (base / part).symlink_to(theirs / part)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes", "classes"), [("pets-sample", (259, 111), 37), ("pets-3breeds", (300, 298), 3)]
)
def test_labels_of_a_pets_sample_match_the_file_names(tmp_path, name, sizes, classes):
    loaded = load_data("pets", linked_pets(name, tmp_path), size=32)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == sizes
    assert len(loaded.classes) == classes
    assert f"not the official Pets: {sizes[0]} trainval images instead of 3680" in loaded.remarks
    assert f"not the official Pets: {sizes[1]} test images instead of 3669" in loaded.remarks
    for part in (loaded.train, loaded.val, loaded.test):
        for path, label in zip(part.names, part.labels.tolist(), strict=True):
            breed = Path(path).stem.rsplit("_", 1)[0].replace("_", " ").title()
            assert loaded.classes[label] == breed
        with Image.open(Path(tmp_path, "oxford-iiit-pet", part.names[0])) as image:
            assert (part.images(torch.tensor(0)).numpy() == reference(image, 32)).all()
