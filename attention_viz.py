"""Show where a model looks; with --score measure whether that is where the animal is.

    python attention_viz.py                            # the newest run of train.py, offline
    python attention_viz.py --model weights/vit_128x6_cifar10.safetensors --images digits
    python attention_viz.py --model results/finetune/<run> --images "cat.jpg dog.jpg"
    python attention_viz.py --model results/finetune/<run> --images pets --score

Writes overview.jpg (a map of each method), heads.jpg (every head of every block), distance.png,
positions.png and attention.html, a page to play with, into results/attention_viz/<name>/; --score
writes score.md and score.png there, and scores-*.md/.png, which compare all scored models.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lab.attention.score_report import scoring
from lab.attention.views import viewing
from lab.core import Run, UserError, constants, run_script, runtime
from lab.data.augment import Augmentation
from lab.data.datasets import load_images
from lab.data.loaders import Loaders
from lab.models.pretrained import load_pretrained, short_name

# --- What is looked at ---
MODEL: str | None = None  # a run's folder, timm name or file; none: the newest run of train.py
IMAGES: str | None = None  # a dataset, or pictures and folders; none: what the run was trained on
DATA_DIR: str = "data"  # where downloads lie
IMG_SIZE: int | None = None  # pixels; none: the size that the weights were trained at

# --- How ---
METHOD: Literal["all", "raw", "rollout", "gradient-rollout", "grad-cam"] = "all"  # see README
LAYER: int = -1  # block whose attention `raw` shows, from 1; -1: the last
HEAD: int | None = None  # head of that block, from 1; none: the mean of all
TARGET_CLASS: str | None = None  # name of the class to explain; none: the predicted one
NUM_IMAGES: int = 6  # half of them wrongly predicted, if there are so many

# --- Is the map right? ---
SCORE: bool = False  # score all maps of all test images against outlines; Pets alone has them
DELETION_IMAGES: int = 64  # of the test images, for deletion and insertion; 0: none

# --- Run ---
SEED: int = 0  # of the choice of images, and of the random weights that --score compares with
BATCH_SIZE: int = 8  # images at a time; fewer take less memory
RESULTS_DIR: str = "results/attention_viz"  # one folder a model and images
NAME: str | None = None  # of the folder; none: from model and images
OVERWRITE: bool = False  # do it again, replacing what is there


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if c.NUM_IMAGES < 1:
        raise UserError(f"NUM_IMAGES={c.NUM_IMAGES} must be at least 1, such as 6")
    c.MODEL = c.MODEL or str(Run.newest(Path("results/train"), "python train.py"))
    pretrained = load_pretrained(c.MODEL, c.IMG_SIZE)
    c.IMAGES = c.IMAGES or trained_on(Path(c.MODEL))
    data = load_images(c.IMAGES, c.DATA_DIR, pretrained.preprocess)
    identity = {**vars(c), "WEIGHTS": pretrained.fingerprint()}
    loaders = Loaders(data, pretrained.preprocess, c.BATCH_SIZE, Augmentation())
    loaders.to(runtime.process_state().device)
    pretrained.model.to(runtime.process_state().device)

    work = (scoring if c.SCORE else viewing)(pretrained, loaders, c)  # refuses what cannot be
    name = f"{short_name(c.MODEL)}-{data.name}{'-score' if c.SCORE else ''}"
    facts = {"dataset": data.summary()}
    run = Run.open(Path(c.RESULTS_DIR), c.NAME or name, identity, facts, c.OVERWRITE)
    if run.finished:
        print(f"this is done already; --overwrite repeats it\n{run.folder / run.metrics()['open']}")
    else:
        work(run)


def trained_on(folder: Path) -> str:
    """The dataset of a run; the embedded digits for weights that do not say theirs."""
    try:
        return Run(folder).config()["constants"]["DATASET"]
    except (OSError, ValueError, KeyError):
        return "digits"


if __name__ == "__main__":
    run_script(main)
