"""The end of a run: its test images, predicted once, become metrics, tables and pictures.

The same run from several seeds: how much of a result is luck?
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.core import Run, UserError, checkpoints, runtime
from lab.data.datasets import Dataset


@dataclass(frozen=True)
class Predictions:
    """A model on a split: logits (N, classes) and labels (N,) in the split's order, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        return torch.nn.functional.cross_entropy(self.logits, self.labels).item()

    @property
    def correct(self) -> Tensor:
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()


def write_results(
    run: Run,
    scores: Predictions,
    data: Dataset,
    history: list[dict],
    best_epoch: int,
    extra: dict | None = None,
) -> dict:
    """Writes predictions.csv, the pictures and, last, metrics.json, which marks a finished run.

    extra: entries for metrics.json beside, or instead of, the usual ones.
    """
    # Imported here, at the end: they take a third of the time that a script needs to start.
    from sklearn.metrics import confusion_matrix

    from lab.core import plots, stats

    confidence, predicted = scores.logits.double().softmax(1).max(1)
    labels, correct = scores.labels.numpy(), scores.correct.numpy()
    matrix = confusion_matrix(labels, predicted.numpy(), labels=range(len(data.classes)))
    costs = run.config()["model"]
    small = costs.get("small_images", {"epochs": 0})

    rows: list[dict[str, Any]] = [
        {
            "image": name,
            "label": data.classes[label],
            "prediction": data.classes[guess],
            "confidence": f"{sure:.4f}",
        }
        for name, label, guess, sure in zip(
            data.test.names, labels, predicted.tolist(), confidence.tolist(), strict=True
        )
    ]
    checkpoints.write_atomically(
        run.folder / "predictions.csv", lambda scratch: checkpoints.write_rows(scratch, rows)
    )

    low, high = stats.wilson_interval(correct.sum(), len(correct))
    best = next(row for row in history if row["epoch"] == best_epoch)
    seconds = sum(row["seconds"] for row in history)
    per_class = {
        name: round(matrix[i, i] / matrix[i].sum(), 4) if matrix[i].sum() else None
        for i, name in enumerate(data.classes)
    }
    metrics = {
        "test_accuracy": round(scores.accuracy, 6),
        "test_accuracy_95": [round(low, 4), round(high, 4)],
        "test_images": len(correct),
        "test_loss": round(scores.loss, 6),
        "calibration_error": round(stats.calibration_error(confidence.numpy(), correct), 4),
        "best_epoch": best_epoch,
        "val_accuracy": best["val_accuracy"],
        "epochs": len(history),
        "training_seconds": round(seconds, 1),
        "images_per_second": round(
            np.median([r["images_per_second"] for r in history if r["epoch"] > small["epochs"]])
        ),
        "training_flops": sum(
            row["images"] * (costs if row["epoch"] > small["epochs"] else small)["training_flops"]
            for row in history
        ),
        "peak_memory_mb": history[-1]["peak_memory_mb"],
        **(extra or {}),
        "per_class_accuracy": per_class,
    }
    title = f"{run.folder.name} on {data.name}"
    plots.plot_curves(run.folder / "curves.png", history, title, best_epoch, small)
    plots.plot_confusion(
        run.folder / "confusion.png",
        matrix,
        data.classes,
        f"{title}: {100 * scores.accuracy:.1f} % of {len(correct)} test images are right",
    )
    checkpoints.write_json(run.folder / "metrics.json", metrics)
    return metrics


def over_seeds(values: dict[str, Any], run_one: Callable[[dict[str, Any]], Run]) -> None:
    """Makes NUM_SEEDS runs, from SEED on, and says what came out over all of them.

    Each is the run that its seed alone would give, in a folder of its own, so an interrupted series
    goes on where it stopped.

    Args:
        values: a script's constants.
        run_one: makes the run of such constants.

    Raises: UserError, for less than one seed.
    """
    count, first, name = values["NUM_SEEDS"], values["SEED"], values["NAME"]
    if count < 1:
        raise UserError(f"NUM_SEEDS={count} must be at least 1, such as 5")
    if count == 1:
        run_one(values)
        return
    runs = []
    for seed in range(first, first + count):
        if runtime.process_state().is_main_process:
            print(f"\n--- seed {seed} ---", flush=True)
        own = name and f"{name}-s{seed}"
        runs.append(run_one({**values, "SEED": seed, "NAME": own}))
    if runtime.process_state().is_main_process:
        print(f"\n{spread([run.metrics()['test_accuracy'] for run in runs])}")


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation of test accuracies (shares of 1) over seeds, in words."""
    percent = [100 * accuracy for accuracy in accuracies]
    single = ", ".join(f"{value:.2f}" for value in percent)
    return (
        f"test accuracy over {len(percent)} seeds: mean {statistics.mean(percent):.2f} %, standard "
        f"deviation {statistics.stdev(percent):.2f} points ({single})"
    )
