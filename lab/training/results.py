"""The results of a run: metrics, predictions, figures and TensorBoard files; series of seeds."""

import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab.core import Run, UserError, checkpoints, constants, machine, runtime
from lab.data import Dataset
from lab.models import profile_model


@dataclass(frozen=True)
class Predictions:
    """Logits (N, classes) and labels (N,) of a split, in the split's order, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy, without label smoothing."""
        return torch.nn.functional.cross_entropy(self.logits, self.labels).item()

    @property
    def correct(self) -> Tensor:
        """Whether each prediction is correct, (N,) bool."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return self.correct.double().mean().item()


def write_results(
    run: Run,
    test: Predictions,
    data: Dataset,
    history: list[dict],
    best_epoch: int,
    extra: dict | None = None,
) -> None:
    """Writes predictions.csv, the figures and, last, metrics.json, which marks a finished run.

    Args:
        run: the folder.
        test: the predictions on the test split.
        data: the dataset.
        history: the rows of history.csv.
        best_epoch: the epoch whose weights were tested.
        extra: further entries of metrics.json; they replace entries of the same name.
    """
    from lab.core import plots, stats  # loads matplotlib

    confidence, predicted = test.logits.double().softmax(1).max(1)
    labels, correct = test.labels.numpy(), test.correct.numpy()
    matrix = np.zeros((len(data.classes), len(data.classes)), int)  # rows: true classes
    np.add.at(matrix, (labels, predicted.numpy()), 1)
    profile = run.config()["model"]
    small = profile.get("small_images", {"epochs": 0})

    rows: list[dict[str, Any]] = [
        {
            "image": name,
            "label": data.classes[label],
            "prediction": data.classes[prediction],
            "confidence": f"{probability:.4f}",
        }
        for name, label, prediction, probability in zip(
            data.test.names, labels, predicted.tolist(), confidence.tolist(), strict=True
        )
    ]
    checkpoints.write_atomically(
        run.folder / "predictions.csv", lambda scratch: checkpoints.write_rows(scratch, rows)
    )

    low, high = stats.wilson_interval(correct.sum(), len(correct))
    best = next(row for row in history if row["epoch"] == best_epoch)
    full_size = [row for row in history if row["epoch"] > small["epochs"]]
    per_class = {
        name: round(matrix[i, i] / matrix[i].sum(), 4) if matrix[i].sum() else None
        for i, name in enumerate(data.classes)
    }
    metrics = {
        "test_accuracy": round(test.accuracy, 6),
        "test_accuracy_95": [round(low, 4), round(high, 4)],
        "test_images": len(correct),
        "test_loss": round(test.loss, 6),
        "calibration_error": round(stats.calibration_error(confidence.numpy(), correct), 4),
        "best_epoch": best_epoch,
        "val_accuracy": best["val_accuracy"],
        "epochs": len(history),
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
        "images_per_second": round(np.median([row["images_per_second"] for row in full_size])),
        "training_flops": sum(
            row["images"] * (profile if row in full_size else small)["training_flops"]
            for row in history
        ),
        "peak_memory_mb": history[-1]["peak_memory_mb"],
        "load": machine.load_average(),
        **(extra or {}),
        "per_class_accuracy": per_class,
    }
    subject = f"{run.folder.name} on {data.name}"
    smoothing = run.config()["constants"].get("LABEL_SMOOTHING", 0)
    floor = label_smoothing_floor(smoothing, len(data.classes))
    plots.plot_curves(run.folder / "curves.png", history, subject, best_epoch, small, floor)
    plots.plot_confusion(run.folder / "confusion.png", matrix, data.classes, subject)
    checkpoints.write_json(run.folder / "metrics.json", metrics)


def label_smoothing_floor(smoothing: float, num_classes: int) -> float:
    """The minimum cross-entropy that smoothed targets allow, in nats: their entropy.

    Mixup and cutmix raise it further.
    """
    target = torch.full((num_classes,), smoothing / num_classes, dtype=torch.float64)
    target[0] += 1 - smoothing
    return torch.special.entr(target).sum().item()


class TensorBoardLogger:
    """Writes the scalars of each epoch to `<run>/tensorboard/`, to watch a run live.

    Args:
        folder: the run's folder.
        epoch: the next epoch. Points of this and later epochs, which an interrupted run may have
            written, are discarded.
    """

    def __init__(self, folder: Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row of history.csv; `train_loss` and `val_loss` share the group `loss`."""
        for name, value in row.items():
            part, _, rest = name.partition("_")
            tag = f"{rest}/{part}" if part in ("train", "val") else f"run/{name}"
            if value is not None and name != "epoch":
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()  # so that a kill loses nothing


