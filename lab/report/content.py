"""The report's content as plain data: what lab/report/page.py draws."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from lab.core import stats
from lab.data.thumbnails import thumbnail
from lab.report import sentences as words
from lab.report.comparisons import (
    Configuration,
    chosen,
    configurations,
    efficiencies,
    finetunings,
    groups,
    hardest,
    is_reference,
    pairs,
    tested,
)
from lab.report.pictures import PICTURES, look, sweep
from lab.report.records import CURVES, TASKS, Found, Record

POINTS = 100  # of a curve at most
UNITS = {"cpu": "", "cores": " cores", "threads": " threads", "gpu": ""}  # of hardware


def content(found: Found, place: Path, data_dir: Path) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        found: the runs below `place`.
        place: the folder of all results.
        data_dir: where downloads lie, for pictures of test images.
    """
    order = list(TASKS.values())

    def rank(run: Record) -> tuple:
        task = order.index(run.task) if run.task in order else len(order)
        return bool(run.sweep), is_reference(run, place), task, run.config["dataset"]["name"]

    runs = sorted(found.runs, key=rank)
    ids = {run.folder: i for i, run in enumerate(runs)}
    configs = configurations(runs, place)
    finished = [run for run in runs if run.metrics]
    sets = groups(finished, tested)
    set_of = {tested(same[0]): i for i, same in enumerate(sets)}
    compared = {tested(some[0]): some for some in chosen(configs, place)}
    tests = {key: pairs(some) for key, some in compared.items()}
    tunings = finetunings([c for c in configs if not c.first.sweep], place)
    series = efficiencies([c for c in configs if not c.first.sweep], place)
    budget = [PICTURES]
    summary = words.summary(found, configs, list(tests.values()), tunings, place)
    return {
        "heading": "ViT Lab: every run side by side",
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "summary": summary,
        "runs": [row(i, run, set_of, place) for i, run in enumerate(runs)],
        "seeds": [seeds(c, ids) for c in configs if len(c.runs) > 1 and not c.first.sweep],
        "test_sets": [
            test_set(same[0], compared.get(key, []), tests.get(key, []), ids, data_dir)
            for key, same in zip(set_of, sets, strict=True)
        ],
        "finetuning": [tuning(group, ids) for group in tunings],
        "efficiency": [efficiency(lines, ids) for lines in series],
        "sweeps": [sweep(folder, told, budget) for folder, told in found.sweeps],
        "attention": [look(seen, is_reference(seen, place), budget) for seen in found.looks],
        "left_out": [
            {"folder": folder.as_posix(), "reason": why} for folder, why in found.left_out
        ],
    }


def row(i: int, run: Record, set_of: dict[str, int], place: Path) -> dict[str, Any]:
    """A run, whether it is finished or not."""
    config, metrics, made = run.config, run.metrics or {}, run.predictions
    low, high = metrics.get("test_accuracy_95", (None, None))
    hardware = config.get("hardware", {})
    versions = config.get("versions", {})
    rows = thinned(run.history)
    confusion = calibration = None
    if made:
        cells, counts = np.unique(
            np.stack([made.labels, made.predicted]), axis=1, return_counts=True
        )
        confusion = [[int(r), int(c), int(n)] for (r, c), n in zip(cells.T, counts, strict=True)]
        calibration = [list(b) for b in stats.reliability(made.confidence, made.correct)]
    return {
        "id": i,
        "name": run.folder.name,
        "folder": run.folder.as_posix(),
        "task": f"Sweep {run.sweep.name}" if run.sweep else run.task,
        "reference": is_reference(run, place),
        "state": "finished" if metrics else "stopped",
        "dataset": config["dataset"]["name"] + f", {100 * run.share:g} %" * (run.share < 1),
        "model": run.model,
        "seed": run.constants.get("SEED"),
        "test_set": set_of[made.test_set] if made else None,
        "accuracy": metrics.get("test_accuracy"),
        "low": low,
        "high": high,
        "test_images": metrics.get("test_images"),
        "val_accuracy": metrics.get("val_accuracy"),
        "calibration_error": metrics.get("calibration_error"),
        "parameters": config["model"]["parameters"],
        "trained_parameters": config["model"]["trainable_parameters"],
        "macs": config["model"]["macs"],
        "seconds": metrics.get("training_seconds"),
        "images_per_second": metrics.get("images_per_second"),
        "memory_mb": metrics.get("peak_memory_mb"),
        "epochs": metrics.get("epochs", len(run.history)),
        "best_epoch": metrics.get("best_epoch"),
        "curves": {key: [r[key] for r in rows] for key in ("epoch", *CURVES)},
        "confusion": confusion,
        "calibration": calibration,
        "command": config["command"],
        "commit": config.get("commit"),
        "uncommitted_changes": config.get("uncommitted_changes"),
        "started": config.get("started"),
        "hardware": ", ".join(
            f"{hardware[key]}{unit}"
            for key, unit in UNITS.items()
            if hardware.get(key)
        ),
        "versions": ", ".join(
            [f"Python {config.get('python')}", *(f"{k} {v}" for k, v in versions.items())]
        ),
        "notes": [*config["dataset"].get("remarks", []),
                  *config.get("pretrained", {}).get("notes", [])],
    }  # fmt: skip


