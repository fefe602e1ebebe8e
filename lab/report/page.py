"""The report's web page: one file that shows every run without a network or a server.

`build_content` collects everything the page shows as plain data, and `write_page` packs it into
the template in web/. The heading and the summary are plain HTML, so that they can be read without
JavaScript; everything else is stored as JSON and drawn by the scripts. All links are relative.
"""

import html
import time
from pathlib import Path
from typing import Any

import numpy as np

from lab.core import plots, stats, web_page
from lab.report import folders, sentences
from lab.report.comparisons import (
    Configuration,
    MainResults,
    Pair,
    compare_pairs,
    configurations,
    distinct_labels,
    efficiencies,
    finetuning_groups,
    group_by,
    hardest_images,
    main_results,
    select_models,
)
from lab.report.record_files import CURVES
from lab.report.records import TASKS, Found, Record

_TEMPLATE = Path(__file__).parent / "web" / "page.html"
_CURVE_POINTS = 100  # longer curves are subsampled
_CURVE_DIGITS = 5  # significant digits; curves make up most of a large page
_RUN_FILES = ("curves.png", "confusion.png", "metrics.json", "config.json", "history.csv",
              "predictions.csv")  # fmt: skip
_UNITS = {  # of hardware
    "cpu": "", "cores": " cores", "threads": " threads", "gpu": "", "processes": " processes",
}  # fmt: skip


