"""What the records of a run must hold to be believed; anybody may have edited a file.

Every run below a folder, read and checked; what cannot be believed is left out, with the reason.

A number in a report is only as good as the file that it comes from: records that contradict each
other, or that another version of the lab wrote, are not shown as if nothing were wrong.
"""

import csv
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lab.attention.score_report import verdict
from lab.core import Run, runtime
from lab.finetuning.modes import mode_label
from lab.training.state import History


class InvalidRecord(Exception):
    """Why a folder cannot be shown, in words for its owner."""


def count(value: Any) -> bool:
    """A finite number that is not negative."""
    usual = isinstance(value, int | float) and not isinstance(value, bool)
    return usual and math.isfinite(value) and value >= 0


def share(value: Any) -> bool:
    return count(value) and value <= 1


def or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def text(value: Any) -> bool:
    return isinstance(value, str)


# A key with a question mark may be missing; [shape] is a list of such.
LOOK = {"command": text, "dataset": {"name": text}}
CONFIG = {
    "command": text,
    "constants": {"SEED?": count, "TRAIN_FRACTION?": share, "DATASET": text, "EPOCHS": count},
    "dataset": {"name": text, "train": count, "train_images?": count, "classes": [text],
                "remarks?": [text]},
    "model": {"parameters": count, "trainable_parameters": count, "macs": count},
    "pretrained?": {"notes?": [text]},
    "twin_of?": {"model": text},
    "hardware?": {},
    "versions?": {},
    "commit?": or_none(text),
    "started?": text,
}  # fmt: skip
METRICS = {
    "test_accuracy": share, "test_accuracy_95": [share], "val_accuracy": share,
    "calibration_error": share, "test_images": count, "best_epoch": count, "epochs": count,
    "training_seconds": count, "images_per_second": count, "peak_memory_mb?": or_none(count),
}  # fmt: skip
SWEEP = {
    "says": text,
    "trials": [{"number": count, "state": text, "params": {}, "val_accuracy?": or_none(share),
                "epochs?": or_none(count), "folder?": or_none(text)}],
}  # fmt: skip


def check(value: Any, shape: Any, name: str) -> None:
    """Raises: Broken, naming the first entry of the file `name` that cannot be."""
    problem = misfit(value, shape, "")
    if problem:
        raise InvalidRecord(f"{name}: {problem}")


def misfit(value: Any, shape: Any, where: str) -> str | None:
    """The first entry that does not fit, in words; None if all do."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where or 'it'} is no object"
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name not in value:
                if name == key:
                    return f"{where}{name} is missing"
                continue
            if problem := misfit(value[name], inner, f"{where}{name}."):
                return problem
        return None
    where = where.rstrip(".")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        problems = (misfit(v, shape[0], f"{where}[{i}].") for i, v in enumerate(value))
        return next(filter(None, problems), None)
    return None if shape(value) else f"{where} is {value!r}, which cannot be"


TASKS = {  # by script, in the order of the lab
    "train.py": "From scratch",
    "cnn_baseline.py": "CNN twin",
    "finetune.py": "Fine-tuning",
    "finetune_swin.py": "Swin and other models",
}
# What a run of before a constant did; without them it would seem the twin of any later run.
EARLIER = {"TRAIN_FRACTION": 1.0, "OPTIMIZER": "adamw", "PROGRESSIVE_RESIZE": 0.0}
MARKS = {"metrics.json", "history.csv", "predictions.csv", "best.safetensors", "last.pt"}
CURVES = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")


@dataclass(frozen=True)
class Predictions:
    """Every test image of a run; labels and predictions are indices into its classes, (N,)."""

    test_set: str  # of images and labels: equal for runs that were tested on the same images
    names: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.predicted


@dataclass(frozen=True)
class Record:
    """One run; without metrics and predictions as long as it is not finished."""

    folder: Path
    config: dict[str, Any]
    history: History
    metrics: dict[str, Any] | None
    predictions: Predictions | None
    sweep: Path | None  # the folder of the sweep whose trial it is

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {**EARLIER, **self.config["constants"]}

    @cached_property
    def script(self) -> str:
        """The script that made it, such as "train.py"."""
        return script_of(self.config)

    @property
    def task(self) -> str:
        return TASKS.get(self.script, self.script)

    @cached_property
    def model(self) -> str:
        """What was trained, such as "vit_64x4" or "vit_128x6_cifar10, head"."""
        c = self.constants
        if "PRETRAINED" in c:
            return f"{Path(c['PRETRAINED']).name.split('.')[0]}, {mode_label(c)}"
        if "twin_of" in self.config:
            return f"CNN twin of {self.config['twin_of']['model']}"
        return (
            c["MODEL"] if c.get("MODEL", "vit") != "vit" else f"vit_{c['EMBED_DIM']}x{c['DEPTH']}"
        )

    @property
    def label(self) -> str:
        """Task and model, such as "From scratch: vit_64x4"."""
        same = self.model.startswith(self.task)
        return self.model if same else f"{self.task}: {self.model}"

    @property
    def share(self) -> float:
        """The share of the training images that it saw."""
        return self.constants["TRAIN_FRACTION"]

    def key(self, *without: str) -> str:
        """The same for runs that differ in these constants alone."""
        rest = {k: v for k, v in self.constants.items() if k not in without}
        return json.dumps([self.script, self.config["dataset"]["name"], rest], sort_keys=True)


@dataclass
class Found:
    """What lies below a folder."""

    runs: list[Record] = field(default_factory=list)
    looks: list[Run] = field(default_factory=list)  # of attention_viz.py
    sweeps: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def read_runs(place: Path) -> Found:
    """Reads all runs, by their folders' names; nothing that a folder holds makes it fail."""
    found = Found()

    def unreadable(error: OSError) -> None:
        found.left_out.append((Path(error.filename), f"cannot be opened ({error.strerror})"))

    for root, inner, files in os.walk(place, onerror=unreadable):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        folder, names = Path(root), set(files)
        try:
            if names & {"study.journal", "sweep.json"}:  # of sweep.py, with its trials' runs
                found.sweeps.append((folder, read_sweep(folder / "sweep.json")))
            elif "config.json" in names:
                inner.clear()  # what lies in a run's folder is its own
                read(folder, found)
            elif held := sorted(names & MARKS):
                inner.clear()
                raise InvalidRecord(
                    f"config.json is missing beside {held[0]}: nobody knows what this was"
                )
            elif not inner and folder != place:
                held = ", ".join(sorted(names)[:3])
                raise InvalidRecord(f"no run's records; it holds {held}" if held else "it is empty")
        except InvalidRecord as why:
            found.left_out.append((folder, str(why)))
    return found