def thinned(history: list[dict]) -> list[dict]:
    """At most POINTS epochs, evenly spread, the first and the last among them."""
    if len(history) <= POINTS:
        return history
    return [history[i] for i in np.linspace(0, len(history) - 1, POINTS).round().astype(int)]


def seeds(c: Configuration, ids: dict[Path, int]) -> dict[str, Any]:
    return {
        "name": c.name,
        "task": c.first.task,
        "dataset": c.first.config["dataset"]["name"],
        "mean": c.mean,
        "deviation": c.deviation,
        "runs": [ids[run.folder] for run in c.runs],
    }


def test_set(
    one: Record, compared: list[Record], tests: list, ids: dict[Path, int], data_dir: Path
) -> dict[str, Any]:
    """A set of test images, whose names and classes `one` gives, and the models compared on it."""
    made, classes = one.predictions, one.config["dataset"]["classes"]
    images = []
    for found in hardest(compared) if compared else []:
        index = found["index"]
        said = [
            {
                "run": ids[run.folder],
                "prediction": classes[run.predictions.predicted[index]],
                "confidence": float(run.predictions.confidence[index]),
                "right": bool(run.predictions.correct[index]),
            }
            for run in compared
        ]
        name = made.names[index]
        images.append(
            {
                "image": name,
                "label": classes[made.labels[index]],
                "picture": thumbnail(one.constants["DATASET"], name, data_dir),
                "wrong": found["wrong"],
                "of": len(compared),
                "said": said,
            }
        )
    return {
        "name": one.config["dataset"]["name"],
        "images": len(made.names),
        "classes": classes,
        "compared": [ids[run.folder] for run in compared],
        "compared_how": "Of each model the configuration that is best on the validation images, "
        "by its first seed; of these the best on validation, your own first. The test images chose "
        "nothing.",
        "pairs": [
            {
                "a": ids[pair.one.folder],
                "b": ids[pair.other.folder],
                "only_a": pair.only_one,
                "only_b": pair.only_other,
                "p": pair.p,
                "p_holm": pair.p_holm,
                "says": pair.says,
            }
            for pair in tests
        ],
        "hardest": images,
    }


def measured(c: Configuration, ids: dict[Path, int]) -> dict[str, Any]:
    """Accuracy of a configuration with what surrounds it, for a point in a chart."""
    low, high = c.around
    return {"run": ids[c.first.folder], "accuracy": c.mean, "low": low, "high": high,
            "seeds": len(c.runs)}  # fmt: skip


def tuning(group: list[Configuration], ids: dict[Path, int]) -> dict[str, Any]:
    first = group[0].first
    return {
        "title": f"{first.model.partition(',')[0]} on {first.config['dataset']['name']} "
        f"({first.metrics['test_images']:,} test images)",
        "points": [
            {
                **measured(c, ids),
                "label": c.first.model.partition(", ")[2],
                "trained": c.first.config["model"]["trainable_parameters"],
                "seconds": c.first.metrics["training_seconds"],
                "memory_mb": c.first.metrics.get("peak_memory_mb"),
            }
            for c in group
        ],
    }


def efficiency(lines: list[list[Configuration]], ids: dict[Path, int]) -> dict[str, Any]:
    return {
        "title": lines[0][0].first.config["dataset"]["name"],
        "series": [
            {
                "label": line[0].first.label,
                "points": [
                    {
                        **measured(c, ids),
                        "fraction": c.first.share,
                        "images": int(words.images(c).replace(",", "")),
                    }
                    for c in line
                ],
            }
            for line in lines
        ],
        "says": words.efficiency(lines),
    }