def build_content(found: Found, data_dir: Path, title: str = "My runs") -> dict[str, Any]:
    """Collects everything that the page shows.

    Args:
        found: the runs below the results folder, which will contain the page.
        data_dir: the folder of downloaded datasets, for thumbnails of test images.
        title: of the first section, which shows the main results.
    """
    tasks = list(TASKS.values())

    def order(run: Record) -> tuple:
        task = tasks.index(run.task) if run.task in tasks else len(tasks)
        return bool(run.sweep), run.is_reference, task, run.config["dataset"]["name"]

    chosen = {folder / trial["folder"] for folder, sweep in found.sweeps
              for trial in sweep["trials"]
              if trial["number"] == sweep.get("best") and trial.get("folder")}  # fmt: skip
    # Show only the best trial on validation: to select by test accuracy would be cheating.
    runs = sorted((r for r in found.runs if not r.sweep or r.folder in chosen), key=order)
    ids = {run.folder: i for i, run in enumerate(runs)}
    configs = configurations(runs)
    without_trials = [c for c in configs if not c.first.sweep]
    results = main_results(configs)
    test_sets = group_by((r for r in runs if r.metrics), lambda r: r.predictions.test_set)
    test_set_ids = {same[0].predictions.test_set: i for i, same in enumerate(test_sets)}
    compared = [(some, compare_pairs(some)) for some in select_models(configs)]
    budget = [folders.PLOT_BYTES]
    by_start = sorted(found.attention_runs, key=lambda run: run.config().get("started", ""))
    attention = [folders.attention(run, found, budget) for run in by_start]
    return {
        "heading": f"ViT Lab: {title[0].lower()}{title[1:]}",
        "title": title,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "summary": sentences.summary(configs),
        "provenance": sentences.provenance(found),
        "significance": sentences.pairs_sentence(configs),
        "cards": _cards(results, configs, ids, attention),
        "runs": [_run(i, run, test_set_ids, found.place) for i, run in enumerate(runs)],
        "seeds": [_seeds(c, ids) for c in without_trials if len(c.runs) > 1],
        "test_sets": [
            {
                "name": same[0].config["dataset"]["name"],
                "images": len(same[0].predictions.names),
                "classes": same[0].config["dataset"]["classes"],
            }
            for same in test_sets
        ],
        "comparisons": [
            {
                "reference": some[0].is_reference,
                "test_set": test_set_ids[some[0].predictions.test_set],
                "pairs": [_pair(pair, ids) for pair in pairs],
                "hardest": _hardest(some, ids, data_dir),
                "attribution": folders.ATTRIBUTIONS.get(some[0].constants["DATASET"], ""),
            }
            for some, pairs in compared
        ],
        "finetuning": [_tuning(group, ids) for group in finetuning_groups(without_trials)],
        "efficiency": [_efficiency(lines, ids) for lines in efficiencies(without_trials)],
        "sweeps": [folders.sweep(*sweep, found, budget) for sweep in found.sweeps],
        "attention": attention,
        "mode_files": folders.comparisons(runs, "*-modes.*", found),
        "score_files": folders.comparisons(found.attention_runs, "scores-*", found),
        "left_out": [
            {
                "folder": folder.as_posix(),
                "link": folders.link(folder, found.place),
                "reason": reason,
            }
            for folder, reason in found.left_out
        ],
    }


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Writes a page that shows `content`, as built by `build_content`.

    Raises: ValueError for numbers that are NaN or infinite; missing values must be None.
    """
    parts = {
        "made": html.escape(content["made"]),
        "provenance": _sentence(content["provenance"]),
        "palette": plots.css_palette(),
        "summary": "\n".join(f"<li>{_sentence(text)}</li>" for text in content["summary"]),
    }
    drawn = {name: part for name, part in content.items() if name not in ("heading", *parts)}
    web_page.write_page(path, _TEMPLATE, content["heading"], parts, drawn)


def _run(i: int, run: Record, test_set_ids: dict[str, int], place: Path) -> dict[str, Any]:
    """One run, finished or not."""
    config, metrics, predictions = run.config, run.metrics or {}, run.predictions
    timing = metrics if run.timing_is_valid else {}
    low, high = metrics.get("test_accuracy_95", (None, None))
    hardware, versions = config.get("hardware", {}), config.get("versions", {})
    history = _thinned(run.history)
    confusion = calibration = None
    if predictions:
        cells, counts = np.unique(
            np.stack([predictions.labels, predictions.predicted]), axis=1, return_counts=True
        )
        confusion = [[int(r), int(c), int(n)] for (r, c), n in zip(cells.T, counts, strict=True)]
        bins = stats.reliability(predictions.confidence, predictions.correct)
        calibration = [list(b) for b in bins]
    return {
        "id": i,
        "name": run.folder.name,
        "folder": run.folder.as_posix(),
        "link": folders.link(run.folder, place),
        "files": folders.files(run.folder, _RUN_FILES, place),
        "kind": run.kind,
        "recipe": run.recipe,
        "whole": run.share == 1 and not run.sweep,
        "task": f"Sweep {run.sweep.name}" if run.sweep else run.task,
        "reference": run.is_reference,
        "state": "finished" if metrics else "stopped",
        "dataset": config["dataset"]["name"] + f", {100 * run.share:g} %" * (run.share < 1),
        "model": run.model,
        "seed": run.constants.get("SEED"),
        "test_set": test_set_ids[predictions.test_set] if predictions else None,
        "accuracy": metrics.get("test_accuracy"),
        "low": low,
        "high": high,
        "test_images": metrics.get("test_images"),
        "val_accuracy": metrics.get("val_accuracy"),
        "calibration_error": metrics.get("calibration_error"),
        "parameters": config["model"]["parameters"],
        "trained_parameters": config["model"]["trainable_parameters"],
        "macs": config["model"]["macs"],
        "seconds": timing.get("training_seconds"),
        "images_per_second": timing.get("images_per_second"),
        "memory_mb": metrics.get("peak_memory_mb"),
        "epochs": metrics.get("epochs", len(run.history)),
        "best_epoch": metrics.get("best_epoch"),
        "curves": {
            key: [float(f"{row[key]:.{_CURVE_DIGITS}g}") for row in history]
            for key in ("epoch", *CURVES)
        },
        "confusion": confusion,
        "calibration": calibration,
        "command": config["command"],
        "commit": config.get("commit"),
        "uncommitted_changes": bool(config.get("uncommitted_changes")),
        "started": config.get("started"),
        "hardware": ", ".join(
            f"{hardware[key]}{unit}" for key, unit in _UNITS.items() if hardware.get(key)
        ),
        "versions": ", ".join(
            [f"Python {config.get('python')}", *(f"{k} {v}" for k, v in versions.items())]
        ),
        "notes": config["dataset"].get("remarks", [])
        + config.get("pretrained", {}).get("notes", []),
    }


def _thinned(history: list[dict]) -> list[dict]:
    """At most _CURVE_POINTS evenly spaced epochs, including the first and the last one."""
    if len(history) <= _CURVE_POINTS:
        return history
    indices = np.linspace(0, len(history) - 1, _CURVE_POINTS).round().astype(int)
    return [history[i] for i in indices]


def _seeds(c: Configuration, ids: dict[Path, int]) -> dict[str, Any]:
    return {
        "name": c.name,
        "task": c.first.task,
        "dataset": c.first.config["dataset"]["name"],
        "mean": c.mean,
        "std": c.std,
        "runs": [ids[run.folder] for run in c.runs],
    }


def _cards(results: MainResults, configs: list[Configuration], ids: dict[Path, int],
           attention: list[dict[str, Any]]) -> list[dict[str, Any]]:  # fmt: skip
    """The cards that the page starts with; a card without a run shows the command to start one."""
    cards = [
        ("ViT from scratch", results.vit, sentences.vit_sentence(results), "python train.py"),
        ("CNN twin", results.cnn, sentences.cnn_sentence(results), "python cnn_baseline.py"),
        ("Fine-tuned", results.finetuned, sentences.finetuned_sentence(results, configs),
         "python finetune.py"),
    ]  # fmt: skip
    made = []
    for title, c, sentence, command in cards:
        run = c.first.folder.parts[-2:] if c else None  # script and name
        its = [one for one in attention if one["model"] == run and not one["reference"]]
        pages = [{key: one[key] for key in ("page", "live")} for one in its if one["page"]]
        examples = [one["example"] for one in its if one["example"]]
        low, high = c.around if c else (None, None)
        made.append({
            "title": title,
            "run": ids[c.first.folder] if c else None,
            "accuracy": c.mean if c else None,
            "low": low,
            "high": high,
            "seeds": len(c.runs) if c else 0,
            "sentence": sentence,
            "command": command,
            "attention": examples[-1] if examples else None,  # of the newest run
            "page": pages[-1] if pages else None,
        })  # fmt: skip
    return made


def _pair(pair: Pair, ids: dict[Path, int]) -> dict[str, Any]:
    return {
        "a": ids[pair.a.folder],
        "b": ids[pair.b.folder],
        "only_a": pair.only_a,
        "only_b": pair.only_b,
        "p": pair.p,
        "p_holm": pair.p_holm,
        "summary": sentences.pair_sentence(pair),
    }


def _hardest(compared: list[Record], ids: dict[Path, int], data_dir: Path) -> list[dict[str, Any]]:
    """The hardest test images, with the answer of each model."""
    run = compared[0]
    predictions, classes = run.predictions, run.config["dataset"]["classes"]
    hardest = []
    for index in hardest_images(compared):
        name = predictions.names[index]
        answers = [
            {
                "run": ids[other.folder],
                "prediction": classes[other.predictions.predicted[index]],
                "confidence": float(other.predictions.confidence[index]),
                "correct": bool(other.predictions.correct[index]),
            }
            for other in compared
        ]
        hardest.append({
            "image": name,
            "label": classes[predictions.labels[index]],
            "thumbnail": folders.thumbnail(run.constants["DATASET"], name, data_dir),
            "answers": answers,
        })  # fmt: skip
    return hardest


def _accuracy(c: Configuration, ids: dict[Path, int]) -> dict[str, Any]:
    """A configuration's accuracy with its interval, for a point in a chart."""
    low, high = c.around
    return {"run": ids[c.first.folder], "accuracy": c.mean, "low": low, "high": high,
            "seeds": len(c.runs)}  # fmt: skip


