"""Pictures for the report: of sweeps, and of where models look."""

from pathlib import Path
from typing import Any

from lab.core import Run
from lab.data.thumbnails import plot
from lab.report import sentences as words

PICTURES = 3_000_000  # bytes of plots in the page; what is beyond stays in its folder


def pictures(named: list[tuple[Path, str]], budget: list[int]) -> list[dict[str, str]]:
    """The pictures that there are, until the page's budget of bytes is used up."""
    shown = []
    for path, alt in named:
        try:
            source = plot(path)
        except OSError:
            continue
        if len(source) <= budget[0]:
            budget[0] -= len(source)
            shown.append({"source": source, "alt": alt})
    return shown


def sweep(folder: Path, told: dict[str, Any], budget: list[int]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for t in told["trials"] for name in t["params"]))
    named = [(folder / "parallel.png", f"Trials of the sweep {folder.name}: a line for each")]
    named += [
        (folder / f"{name.lower()}.png", f"Validation accuracy by {name}") for name in columns
    ]
    return {
        "name": folder.name,
        "says": told["says"],
        "folder": folder.as_posix(),
        "best": told.get("best"),
        "pictures": pictures(named, budget),
        "columns": columns,
        "trials": [
            {
                "number": t["number"],
                "state": t["state"],
                "values": [t["params"].get(name) for name in columns],
                "val_accuracy": t.get("val_accuracy"),
                "epochs": t.get("epochs"),
            }
            for t in told["trials"]
        ],
    }


def look(seen: Run, reference: bool, budget: list[int]) -> dict[str, Any]:
    """What attention_viz.py made: the reader's own with photographs, the project's as plots."""
    metrics, dataset = seen.metrics(), seen.config()["dataset"]["name"]
    title = metrics.get("title") or seen.folder.name
    photographs = {
        "overview.jpg": "images with the map of each method over them",
        "heads.jpg": "what the class token attends to, by block and head",
    }
    plots = {
        "distance.png": "mean attention distance of each head, by block",
        "score.png": "scores of every map beside the baselines",
    }
    named = plots if reference else photographs | plots
    shown = pictures(
        [(seen.folder / name, f"{title}: {alt}") for name, alt in named.items()], budget
    )
    return {"title": title, "folder": seen.folder.as_posix(),
            "says": words.attention(metrics, dataset), "pictures": shown}  # fmt: skip
