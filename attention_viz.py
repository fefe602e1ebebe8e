"""Draw attention maps of a model; with --score, compare them with segmentation masks.

    python attention_viz.py                            # the newest run of train.py
    python attention_viz.py --model weights/vit_128x6_cifar10.safetensors --images mnist-5k
    python attention_viz.py --model results/finetune/<run> --images "cat.jpg dog.jpg"
    python attention_viz.py --model results/finetune/<run> --images pets --score

Takes about 10 seconds for six images on a CPU and works offline, except to download a dataset.
Writes overview.jpg (one map per method), heads.jpg (every head of every block), distance.png,
positions.png and attention.html to results/attention_viz/<name>/. A ViT of model.py with up to 4M
parameters runs inside attention.html: draw a digit, inspect its attention, remove patches and
heads, and replay the training. For other models the page shows precomputed maps. With --score, it
writes score.md and score.png instead, and scores-*.md/.png, which compare all scored models.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lab.attention import scoring, views
from lab.core import Run, UserError, constants, runtime
from lab.data import Augmentation, Loaders, datasets, images
from lab.models import load_pretrained, registry

# --- Model and images ---
MODEL: str | None = None  # a run folder, timm model or weight file; None: the newest train.py run
IMAGES: str | None = None  # a dataset, image files or folders; None: the run's dataset, or mnist-5k
DATA_DIR: str = "data"  # folder of downloaded datasets
IMG_SIZE: int | None = None  # pixels; None: the size the model was trained at
MODEL_FILE: str | None = None  # your own model.py, if the model was trained with it

# --- Maps ---
METHOD: Literal["all", "raw", "rollout", "gradient-rollout", "grad-cam"] = "all"
LAYER: int = -1  # the block that `raw` shows, counted from 1; -1: the last
HEAD: int | None = None  # the head of that block, counted from 1; None: the mean of all heads
TARGET_CLASS: str | None = None  # name of the class to explain; None: the predicted class
NUM_IMAGES: int = 6  # up to half of them misclassified

# --- Scores ---
SCORE: bool = False  # compare the maps of all test images with segmentation masks (pets only)
DELETION_IMAGES: int = 64  # test images used for deletion and insertion; 0: skip both

# --- Run ---
SEED: int = 0  # for the choice of images, and for the random weights of --score
BATCH_SIZE: int = 8  # images per forward pass; a smaller value needs less memory
RESULTS_DIR: str = "results/attention_viz"  # one folder per model and images
NAME: str | None = None  # name of that folder; None: made from model and images
OVERWRITE: bool = False  # run again and replace existing results


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if c.BATCH_SIZE < 1:
        raise UserError(f"BATCH_SIZE={c.BATCH_SIZE} must be at least 1, such as 8")
    if c.DELETION_IMAGES < 0:
        raise UserError(f"DELETION_IMAGES={c.DELETION_IMAGES} must be at least 0")
    config = views.ViewConfig(c.METHOD, c.LAYER, c.HEAD, c.TARGET_CLASS, c.NUM_IMAGES, c.SEED)
    c.MODEL = c.MODEL or Run.newest()
    pretrained = load_pretrained(c.MODEL, c.IMG_SIZE)
    for remark in pretrained.remarks:
        print(f"note: {remark}")
    recorded = registry.recorded_constants(c.MODEL)
    dataset = recorded.get("DATASET")
    c.IMAGES = c.IMAGES or dataset
    if c.IMAGES is None:
        c.IMAGES = "mnist-5k"
        print(f"{c.MODEL} has no record of its training data, so mnist-5k images are used "
              "(choose others with --images)")  # fmt: skip
    is_dataset = datasets.same_dataset(c.IMAGES, dataset)
    data = datasets.load_images(c.IMAGES, c.DATA_DIR, pretrained.preprocess, is_dataset)
    identity = {**vars(c), "WEIGHTS": pretrained.fingerprint()}
    device = runtime.process_state().device
    loaders = Loaders(data, pretrained.preprocess, c.BATCH_SIZE, Augmentation())
    loaders.to(device)

    with runtime.explain_out_of_memory(
        f"Use a smaller batch, such as --batch-size {max(1, c.BATCH_SIZE // 2)}. Attention needs "
        "memory for N x N weights per head, so a smaller --img-size helps even more."
    ):
        pretrained.model.to(device)
        if c.SCORE:
            job = scoring.Scoring(pretrained, loaders, c.DATA_DIR, c.DELETION_IMAGES, c.SEED)
        else:
            folder = registry.folder_of(c.MODEL)
            is_run = recorded and (folder / "best.safetensors").is_file()
            trained_by = Run(folder) if is_run else None
            job = views.Views(pretrained, loaders, config, trained_by)
            if not job.methods:
                raise UserError(f"no map can be drawn: {'; '.join(set(job.skipped.values()))}")
        is_file = Path(data.name).suffix.lower() in images.EXTENSIONS
        images_name = Path(data.name).stem if is_file else data.name
        name = f"{registry.short_name(c.MODEL)}-{images_name}{'-score' if c.SCORE else ''}"
        facts = {"dataset": data.summary()}
        run = Run.open(Path(c.RESULTS_DIR), c.NAME or name, identity, facts, c.OVERWRITE)
        if run.finished:
            print("these results already exist; --overwrite computes them again")
            print(run.folder / run.metrics()["open"])
        else:
            job.write(run)


if __name__ == "__main__":
    runtime.run_script(main)
