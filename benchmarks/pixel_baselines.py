"""Classical classifiers on raw pixels, as baselines for a ViT trained from scratch.

    python -m benchmarks.pixel_baselines               # mnist-5k, about a minute on one CPU core

Trains scikit-learn's RBF support vector machine and its multinomial logistic regression on the
training split. The validation split selects the regularization; the test split is used once.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from benchmarks import table
from lab.core import UserError, checkpoints, constants, runtime, stats
from lab.data import datasets, load_data

DATASET: str = "mnist-5k"  # a name or a folder, as in train.py, with small images
DATA_DIR: str = "data"  # folder for downloads
VAL_FRACTION: float = 0.1  # fraction of the training images used for validation, as in train.py
OUT: str = "benchmarks/local"  # folder of the record

MODELS = {
    "rbf-svm": [SVC(C=c) for c in (1.0, 3.0, 10.0, 30.0)],
    "linear": [LogisticRegression(C=c, max_iter=300) for c in (1e-3, 1e-2, 1e-1, 1.0)],
}


def main() -> None:
    constants.override(sys.modules[__name__])
    if datasets.native_size(DATASET) is None:
        raise UserError(f"DATASET={DATASET!r} consists of photographs; use small images")
    data = load_data(DATASET, DATA_DIR, None, VAL_FRACTION)
    train, val, test = (pixels(split) for split in (data.train, data.val, data.test))
    rows = []
    for name, candidates in MODELS.items():
        model = max(candidates, key=lambda model: model.fit(*train).score(*val))
        correct = model.predict(test[0]) == test[1]
        low, high = stats.wilson_interval(correct.sum(), len(correct))
        rows.append({
            "model": name, "C": model.C, "val_accuracy": round(model.score(*val), 4),
            "test_accuracy": round(correct.mean(), 4),
            "test_accuracy_95": [round(low, 4), round(high, 4)], "test_images": len(correct),
        })  # fmt: skip
        print(
            f"{name}, C={model.C:g}: test accuracy {correct.mean():.1%} ({low:.1%} to {high:.1%})"
        )
    path = Path(OUT, f"pixel_baselines-{data.run_name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**table.provenance(), "dataset": data.summary(), "models": rows}
    checkpoints.write_json(path, record)
    print(path)


def pixels(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, C*H*W) between 0 and 1, and labels (N,)."""
    images = split.images(slice(0, len(split)))
    return images.reshape(len(images), -1).double().numpy() / 255, split.labels.numpy()


if __name__ == "__main__":
    runtime.run_script(main)
