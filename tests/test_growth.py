"""Growth of cost: exponents, expected orders, and memory that does not grow with the images."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import linregress

from benchmarks import bounded_memory, growth, timing
from benchmarks.bounded_memory import CGROUPS, run_limited
from benchmarks.growth import Growth, exponent, growth_table
from lab.core import UserError
from lab.data import cache, datasets, splits
from lab.data.augment import Augmentation
from lab.data.datasets import full_split, load_data
from lab.data.images import Reading
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")

# The whole of train.py where libraries may take what they take, and all else 260 MB (on two cores,
# because each thread has a stack); then the cache that it trained on, held in memory at once.
UNDER_LIMIT = """
import os, re, resource, sys
os.cpu_count = lambda: 2
import numpy as np
import matplotlib.pyplot, torchvision.transforms.v2  # libraries that training and records need
import train
taken = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
limit = taken + 260 * 10**6
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
cache, *sys.argv = sys.argv[1:]
train.main()
try:
    np.load(cache)
except MemoryError:
    print("the cache exceeds the limit of", limit - taken)
"""


def folder_of(root, count, size=40):
    """`root/train/{a,b}/*.png`, `count` links to two pictures."""
    for label, name in enumerate("ab"):
        (root / "train" / name).mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(root / f"{name}.jpg")
        for i in range(count // 2):
            os.link(root / f"{name}.jpg", root / "train" / name / f"{i}.jpg")
    return root


# --- Exponents, table, plot ---


def test_exponents_equal_scipys_regression():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = np.unique(rng.integers(1, 10**6, rng.integers(2, 9)))
        if len(values) < 2:
            continue
        power, factor = rng.uniform(-1, 4), rng.uniform(1e-6, 1e6)
        costs = factor * values.astype(float) ** power
        assert exponent(values, costs) == pytest.approx(power, abs=1e-6)
        noisy = costs * rng.lognormal(0, 0.3, len(values))
        theirs = linregress(np.log(values), np.log(noisy)).slope
        assert exponent(values, noisy) == pytest.approx(theirs, abs=1e-9)


def test_costs_that_are_not_positive_are_left_out_of_the_fit():
    assert exponent([1, 2, 4, 8], [0, -1, 4, 8]) == pytest.approx(1)
    assert exponent([1, 2, 4], [0, 0, 4]) is None
    growth_ = Growth("images", "an epoch", "MB", [1, 2], [[0], [0]], [1, 2], 1)
    assert "**-** (1.00) | - |" in growth_table([growth_])[-1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("growth")
    flags = ["--quantities=depth,stages,files", "--depth=1,2", "--stages=200,400"]
    flags += ["--files=200,400", "--repeats=1", "--steps=1", f"--out={out / 'growth-{device}.md'}"]
    with pytest.MonkeyPatch.context() as patch:
        for name in growth.__annotations__:
            patch.setattr(growth, name, getattr(growth, name))
        patch.setattr(sys, "argv", ["growth.py", *flags])
        # A fork server would import PyTorch again.
        fork = multiprocessing.get_context("fork")
        patch.setattr(timing, "get_context", lambda method: fork)
        growth.main()
    return out


def plain():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_run_writes_figure_table_and_record(measured):
    record = json.loads((measured / "growth-cpu.json").read_text())
    assert "hardware" in record
    told = [(g["quantity"], g["unit"], g["values"]) for g in record["growths"]]
    assert told == [
        ("depth (blocks)", "seconds", [1, 2]),
        ("depth (blocks)", "MB beyond the libraries", [1, 2]),
        *[("images in memory", "seconds", [200, 400])] * len(growth.InMemory.stages),
        ("images in memory", "MB beyond the libraries", [200, 400]),
        ("image files", "seconds", [200, 400]),
        ("image files", "seconds", [200, 400]),
        ("image files", "MB beyond the libraries", [200, 400]),
    ]
    for one in record["growths"]:
        assert len(one["measured"]) == len(one["expected"]) == 2
        assert one["unit"] != "seconds" or min(min(one["measured"])) > 0
    lines = (measured / "growth-cpu.md").read_text().splitlines()
    assert sum(line.startswith("| image files") for line in lines) == 3
    with Image.open(measured / "growth-cpu.png") as picture:
        assert min(picture.size) > 400  # one row of panels


# --- What is expected ---


def test_expected_flops_are_those_of_a_vit_written_out():
    rng = np.random.default_rng(1)
    for _ in range(8):
        patch, side = (int(n) for n in rng.integers(2, 7, 2))
        D, depth = 32 * int(rng.integers(1, 4)), int(rng.integers(1, 4))
        work = growth.Workload(patch * side, patch, D, depth, int(rng.integers(1, 9)))
        work = replace(work, images=work.batch * int(rng.integers(1, 4)))
        N, T = side**2, side**2 + 1
        embed = 2 * N * 3 * patch**2 * D
        blocks = depth * 2 * (12 * D**2 * T + 2 * T**2 * D)
        head = 2 * D * growth.CLASSES
        # Each product has two gradients, but for that of the pixels.
        flops = 3 * (embed + blocks + head) - embed
        assert growth.expected_flops(work) == work.images * flops


@pytest.mark.parametrize(
    ("quantity", "values"),
    [("batch", [64, 128, 256]), ("depth", [4, 8]), ("width", [512, 1024]), ("size", [128, 192]),
     ("images", [2**12, 2**14])],
)  # fmt: skip
def test_for_large_values_flops_have_the_stated_order(quantity, values):
    base = replace(growth.Workload(), width=32) if quantity == "size" else growth.Workload(depth=1)
    works = [replace(base, **{quantity: v}) for v in values]
    works = [w if w.images else replace(w, images=w.batch) for w in works]
    order = growth.NAMES[quantity][2]
    assert exponent(values, list(map(growth.expected_flops, works))) == pytest.approx(
        order, abs=0.4
    )


# --- Memory does not grow with the images ---


def test_decoding_bounds_images_in_memory_and_in_the_queue(tmp_path, monkeypatch):
    inside, outside, most = [0], [0], {"decoded": 0, "queued": 0}
    lock, read = threading.Lock(), cache.read_image

    class Counted(ThreadPoolExecutor):
        def submit(self, *args):
            with lock:
                outside[0] += 1
                most["queued"] = max(most["queued"], outside[0])
            future = super().submit(*args)
            future.add_done_callback(done)
            return future

    def done(_):
        with lock:
            outside[0] -= 1

    def counted(*args):
        with lock:
            inside[0] += 1
            most["decoded"] = max(most["decoded"], inside[0])
        try:
            return read(*args)
        finally:
            with lock:
                inside[0] -= 1

    monkeypatch.setattr(cache, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(cache, "read_image", counted)
    monkeypatch.setattr(cache, "QUEUE", 16)
    root = folder_of(tmp_path, 300)
    paths = sorted(root.glob("train/*/*.jpg"))
    decoded = cache.decode(paths, Reading(40), root / "cache" / "all")
    assert len(decoded.array) == 300
    assert not decoded.failures
    assert most["decoded"] <= os.cpu_count()
    assert most["queued"] <= 16
    assert (decoded.array[0] == read(paths[0], Reading(40))[0]).all()
    assert (decoded.array[-1] == read(paths[-1], Reading(40))[0]).all()


@pytest.mark.parametrize("at_once", [1, 5000, 10**9])
def test_fingerprint_does_not_depend_on_the_images_read_at_once(monkeypatch, at_once):
    store = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    part = full_split(store, torch.arange(40) % 3, [str(i) for i in range(40)])
    whole_ = datasets.Dataset("x", ["a", "b", "c"], part, part, part, [0.5] * 3, [0.2] * 3, [])
    wanted, statistics = whole_.fingerprint, datasets.channel_statistics(part)
    held = []
    images = type(part).images
    monkeypatch.setattr(
        type(part), "images", lambda *a: held.append(images(*a).nbytes) or images(*a)
    )
    monkeypatch.setattr(splits, "CHUNK_BYTES", at_once)
    assert replace(whole_).fingerprint == wanted
    assert datasets.channel_statistics(part) == statistics
    assert max(held) <= max(at_once, part.store[0].nbytes)


def test_prefetch_requests_each_image_and_no_other_page():
    asked = []
    base = SimpleNamespace(madvise=lambda what, start, length: asked.append((start, length)))
    array = SimpleNamespace(base=base, offset=128)
    for size in (3 * 8**2, 3 * 64**2, 3 * 256**2 + 5):
        asked.clear()
        stand_in = type("Mapped", (), {"__getitem__": lambda _, i, n=size: np.zeros(n, np.uint8)})()
        stand_in.base, stand_in.offset = array.base, array.offset
        cache.prefetch(stand_in, [0, 7, 3])
        for index, (start, length) in zip([0, 7, 3], asked, strict=True):
            first = 128 + index * size
            assert start % os.sysconf("SC_PAGE_SIZE") == 0
            assert start <= first < start + os.sysconf("SC_PAGE_SIZE")
            assert start + length == first + size


def test_every_image_is_prefetched_once_one_batch_ahead(tmp_path):
    loaded = load_data(str(folder_of(tmp_path, 60)), size=40)
    asked, real = [], loaded.train.read_ahead
    loaded = replace(
        loaded,
        train=replace(loaded.train, read_ahead=lambda rows: asked.extend(rows) or real(rows)),
    )
    preprocess = Preprocess(40, loaded.mean, loaded.std)
    loaders = Loaders(loaded, preprocess, 8, Augmentation())
    wanted = [i for batch in loaders.epoch_indices(1, 0) for i in loaded.train.rows[batch].tolist()]
    for step, (images, _) in enumerate(loaders.train(1)):
        assert asked == wanted[: (step + 2) * 8]
        pixels = loaded.train.store[wanted[step * 8 : (step + 1) * 8]]
        assert torch.equal(images, (pixels.float() / 255 - loaders.mean) / loaders.std)
    assert asked == wanted


def test_mapped_store_is_read_only_and_gives_no_warning(tmp_path, recwarn):
    loaded = load_data(str(folder_of(tmp_path, 20)), size=40)
    assert not [w for w in recwarn if "writ" in str(w.message)]
    assert not cache.open_array(next(tmp_path.glob("vit-lab-cache/*.npy"))).flags.writeable
    assert loaded.train.store.dtype == torch.uint8


# --- Memory ---


@LINUX
def test_photographs_train_in_less_memory_than_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_memory, "BATCH_SIZE", 8)
    bounded_memory.make_photographs(tmp_path / "photographs", 1400)
    _, _, *flags = bounded_memory.train_command(tmp_path)
    kept = tmp_path / "photographs" / "vit-lab-cache" / "train-256-bicubic.npy"
    command = [sys.executable, "-c", UNDER_LIMIT, str(kept), "train.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=plain())
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("the cache exceeds the limit of")
    assert "test accuracy" in done.stdout
    assert kept.stat().st_size > int(last.split()[-1])  # what the limit left for training


@LINUX
def test_command_is_killed_beyond_its_limit_and_measured_within_it():
    hold = "a = bytearray(b'x') * {}; print('held')"
    try:
        within = run_limited([sys.executable, "-c", hold.format(60 * 10**6)], 200 * 10**6)
    except UserError as error:
        pytest.skip(str(error))
    assert within.ending == "finished"
    assert within.output == "held\n"
    assert within.peak is None or 60e6 < within.peak < 200e6
    beyond = run_limited([sys.executable, "-c", hold.format(300 * 10**6)], 200 * 10**6)
    assert beyond.ending == "killed by the kernel"
    for root, *_ in CGROUPS.values():
        assert not Path(root, f"vit-lab-{os.getpid()}").exists()
