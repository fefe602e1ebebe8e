"""Reads one file of a run, and checks that it contains what it must.

A damaged file raises InvalidRecord with the reason, and nothing else.
"""

import csv
import hashlib
import io
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CURVES = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
History = list[dict[str, float]]  # one dictionary per epoch: "epoch" and CURVES


class InvalidRecord(Exception):
    """The reason why a folder cannot be shown, as a message for the user."""


@dataclass(frozen=True)
class Predictions:
    """The prediction for every test image; labels and predictions are class indices, (N,)."""

    test_set: str  # hash of image names, labels and classes: equal for runs on the same images
    names: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.predicted


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object whose numbers are all finite. Raises: InvalidRecord."""
    text = _read_text(path)
    try:
        content = json.loads(
            text, parse_constant=_finite, parse_float=_finite, parse_int=_finite_integer
        )
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path.name} does not contain an object")
    return content


def read_predictions(path: Path, classes: list[str]) -> Predictions:
    """Reads predictions.csv. Raises: InvalidRecord."""
    index = {name: i for i, name in enumerate(classes)}
    try:
        head, *rows = csv.reader(io.StringIO(_read_text(path), newline=""))
        if head != ["image", "label", "prediction", "confidence"]:
            raise InvalidRecord(f"predictions.csv has unexpected columns: {', '.join(head)}")
        names, labels, predicted, confidence = zip(*rows, strict=True)
        probabilities = np.array([float(text) for text in confidence])
        if not ((probabilities >= 0) & (probabilities <= 1)).all():  # also refuses NaN
            raise InvalidRecord("predictions.csv has a confidence outside the range 0 to 1")
        identity = "\0".join([*names, *labels, *classes]).encode(errors="surrogatepass")
        return Predictions(
            hashlib.blake2b(identity, digest_size=8).hexdigest(),
            list(names),
            np.array([index[name] for name in labels]),
            np.array([index[name] for name in predicted]),
            probabilities,
        )
    except KeyError as error:
        raise InvalidRecord(f"predictions.csv has the unknown class {error}") from error
    except (ValueError, csv.Error) as error:
        raise InvalidRecord(f"predictions.csv cannot be read ({error})") from error


def read_history(path: Path) -> History:
    """The curves of the epochs so far; an empty list before the first one."""
    keys = ("epoch", *CURVES)
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
        rows = [{key: float(row[key]) for key in keys} for row in reader]
    except KeyError as error:
        raise InvalidRecord(f"history.csv has no column {error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise InvalidRecord(f"history.csv cannot be read ({error})") from error
    for row in rows:
        for key, value in row.items():
            largest = 1 if "accuracy" in key else np.finfo(float).max
            if not 0 <= value <= largest:  # also refuses NaN
                raise InvalidRecord(f"history.csv: {key} is {value} in epoch {row['epoch']:g}")
    return rows


def _read_text(path: Path) -> str:
    """The text of a regular file; a pipe or device would block. Raises: InvalidRecord."""
    if not path.exists():
        raise InvalidRecord(f"{path.name} is missing")
    if not path.is_file():
        raise InvalidRecord(f"{path.name} is not a regular file")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise InvalidRecord(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InvalidRecord(f"{path.name} is not UTF-8 text ({error})") from error
    if "\0" in text:
        raise InvalidRecord(f"{path.name} contains NUL bytes: the file is damaged")
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _finite_integer(text: str) -> int:
    _finite(text)
    return int(text)


# What the records must contain. A key that ends in a question mark is optional; [x] is a list of x.


class _Kind(NamedTuple):
    description: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _optional(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.description} or null", lambda v: v is None or kind.accepts(v))


_NUMBER = _Kind("a non-negative number", _is_number)
_COUNT = _Kind("a count", lambda v: _is_number(v) and isinstance(v, int) and v < 2**53)
_FRACTION = _Kind("a number from 0 to 1", lambda v: _is_number(v) and v <= 1)
TEXT = _Kind("text", lambda v: isinstance(v, str))

ATTENTION_CONFIG = {
    "command": TEXT, "dataset": {"name": TEXT}, "started?": TEXT, "constants?": {},
}  # fmt: skip
CONFIG = {
    "constants": {"SEED?": _NUMBER, "TRAIN_FRACTION?": _FRACTION, "DATASET": TEXT,
                  "EPOCHS": _COUNT, "PRETRAINED?": TEXT},
    "dataset": {"train": _COUNT, "train_images?": _COUNT, "classes": [TEXT], "remarks?": [TEXT]},
    "model": {"parameters": _COUNT, "trainable_parameters": _COUNT, "macs": _NUMBER},
    "pretrained?": {"notes?": [TEXT]},
    "twin_of?": {"model": TEXT},
    "hardware?": {"threads?": _optional(_COUNT)},
    "versions?": {},
    "commit?": _optional(TEXT),
    "started?": TEXT,
    "data?": _optional(TEXT),
    "load?": _optional(_NUMBER),
}  # fmt: skip
METRICS = {
    "test_accuracy": _FRACTION, "test_accuracy_95": [_FRACTION], "val_accuracy": _FRACTION,
    "calibration_error": _FRACTION, "test_images": _COUNT, "best_epoch": _COUNT, "epochs": _COUNT,
    "training_seconds": _NUMBER, "images_per_second": _NUMBER,
    "peak_memory_mb?": _optional(_NUMBER),
    "load?": _optional(_NUMBER),
}  # fmt: skip
SWEEP = {
    "says": TEXT,
    "trials": [{"number": _COUNT, "state": TEXT, "params": {},
                "val_accuracy?": _optional(_FRACTION), "epochs?": _optional(_COUNT),
                "folder?": _optional(TEXT)}],
}  # fmt: skip
SCORES = {"title": TEXT, "methods": {}}


def check(value: Any, shape: Any, name: str) -> None:
    """Raises InvalidRecord that names the first entry of the file `name` that does not fit."""
    if problem := _misfit(value, shape, ""):
        raise InvalidRecord(f"{name}: {problem}")


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """A description of the first entry that does not fit; None if all entries fit."""
    prefix = f"{where}." if where else ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where or 'the content'} is {reprlib.repr(value)}, which is not an object"
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name not in value:
                if name == key:
                    return f"{prefix}{name} is missing"
            elif problem := _misfit(value[name], inner, prefix + name):
                return problem
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is {reprlib.repr(value)}, which is not a list"
        problems = (_misfit(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))
        return next(filter(None, problems), None)
    if not shape.accepts(value):
        return f"{where} is {reprlib.repr(value)}, which is not {shape.description}"
    return None
