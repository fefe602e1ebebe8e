"""Only the output layer is trained: on cached features, with a sweep over rate and weight decay."""

import copy
import itertools
from dataclasses import replace

from torch import nn

from lab.checkpoints import load_strictly, load_weights
from lab.compute import model_facts
from lab.engine import fit
from lab.errors import UserError
from lab.features import FeatureLoaders
from lab.fit_config import FitConfig
from lab.models import save_model
from lab.optim import adamw
from lab.outcome import Scores, record
from lab.processes import processes
from lab.runs import Run
from lab.weights import classifier


def train_head(
    model: nn.Module,
    loaders: FeatureLoaders,
    config: FitConfig,
    run: Run,
    sweep: tuple[list[float], list[float]],
    feature_seconds: float,
) -> None:
    """Trains one head for each rate and weight decay; validation chooses, the test split judges.

    Args:
        model: on the CPU, with the head to start from; in the end it has the chosen one.
        loaders: features of the frozen rest, and their labels.
        config: how each head is trained.
        run: the folder for the records; one that was stopped goes on with the heads left to do.
        sweep: rates, and weight decays.
        feature_seconds: what computing the features took, for the records.
    """
    data, start = loaders.data, classifier(model)
    if not isinstance(start, nn.Linear):
        raise UserError(f"the head is {type(start).__name__}, not linear: take MODE=top-k, TOP_K=1")
    main = processes().is_main_process
    if main:
        width = start.in_features
        print(f"{data.describe()}\nfeatures of {width} numbers, {feature_seconds:.1f} s to compute")
    trials = []
    for rate, decay in itertools.product(*sweep):
        trial = Run(run.folder / "sweep" / f"rate{rate:g}-decay{decay:g}")
        trial.folder.mkdir(parents=True, exist_ok=True)
        head = copy.deepcopy(start)
        optimizer = adamw(head, rate, decay)
        rows = fit(head, optimizer, loaders, replace(config, trial=True), trial)
        best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
        trials.append((best["val_accuracy"], -best["val_loss"], trial, rows, best))
        if main:
            accuracy = 100 * best["val_accuracy"]
            print(f"rate {rate:g}, weight decay {decay:g}: validation {accuracy:.1f} %")
    *_, trial, rows, best = max(trials, key=lambda entry: entry[:2])
    path = trial.folder / "best.safetensors"
    load_strictly(start, load_weights(path)[0], path)
    if not main:
        return
    logits = start(loaders.features["test"].cpu()).detach()
    save_model(run.folder / "best.safetensors", model, data.classes, loaders.preprocess, best)
    run.write_history(rows)
    extra = costs(model, loaders, [rows for *_, rows, _ in trials], feature_seconds)
    extra["chosen"] = trial.folder.name
    extra["sweep"] = {t.folder.name: accuracy for accuracy, _, t, *_ in trials}
    record(run, Scores(logits, data.test.labels), data, rows, best["epoch"], extra)
    print(run.summary())


def costs(
    model: nn.Module, loaders: FeatureLoaders, histories: list[list[dict]], seconds: float
) -> dict:
    """Seconds and FLOPs of the features and all heads of the sweep together."""
    views, count, width = loaders.features["train"].shape
    head = model_facts(classifier(model), (width,))
    size = loaders.preprocess.img_size
    whole = model_facts(model, (len(loaders.preprocess.mean), size, size))
    seen = sum(row["images"] for rows in histories for row in rows)
    trained = sum(row["seconds"] for rows in histories for row in rows)
    return {
        "feature_seconds": round(seconds, 1),
        "sweep_seconds": round(trained, 1),
        "training_seconds": round(seconds + trained, 1),
        "training_flops": 2 * whole["macs"] * views * count + head["training_flops"] * seen,
    }
