"""Classical classifiers on raw pixels, the yardstick for a ViT trained from scratch.

    python -m benchmarks.pixel_baselines               # mnist-5k, about a minute on one CPU core

An RBF support vector machine and a linear model (multinomial logistic regression), both from
scikit-learn, are trained on the pixels of the training split. The validation split chooses their
regularization, as it chooses the epoch of our runs. The test split is used once. The table and the
record go to OUT.
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lab.core import UserError, checkpoints, constants, run_script, runtime, stats
from lab.data import datasets, load_data

DATASET: str = "mnist-5k"  # a name or a folder, as in train.py; small images, because all are held
DATA_DIR: str = "data"  # folder for downloads
VAL_FRACTION: float = 0.1  # fraction of the training images used for validation, as in train.py
OUT: str = "benchmarks/local"  # folder of the record

GRIDS = {"rbf-svm": [1.0, 3.0, 10.0, 30.0], "linear": [1e-3, 1e-2, 1e-1, 1.0]}  # values of C


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if datasets.native_size(c.DATASET) is None:
        raise UserError(f"DATASET={c.DATASET!r} consists of photographs; use small images")
    data = load_data(c.DATASET, c.DATA_DIR, None, c.VAL_FRACTION)
    splits = {name: _pixels(getattr(data, name)) for name in ("train", "val", "test")}
    rows = [_fit(name, splits) for name in GRIDS]
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.pixel_baselines", *sys.argv[1:]]),
        "dataset": data.summary(),
        "hardware": runtime.hardware(),
        "models": rows,
    }
    path = Path(c.OUT, f"pixel_baselines-{data.label}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(path, record)
    for row in rows:
        low, high = row["test_accuracy_95"]
        print(
            f"{row['model']:<8} C={row['C']:<6g} validation {100 * row['val_accuracy']:.1f} %, "
            f"test {100 * row['test_accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        )
    print(path)


def _pixels(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, C*H*W) between 0 and 1, and labels (N,)."""
    images = split.images(slice(0, len(split)))
    return images.reshape(len(images), -1).double().numpy() / 255, split.labels.numpy()


def _fit(name: str, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Trains one kind of classifier with each C and tests the one that validation chooses."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    candidates = []
    for c in GRIDS[name]:
        model = SVC(C=c) if name == "rbf-svm" else LogisticRegression(C=c, max_iter=300)
        model.fit(*splits["train"])
        candidates.append((model.score(*splits["val"]), c, model))
    val_accuracy, c, model = max(candidates, key=lambda candidate: candidate[0])
    images, labels = splits["test"]
    correct = model.predict(images) == labels
    low, high = stats.wilson_interval(correct.sum(), len(correct))
    return {
        "model": name,
        "C": c,
        "val_accuracy": round(val_accuracy, 4),
        "test_accuracy": round(correct.mean(), 4),
        "test_accuracy_95": [round(low, 4), round(high, 4)],
        "test_images": len(correct),
    }


if __name__ == "__main__":
    run_script(main)
