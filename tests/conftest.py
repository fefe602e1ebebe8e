"""Data and a browser that several files of tests share."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


gc.disable()  # until everything has been imported

LONG = (
    "test_processes.py", "test_comparison.py", "test_hand_in.py", "test_trials.py", "test_texts.py",
    "test_notebook.py", "test_growth.py", "test_benchmarks.py", "test_device_placement.py",
    "test_train.py", "test_loop.py", "test_cnn_baseline.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files come first, so that at the end no worker waits for the other one."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    """The garbage collector leaves alone what has been imported, and runs less often."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)


@pytest.fixture(autouse=True, scope="session")
def figures_of_runs_are_blank():
    # Not above: the process that starts the workers, which wait for it, does not need PyTorch.
    from tests.figures import blank_figures

    with blank_figures():
        yield


@pytest.fixture(autouse=True)
def no_script_runs(monkeypatch):
    """A script that a test runs in this process is not the running script of the next test."""
    from lab.core import constants

    monkeypatch.setattr(constants, "running", constants.RunningScript())


@pytest.fixture(scope="session")
def pets(tmp_path_factory) -> Path:
    """A small Oxford Pets: 2 breeds, 24 photographs of several shapes with trimaps."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pets data")
    base = root / "oxford-iiit-pet"
    for folder in ("images", "annotations/trimaps"):
        (base / folder).mkdir(parents=True)
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(24):
        breed = ("Abyssinian", "Bengal")[i % 2]
        name = f"{breed}_{i}"
        size = ((60, 40), (40, 40), (37, 61))[i % 3]
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "images" / f"{name}.jpg")
        trimap = np.full((size[1], size[0]), 2, np.uint8)
        trimap[8:30, 10:33], trimap[8:30, 9], trimap[8:30, 33] = 1, 3, 3
        Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{name}.png")
        lines["trainval" if i < 12 else "test"].append(f"{name} {1 + i % 2} 1 1")
    for split, text in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(text) + "\n")
    return root


@pytest.fixture(scope="session")
def browser():
    """A real one, headless; tests that need it skip where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    """A page that the tests of a file share, and lists of what it reports and requests."""
    page, problems, requests = browser.new_page(), [], []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield page, problems, requests
    page.close()


@pytest.fixture
def visit(tab):
    """Opens files in a browser; at the end, checks that it reported and requested nothing else."""
    page, problems, requests = tab
    opened = {"about:blank"}

    def open_file(path, width=1300, color_scheme="light", reduced_motion="no-preference"):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media="null", color_scheme=color_scheme, reduced_motion=reduced_motion)
        page.mouse.move(0, 0)
        page.goto(path.as_uri())
        opened.add(path.as_uri())
        return page

    problems.clear()
    requests.clear()
    yield open_file
    page.evaluate("localStorage.clear()")
    page.goto("about:blank")
    assert problems == []
    assert {url for url in requests if not url.startswith("data:image/")} <= opened
