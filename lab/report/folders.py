"""What the page shows of sweeps and attention maps, and the files of each folder, as links."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab.core import Run
from lab.report import images, sentences
from lab.report.comparisons import is_reference
from lab.report.records import Record

PLOT_BYTES = 3_000_000  # for all plots in the page; further plots stay in their folders
_ATTENTION_FILES = ("attention.html", "overview.jpg", "heads.jpg", "distance.png", "positions.png",
                    "score.png", "score.md")  # fmt: skip


def sweep(folder: Path, record: dict[str, Any], place: Path, budget: list[int]) -> dict[str, Any]:
    """A sweep with its plots and trials. `budget` holds the bytes that are left for plots."""
    columns = list(dict.fromkeys(name for t in record["trials"] for name in t["params"]))
    captions = {
        "parallel.png": f"Trials of the sweep {folder.name}, one line per trial",
        "importance.png": "Importance of each parameter",
    }
    captions |= {f"{name.lower()}.png": f"Validation accuracy against {name}" for name in columns}
    return {
        "name": folder.name,
        "reference": is_reference(Run(folder), place),
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


def attention(run: Run, place: Path, budget: list[int]) -> dict[str, Any]:
    """A run of attention_viz.py; without photos if it came with the project."""
    config, reference = run.config(), is_reference(run, place)
    title, dataset = run.folder.name, config["dataset"]["name"]
    photos = {
        "overview.jpg": f"{title}: the map of each method over the images",
        "heads.jpg": f"{title}: attention of the class token, by block and head",
    }
    captions = {
        "distance.png": f"{title}: mean attention distance of each head, by block",
        "positions.png": f"{title}: similarity of the position embeddings",
        "score.png": f"{title}: scores of every map and of the baselines",
    }
    captions = captions if reference else photos | captions
    its_files = files(run.folder, _ATTENTION_FILES, place)
    return {
        "title": title,
        "reference": reference,
        "folder": run.folder.as_posix(),
        "link": link(run.folder, place),
        "files": its_files,
        "page": next((f["link"] for f in its_files if f["name"] == "attention.html"), None),
        "live": bool(run.metrics().get("live")),
        "model": Path(str(config.get("constants", {}).get("MODEL", ""))).name,
        "example": None if reference else images.plot(run.folder, "example.png"),
        "summary": sentences.attention_sentence(run.metrics(), dataset),
        "plots": _plots(run.folder, captions, place, budget),
    }


def _plots(folder: Path, captions: dict[str, str], place: Path,
           budget: list[int]) -> list[dict[str, str]]:  # fmt: skip
    """The plots that exist in a folder, until the page's size limit is reached."""
    shown = []
    for name, caption in captions.items():
        source = images.plot(folder, name)
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


def comparisons(runs: list[Record] | list[Run], pattern: str, place: Path) -> list[dict[str, Any]]:
    """Tables and figures that compare several runs and lie beside them, with their links."""
    folders = {run.folder.parent: is_reference(run, place) for run in runs}
    return [
        {"name": path.name, "link": link(path, place), "reference": reference}
        for folder, reference in folders.items()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]


def link(path: Path, place: Path) -> str:
    """A relative URL from the page. Quoting keeps a path from being parsed as a URL scheme."""
    relative = Path(os.path.relpath(path, place)).as_posix()
    return quote(relative, safe="/", errors="surrogateescape")
