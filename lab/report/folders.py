"""What the page shows of folders: sweeps, attention maps, links to files, and embedded images.

Images are data URIs: test images on this machine, and plots of a run. Records may come from
somebody else, so nothing is downloaded, and only regular files that lie in the expected folder and
have one of the listed formats are opened.
"""

import io
import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps

from lab.attention import score_report
from lab.core import Run, web_page
from lab.data import datasets
from lab.report.records import Found, Record

ATTRIBUTIONS = {  # by DATASET; the page shows them beside the images
    "digits": "Images: Optical Recognition of Handwritten Digits, UCI (CC BY 4.0).",
    "mnist-5k": "Images: MNIST, Y. LeCun and C. Cortes (CC BY-SA 3.0).",
    "mnist": "Images: MNIST, Y. LeCun and C. Cortes (CC BY-SA 3.0).",
    "fashion-mnist": "Images: Fashion-MNIST, Zalando SE (MIT license).",
    "cifar10": "Images: CIFAR-10, A. Krizhevsky (no license stated; do not publish them).",
    "cifar100": "Images: CIFAR-100, A. Krizhevsky (no license stated; do not publish them).",
    "pets": "Photos: Oxford-IIIT Pet (CC BY-SA 4.0).",
}
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # none of them runs a program
_MAX_SIDE = 96  # pixels of a test image
_MAX_WIDTH = 1000  # pixels of a plot
_LOSSLESS_SIDE = 64  # pixels: smaller test images are stored without loss
_UNREADABLE = (OSError, ValueError, IndexError, RuntimeError, Image.DecompressionBombError)
PLOT_BYTES = 3_000_000  # for all plots in the page; further plots stay in their folders
_ATTENTION_FILES = ("attention.html", "overview.jpg", "heads.jpg", "distance.png", "positions.png",
                    "score.png", "score.md")  # fmt: skip


def sweep(folder: Path, record: dict[str, Any], found: Found, budget: list[int]) -> dict[str, Any]:
    """A sweep with its plots and trials. `budget` holds the bytes that are left for plots."""
    place = found.place
    columns = list(dict.fromkeys(name for t in record["trials"] for name in t["params"]))
    captions = {
        "parallel.png": f"Trials of the sweep {folder.name}, one line per trial",
        "importance.png": "Importance of each parameter",
    }
    captions |= {f"{name.lower()}.png": f"Validation accuracy against {name}" for name in columns}
    return {
        "name": folder.name,
        "reference": found.is_reference(folder),
        "summary": record["says"],
        "folder": folder.as_posix(),
        "link": link(folder, place),
        "files": files(folder, ("sweep.md", "sweep.json"), place),
        "best": record.get("best"),
        "plots": _plots(folder, captions, place, budget),
        "columns": columns,
        "trials": [
            {
                "number": t["number"],
                "state": t["state"],
                "values": [t["params"].get(name) for name in columns],
                "val_accuracy": t.get("val_accuracy"),
                "epochs": t.get("epochs"),
                "link": link(folder / t["folder"], place) if t.get("folder") else None,
            }
            for t in record["trials"]
        ],
    }


def attention(run: Run, found: Found, budget: list[int]) -> dict[str, Any]:
    """A run of attention_viz.py; without photos if it came with the project."""
    config, metrics, place = run.config(), run.metrics(), found.place
    reference = found.is_reference(run.folder)
    title, summary = run.folder.name, ""
    if "animal_share" in metrics:  # of --score
        summary = score_report.verdict(metrics)[-1]
    elif config["dataset"]["name"] == "pets":
        summary = ATTRIBUTIONS["pets"]
    photos = {
        "overview.jpg": f"{title}: the map of each method over the images",
        "heads.jpg": f"{title}: attention in every block and head",
    }
    captions = {
        "distance.png": f"{title}: mean attention distance of each head, by block",
        "positions.png": f"{title}: similarity of the position embeddings",
        "score.png": f"{title}: scores of every map and of the baselines",
    }
    captions = captions if reference else photos | captions
    run_files = files(run.folder, _ATTENTION_FILES, place)
    return {
        "title": title,
        "reference": reference,
        "folder": run.folder.as_posix(),
        "link": link(run.folder, place),
        "files": run_files,
        "page": next((f["link"] for f in run_files if f["name"] == "attention.html"), None),
        "live": bool(metrics.get("live")),
        "model": Path(str(config.get("constants", {}).get("MODEL", ""))).parts[-2:],
        "example": None if reference else plot(run.folder, "example.png"),
        "summary": summary,
        "plots": _plots(run.folder, captions, place, budget),
    }