def read(folder: Path, found: Found) -> None:
    """Adds the run in a folder. Raises: Broken."""
    config = read_json(folder / "config.json")
    if (schema := config.get("schema")) != runtime.SCHEMA:
        raise InvalidRecord(
            f"written by another version of the lab (schema {schema!r}, not {runtime.SCHEMA})"
        )
    check(config, LOOK, "config.json")
    finished = (folder / "metrics.json").exists()
    if script_of(config) == "attention_viz.py":
        if not finished:
            raise InvalidRecord(
                "stopped before its pictures were done: the same command does it again"
            )
        check_look(read_json(folder / "metrics.json"))
        found.looks.append(Run(folder))
        return
    check(config, CONFIG, "config.json")
    history = read_history(folder)
    metrics = predictions = None
    if finished:
        metrics = read_json(folder / "metrics.json")
        check(metrics, METRICS, "metrics.json")
        if len(metrics["test_accuracy_95"]) != 2:
            raise InvalidRecord("metrics.json: test_accuracy_95 is no interval")
        predictions = read_predictions(folder / "predictions.csv", config["dataset"]["classes"])
        right = float(predictions.correct.mean())
        if abs(right - metrics["test_accuracy"]) > 1e-5:
            raise InvalidRecord(
                f"metrics.json says that {100 * metrics['test_accuracy']:.2f} % are right, and "
                f"predictions.csv {100 * right:.2f} %: one of them was changed"
            )
    if metrics and not any(row["epoch"] == metrics["best_epoch"] for row in history):
        raise InvalidRecord("history.csv lacks the best epoch of metrics.json")
    sweep = next((path for path, _ in found.sweeps if path in folder.parents), None)
    record = Record(folder, config, history, metrics, predictions, sweep)
    try:
        record.key(record.task, record.model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRecord(f"config.json does not say what was trained ({error!r})") from error
    if not finished and not sweep:
        total = config["constants"]["EPOCHS"]
        found.left_out.append((folder, f"stopped after epoch {len(history)} of {total}; it goes on "
                                       f"with: {config['command']}"))  # fmt: skip
    if finished or history:
        found.runs.append(record)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRecord(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path.name} holds no object")
    return content


def script_of(config: dict[str, Any]) -> str:
    """The script in a record's command, "train.py". Raises: Broken."""
    try:
        return Path(shlex.split(config["command"])[1]).name
    except (ValueError, IndexError) as error:
        raise InvalidRecord(
            f"config.json: the command {config['command']!r} names no script"
        ) from error


def check_look(metrics: dict[str, Any]) -> None:
    try:
        if "animal_share" in metrics:  # of --score
            verdict(metrics)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidRecord(f"metrics.json is no record of scores ({error!r})") from error


def read_history(folder: Path) -> History:
    """The curves alone, of as many epochs as there are."""
    path, keys = folder / "history.csv", ("epoch", *CURVES)
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{key: float(row[key]) for key in keys} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InvalidRecord(f"history.csv cannot be read ({error!r})") from error
    values = np.array([list(row.values()) for row in rows]).reshape(-1, len(keys))
    top = [1 if "accuracy" in key else np.finfo(float).max for key in keys]
    if not ((values >= 0) & (values <= top)).all():  # NaN is neither
        raise InvalidRecord("history.csv has a value that cannot be")
    return rows


def read_predictions(path: Path, classes: list[str]) -> Predictions:
    index = {name: i for i, name in enumerate(classes)}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        if head != ["image", "label", "prediction", "confidence"]:
            raise InvalidRecord(f"predictions.csv has the columns {', '.join(head)}")
        names, labels, predicted, confidence = zip(*rows, strict=True)
        sure = [float(text) for text in confidence]
        check(sure, [share], "predictions.csv")
        return Predictions(
            hashlib.blake2b("\0".join([*names, *labels]).encode(), digest_size=8).hexdigest(),
            list(names),
            np.array([index[name] for name in labels]),
            np.array([index[name] for name in predicted]),
            np.array(sure),
        )
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InvalidRecord(f"predictions.csv cannot be read ({error!r})") from error


def read_sweep(path: Path) -> dict[str, Any]:
    content = read_json(path)
    check(content, SWEEP, path.name)
    return content
