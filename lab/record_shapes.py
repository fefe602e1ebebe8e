"""What the records of a run must hold to be believed; anybody may have edited a file."""

import math
from collections.abc import Callable
from typing import Any


class Broken(Exception):
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
        raise Broken(f"{name}: {problem}")


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