def _plots(folder: Path, captions: dict[str, str], place: Path,
           budget: list[int]) -> list[dict[str, str]]:  # fmt: skip
    """The plots that exist in a folder, until the page's size limit is reached."""
    shown = []
    for name, caption in captions.items():
        source = plot(folder, name)
        if source and len(source) <= budget[0]:
            budget[0] -= len(source)
            shown.append({"source": source, "caption": caption, "link": link(folder / name, place)})
    return shown


def files(folder: Path, names: tuple[str, ...], place: Path) -> list[dict[str, str]]:
    """The files that exist in a folder, with their links."""
    return [
        {"name": name, "link": link(folder / name, place)}
        for name in names
        if (folder / name).is_file()
    ]


def comparisons(runs: list[Record] | list[Run], pattern: str, found: Found) -> list[dict[str, Any]]:
    """Tables and figures that compare several runs and lie beside them, with their links."""
    folders = dict.fromkeys(run.folder.parent for run in runs)
    return [
        {"name": path.name, "link": link(path, found.place), "reference": found.is_reference(path)}
        for folder in folders
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]


def link(path: Path, place: Path) -> str:
    """A relative URL from the page. Quoting keeps a path from being parsed as a URL scheme."""
    relative = Path(os.path.relpath(path, place)).as_posix()
    return quote(relative, safe="/", errors="surrogateescape")


def thumbnail(dataset: str, name: str, data_dir: Path) -> str | None:
    """A test image as a data URI; None if it is not on this machine.

    Args:
        dataset: as the constant DATASET.
        name: of the image, as in predictions.csv.
        data_dir: the folder of downloaded datasets.
    """
    try:
        if dataset == "pets":
            image = _open(data_dir / "oxford-iiit-pet", name)
        elif dataset in ATTRIBUTIONS:
            number = int(name.rpartition("/")[2])
            image = Image.fromarray(_test_pixels(dataset, data_dir)[number])
        else:
            image = _open(Path(dataset).expanduser(), name)
    except _UNREADABLE:
        return None
    kind = "PNG" if max(image.size) <= _LOSSLESS_SIDE else "JPEG"
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return _data_uri(image, kind)


def plot(folder: Path, name: str) -> str | None:
    """A plot in a run's folder as a data URI; None if there is none that can be read."""
    try:
        image = _open(folder, name)
    except _UNREADABLE:
        return None
    image.thumbnail((_MAX_WIDTH, 4 * _MAX_WIDTH))
    return _data_uri(image, "JPEG")


@cache
def _test_pixels(dataset: str, data_dir: Path) -> np.ndarray:
    """The images that predictions.csv numbers, (N, H, W) or (N, H, W, 3).

    Raises: RuntimeError if torchvision does not find a complete dataset.
    """
    if dataset in ("digits", "mnist-5k"):
        load = datasets.load_digits if dataset == "digits" else datasets.load_mnist_5k
        images = load().splits["train"].images(slice(None))
        return images[:, 0].numpy()
    import torchvision

    classes = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST",
               "mnist": "MNIST"}  # fmt: skip
    load = getattr(torchvision.datasets, classes[dataset])
    return np.asarray(load(data_dir, train=False, download=False).data)


def _open(folder: Path, name: str) -> Image.Image:
    """An RGB image below a folder. Raises: one of _UNREADABLE."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise FileNotFoundError(path)
    with Image.open(path, formats=_FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return web_page.data_uri(f"image/{kind.lower()}", buffer.getvalue())