def _tuning(group: list[Configuration], ids: dict[Path, int]) -> dict[str, Any]:
    first = group[0].first
    modes = [c.first.mode for c in group]

    def label(run: Record) -> str:
        rates = str(run.constants.get("RATES")).strip("[]")
        return run.mode + f", learning rate {rates}" * (modes.count(run.mode) > 1)

    size = first.constants.get("IMG_SIZE")
    recipe = f"{size} pixels, {first.recipe}" if size else first.recipe
    return {
        "title": f"{first.pretrained} on {first.test_set}, {recipe}",
        "reference": first.is_reference,
        "points": [
            {
                **_accuracy(c, ids),
                "label": label(c.first),
                "trained": c.first.config["model"]["trainable_parameters"],
                "seconds": c.seconds if c.timing_is_valid else None,
                "memory_mb": c.first.metrics.get("peak_memory_mb"),
            }
            for c in group
        ],
    }


def _efficiency(lines: list[list[Configuration]], ids: dict[Path, int]) -> dict[str, Any]:
    labels = distinct_labels((line[-1].first.label, "", line[-1].name) for line in lines)
    return {
        "title": lines[0][0].first.test_set,
        "reference": lines[0][0].first.is_reference,
        "series": [
            {
                "label": label,
                "points": [
                    {
                        **_accuracy(c, ids),
                        "fraction": c.first.share,
                        "images": sentences.train_images(c),
                    }
                    for c in line
                ],
            }
            for line, label in zip(lines, labels, strict=True)
        ],
        "summary": sentences.efficiency_sentence(lines),
    }


def _sentence(text: str) -> str:
    """A sentence as HTML, without line breaks between a number and its unit."""
    return html.escape(text).replace(" %", "&nbsp;%")
