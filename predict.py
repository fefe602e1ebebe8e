"""Classify your own images with a trained model.

    python predict.py --images "cat.jpg dog.jpg"             # with the newest run of train.py
    python predict.py --model results/finetune/<run> --images my-photos
    python predict.py --model user/name --revision v1 --images "photos/*.jpg" --attention

Writes predictions.csv (the most probable classes of every image) and predictions.jpg (a contact
sheet) to results/predict/<name>/. If the images are in folders named after their classes, it also
reports the accuracy. Grayscale, CMYK, 16-bit and rotated images are converted as in training.

Exit status: 0 if all images were classified, 1 if some could not be read (they are named), 2 if
there is no result.
In your own code: model, preprocess, classes = lab.models.load_model("results/train/<run>")
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lab  # noqa: F401  before torch, so that Ctrl-C ends its slow import quietly

# isort: split
from torch import Tensor

from lab.attention import saliency
from lab.core import Run, UserError, checkpoints, constants, runtime
from lab.data import datasets
from lab.models import Pretrained, load_pretrained, registry
from lab.sharing import leakage, predictions

# --- Model and images ---
MODEL: str | None = None  # run, file, timm name, owner/name; None: newest run of train.py
REVISION: str | None = None  # version of a repository, such as v1; None: the latest
MODEL_FILE: str | None = None  # your own model.py, if the model was trained with it
IMAGES: str | None = None  # files, folders, glob patterns or a dataset; None: the run's dataset
SPLIT: Literal["train", "val", "test"] = "test"  # part of a dataset
DATA_DIR: str = "data"  # folder of downloaded datasets

# --- Output ---
TOP_K: int = 5  # most probable classes that predictions.csv lists for each image
ATTENTION: bool = False  # show attention next to each image; Grad-CAM for a CNN

# --- Run ---
BATCH_SIZE: int = 64  # images per forward pass; a smaller value needs less memory
RESULTS_DIR: str = "results/predict"  # one folder per model and images
NAME: str | None = None  # name of that folder; None: made from model and images
OVERWRITE: bool = False  # predict again and replace existing results


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    for name in ("TOP_K", "BATCH_SIZE"):
        if getattr(c, name) < 1:
            raise UserError(f"{name}={getattr(c, name)} must be at least 1, such as 5")
    c.MODEL = c.MODEL or Run.newest()
    pretrained = load_pretrained(f"{c.MODEL}@{c.REVISION}" if c.REVISION else c.MODEL)
    if not pretrained.num_classes:
        raise UserError(f"{c.MODEL} has no classification head: fine-tune it first")
    recorded = registry.recorded_constants(c.MODEL)
    dataset = recorded.get("DATASET")
    c.IMAGES = c.IMAGES or dataset
    if c.IMAGES is None:
        raise UserError(
            f"{c.MODEL} does not say what it was trained on: choose images with --images, such as "
            '--images "cat.jpg dog.jpg"'
        )
    # If IMAGES is the folder that the model was trained on, predict only the chosen split.
    is_dataset = datasets.same_dataset(c.IMAGES, dataset)
    tested = leakage.tested_images(registry.folder_of(c.MODEL))
    if not is_dataset and leakage.is_moved_dataset(c.IMAGES, dataset, tested):
        print(f"note: {c.IMAGES} is the dataset of this model: predicting its {c.SPLIT} images")
        is_dataset = True
    val_fraction = recorded.get("VAL_FRACTION", 0.1) if is_dataset else 0.1
    source = predictions.find_images(
        c.IMAGES, c.SPLIT, c.DATA_DIR, pretrained, is_dataset, val_fraction
    )
    for note in source.notes:
        print(f"note: {note}")
    warning = leakage.leakage_warning(source, is_dataset, tested) if c.SPLIT == "test" else None
    if warning:
        print(f"warning: {warning}")

    identity = {**vars(c), "WEIGHTS": pretrained.fingerprint()}
    facts = {
        "model": {"origin": pretrained.origin, "classes": pretrained.class_names},
        "dataset": {"name": source.name, "fingerprint": source.fingerprint()},
    }
    name = c.NAME or f"{registry.short_name(c.MODEL)}-{source.name}"
    run = Run.open(Path(c.RESULTS_DIR), name, identity, facts, c.OVERWRITE)
    if run.finished:
        print("these results already exist; --overwrite predicts again")
    else:
        predict(c, pretrained, source, run)
    print(run.folder / "predictions.jpg")
    if unreadable := run.metrics()["unreadable"]:
        sys.exit(f"{len(unreadable)} of {len(source)} images could not be read")


def predict(
    c: SimpleNamespace, pretrained: Pretrained, source: predictions.Images, run: Run
) -> None:
    """Predicts all images, prints what was found, and writes the files of the run."""
    device = runtime.process_state().device
    smaller = max(1, c.BATCH_SIZE // 2)
    with runtime.explain_out_of_memory(f"Use a smaller batch, such as --batch-size {smaller}."):
        pretrained.model.to(device)
        maps = AttentionMaps(pretrained) if c.ATTENTION else None
        top_k = min(c.TOP_K, pretrained.num_classes)
        path = run.folder / "predictions.csv"
        summary = predictions.predict(pretrained, source, path, top_k, c.BATCH_SIZE, device, maps)
    for remark in pretrained.remarks:
        print(f"note: {remark}")
    print(predictions.table(summary))
    metrics = {**summary.metrics(), "unreadable": source.unreadable, "open": "predictions.jpg"}
    title = run.folder.name + (f": {summary.images:,} images" if summary.images > 1 else "")
    if summary.labeled:
        low, high = (100 * bound for bound in metrics["accuracy_95"])
        accuracy = f"accuracy {100 * metrics['accuracy']:.1f} %"
        title += f", {accuracy}"
        print(f"{accuracy} (95 % interval {low:.1f} to {high:.1f}, n = {summary.labeled:,})")
    map_name = maps.name if maps else None
    predictions.plot_contact_sheet(run.folder / "predictions.jpg", summary, title, map_name)
    if source.unreadable:
        print(f"could not be read: {predictions.describe_unreadable(source)}")
    checkpoints.write_json(run.folder / "metrics.json", metrics)


class AttentionMaps:
    """Maps for the contact sheet: attention of the last block, or else Grad-CAM."""

    def __init__(self, pretrained: Pretrained):
        self.model = pretrained.model
        self.name = "attention of the last block, mean of its heads"
        self.is_checked = False

    def __call__(self, images: Tensor) -> Tensor:
        if not self.is_checked:
            reasons: dict[str, Any] = saliency.unavailable_methods(self.model, images)
            if "raw" in reasons:
                self.name = "Grad-CAM for the predicted class"
            self.is_checked = True
        if "Grad-CAM" in self.name:
            return saliency.compute_map("grad-cam", self.model, images, None)
        return saliency.select_map(saliency.raw_attention(self.model, images), -1, None)


if __name__ == "__main__":
    runtime.run_script(main)
