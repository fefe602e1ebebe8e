"""Finds images that a model may have been trained on, among those that predict.py classifies.

A run records its test images in predictions.csv. If its dataset has no folder test/, they were
drawn at random, and the other images of the same folders were used for training and validation.
"""

import csv
import os
from pathlib import Path

from lab.data import images
from lab.sharing.predictions import Images, SplitImages


def tested_images(folder: Path | None) -> set[str]:
    """Names of the test images of the run in `folder`; empty without predictions.csv."""
    path = folder / "predictions.csv" if folder else None
    if path is None or not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {name for row in csv.DictReader(file) if (name := row.get("image"))}


def is_moved_dataset(source: str, dataset: str | None, tested: set[str]) -> bool:
    """Whether a folder is the dataset of a run in another place.

    It then has the same name, apart from upper and lower case, and contains all test images.

    Args:
        source: the folder.
        dataset: the name of the dataset that the run recorded.
        tested: names of its test images.
    """
    folder = Path(source).expanduser()
    if not dataset or not tested or not os.path.isdir(folder):
        return False
    has_same_name = folder.resolve().name.lower() == Path(dataset).name.lower()
    return has_same_name and all(os.path.exists(folder / name) for name in tested)


def leakage_warning(source: Images, is_dataset: bool, tested: set[str]) -> str | None:
    """A warning if the model may have been trained on some of these images.

    Args:
        source: single files, or the test split of a dataset.
        is_dataset: the source is the dataset that the model was trained on.
        tested: names of the test images of the run that trained the model.
    """
    if not tested:
        return None
    if isinstance(source, SplitImages):
        # A split that is drawn from train/ is drawn again when images are added or renamed.
        count = sum(name not in tested for name in source.split.names) if is_dataset else 0
        if not count:
            return None
        return (
            f"the images in {source.data.name} have changed since this model was trained. It may "
            f"have been trained on {count} of these {len(source)} test images, so its accuracy "
            "would be too high. Keep test images in test/, and train again"
        )
    if any(name.startswith("test/") for name in tested):  # new images there were not in training
        return None
    count = sum(_is_tested(path, tested) for path in source.paths)
    if count in (0, len(source)):
        return None
    return (
        f"{count} of these {len(source)} images have the names of test images of the run that "
        "trained this model. If they are from its dataset, it may have been trained on the others, "
        "so its accuracy would be too high"
    )


def _is_tested(path: Path, tested: set[str]) -> bool:
    """Whether a path ends with the name of a test image, such as cat/1.png."""
    parts = images.printable(path.absolute().as_posix()).split("/")
    return any("/".join(parts[i:]) in tested for i in range(len(parts)))