def explain_more_epochs(run: Run) -> str | None:
    """A message for a new run that differs from a finished one only in EPOCHS; else None."""
    if run.finished or (run.folder / "last.pt").exists():
        return None
    ours = run.config()
    for path in sorted(run.folder.parent.glob("*/metrics.json")):
        try:
            theirs = Run(path.parent).config()
            epochs = theirs["constants"]["EPOCHS"]
            same = {**ours["constants"], "EPOCHS": epochs} == theirs["constants"]
            same = same and all(ours[key] == theirs[key] for key in ("data", "code"))
        except (UserError, KeyError, TypeError):
            continue  # a damaged record
        if not same or path.parent == run.folder:
            continue
        text = (
            f"{path.parent} is a finished run that differs only in EPOCHS={epochs}. This run "
            "starts from random weights, because the number of epochs changes the learning rate of "
            "every step."
        )
        if ours["model"]["class"] == "ResidualCNN":  # finetune.py cannot train it
            return text
        flags = {key: ours["constants"][key] for key in ("DATASET", "TRAIN_FRACTION")}
        words = ["finetune.py", "--pretrained", str(path.parent), *constants.as_flags(flags)]
        return f"{text} To train the finished model further instead: python {shlex.join(words)}"
    return None


def each_seed(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A script's constants for each of its NUM_SEEDS runs, whose seeds are SEED, SEED + 1, ...

    Each run has its own folder and is identical to a single run with that seed. An interrupted
    series therefore resumes where it stopped.

    Raises: UserError, for fewer than one seed.
    """
    count, first, name = values["NUM_SEEDS"], values["SEED"], values["NAME"]
    if count < 1:
        raise UserError(f"NUM_SEEDS={count} must be at least 1, such as 5")
    if count == 1:
        yield values
        return
    for seed in range(first, first + count):
        if runtime.process_state().is_main_process:
            print(f"\n--- seed {seed} ---", flush=True)
        yield {**values, "SEED": seed, "NAME": name and f"{name}-s{seed}"}


def summarize_seeds(runs: list[Run]) -> None:
    """Prints mean and standard deviation of the test accuracy over runs that differ in the seed."""
    if len(runs) < 2 or not runtime.process_state().is_main_process:
        return
    percent = [100 * run.metrics()["test_accuracy"] for run in runs]
    print(
        f"\ntest accuracy over {len(percent)} seeds: mean {statistics.mean(percent):.2f} %, "
        f"standard deviation {statistics.stdev(percent):.2f} percentage points "
        f"({', '.join(f'{value:.2f}' for value in percent)})"
    )


def profile_small_images(
    model: nn.Module, image_shape: tuple[int, ...], epochs: int
) -> dict[str, Any]:
    """The entry `small_images` for a run that trains on smaller images in its first `epochs`.

    Raises: UserError, for a model that does not accept them.
    """
    if not epochs:
        return {}
    side = image_shape[-1]
    try:
        flops = profile_model(model, image_shape)["training_flops"]
    except (ValueError, AssertionError, RuntimeError) as error:  # model.py's and timm's errors
        raise UserError(
            f"PROGRESSIVE_RESIZE first trains on images of {side} pixels, which this model does "
            f"not accept ({str(error).rstrip('.')}). Set it to 0; a timm ViT accepts them with "
            'MODEL_ARGS="dynamic_img_size=True", where PATCH_SIZE is its patch size.'
        ) from error
    return {"small_images": {"epochs": epochs, "img_size": side, "training_flops": flops}}
