"""Train a Vision Transformer from scratch.

    python train.py                                    # digits, about a minute on two CPU cores
    python train.py --dataset cifar10                  # one GPU; see the README for what to expect
    python train.py --dataset path/to/my/images        # train/<class>/*.jpg, test/<class>/*.jpg

Every constant is also a flag; one without a default takes its value from the recipe of the dataset.
Plots and records go to results/train/<run>/. The same command goes on where a run was stopped.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from lab.core import Run, constants, run_script, runtime
from lab.data.augment import Augmentation
from lab.data.datasets import Dataset, dataset_kind, load_data, native_size, subsample
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess, resized
from lab.models.profiling import profile_model, profile_small_images
from lab.models.registry import TimmConfig, build_timm_model
from lab.training.config import FitConfig
from lab.training.loop import fit
from lab.training.optimizers import OPTIMIZERS
from lab.training.results import over_seeds
from model import VisionTransformer, ViTConfig

# A constant that is None takes its value from RECIPES below, by dataset; set it to override that.

# --- Data ---
DATASET: str = "digits"  # digits, cifar10, cifar100, fashion-mnist, pets, or a folder
DATA_DIR: str = "data"  # where downloads go
VAL_FRACTION: float = 0.1  # share of the training images that chooses the epoch
TRAIN_FRACTION: float = 1.0  # share of the training images; repeated, so steps stay as many
SKIP_UNREADABLE: bool = False  # go on without images that cannot be read
IMG_SIZE: int | None = None  # pixels, a multiple of PATCH_SIZE

# --- Model ---
MODEL: str = "vit"  # vit: ours, with the sizes below; else a timm architecture, from scratch too
MODEL_ARGS: str = ""  # of timm's, such as "img_size=32 embed_dim=48 depths=(2,2,2)"
PATCH_SIZE: int | None = None  # pixels; half the size is four times the tokens
EMBED_DIM: int | None = None  # width, a multiple of NUM_HEADS
DEPTH: int | None = None  # blocks
NUM_HEADS: int | None = None  # attention heads
MLP_RATIO: float = 4.0  # hidden width of the MLP / EMBED_DIM
GLOBAL_POOL: Literal["token", "avg"] = "token"  # what the head reads: class token or mean
DROP_RATE: float = 0.0  # dropout in front of the head
DROP_PATH_RATE: float | None = None  # drop whole blocks; more for deeper models

# --- Training ---
EPOCHS: int | None = None  # passes over the training images
BATCH_SIZE: int | None = None  # images a step, over all processes
ACCUMULATION_STEPS: int = 1  # cut a batch into parts when memory is short
OPTIMIZER: Literal["adamw", "muon"] | None = None  # muon: of the blocks' matrices, AdamW the rest
LEARNING_RATE: float | None = None  # peak rate, for this batch size
PROGRESSIVE_RESIZE: float = 0.0  # of the epochs, the first ones, on images of half the size
WARMUP_FRACTION: float = 0.05  # share of the run in which the rate rises to its peak
LR_SCHEDULE: Literal["cosine", "linear", "none"] = "cosine"  # of the rate after the warm-up
WEIGHT_DECAY: float = 0.05  # of weight matrices; never of biases, norms, tokens, positions
CLIP_GRAD: float = 1.0  # largest norm of the gradient; 0: no limit
EMA_DECAY: float | None = None  # keep a moving average of the weights; 0: off

# --- Augmentation ---
CROP_PADDING: int | None = None  # pixels to every side
RRC_MIN_AREA: float | None = None  # least share of the area, for photographs; 0: off
FLIP: bool | None = None  # left and right; not where it changes the class
ROTATE: float | None = None  # degrees to either side
SCALE: float | None = None  # 0.1: between 90 % and 110 %
TRANSLATE: float | None = None  # pixels to every side, in fractions too
AUTO_AUGMENT: Literal["none", "trivial"] | None = None  # trivial: TrivialAugment
RANDOM_ERASING: float | None = None  # probability of erasing a rectangle
MIXUP: float | None = None  # alpha; 0: off
CUTMIX: float | None = None  # alpha; 0: off
MIX_PROBABILITY: float | None = None  # share of the batches that mixup or cutmix mix
LABEL_SMOOTHING: float | None = None  # share of the target spread over all classes

# --- Run ---
SEED: int = 0  # of weights, order and augmentation; the validation split never changes
NUM_SEEDS: int = 1  # runs, from SEED on, one after another; then mean and deviation
PRECISION: Literal["auto", "bf16", "fp32"] | None = None  # auto: bf16 where it is in hardware
COMPILE: bool = False  # torch.compile: a slow start, then faster; pays on a GPU
TENSORBOARD: bool = False  # TensorBoard files too: tensorboard --logdir results
RESULTS_DIR: str = "results/train"  # one folder a run
NAME: str | None = None  # of the run's folder; none: from dataset, model and seed
OVERWRITE: bool = False  # start over, replacing the records of the same run

RECIPES = {
    "digits": {  # 8 x 8 pixels, 1,295 training images; two CPU cores
        "PATCH_SIZE": 4, "EMBED_DIM": 64, "DEPTH": 4, "NUM_HEADS": 4, "DROP_PATH_RATE": 0.1,
        "EPOCHS": 100, "BATCH_SIZE": 64, "OPTIMIZER": "adamw",
        "LEARNING_RATE": 2e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 0, "RRC_MIN_AREA": 0.0,
        "FLIP": False, "ROTATE": 10.0, "SCALE": 0.1, "TRANSLATE": 0.5, "AUTO_AUGMENT": "none",
        "RANDOM_ERASING": 0.0, "MIXUP": 0.0, "CUTMIX": 0.0, "MIX_PROBABILITY": 0.0,
        "EMA_DECAY": 0.98, "PRECISION": "fp32",
    },
    "small": {  # images up to 64 pixels, tens of thousands; one GPU
        "PATCH_SIZE": 4, "EMBED_DIM": 192, "DEPTH": 9, "NUM_HEADS": 3, "DROP_PATH_RATE": 0.1,
        "EPOCHS": 300, "BATCH_SIZE": 128, "OPTIMIZER": "muon",
        "LEARNING_RATE": 1e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 4, "RRC_MIN_AREA": 0.0,
        "FLIP": True, "ROTATE": 0.0, "SCALE": 0.0, "TRANSLATE": 0.0, "AUTO_AUGMENT": "trivial",
        "RANDOM_ERASING": 0.25, "MIXUP": 1.0, "CUTMIX": 1.0, "MIX_PROBABILITY": 0.5,
        "EMA_DECAY": 0.0, "PRECISION": "auto",
    },
    "photographs": {  # larger images, thousands; one GPU
        "IMG_SIZE": 224, "PATCH_SIZE": 16, "EMBED_DIM": 192, "DEPTH": 12, "NUM_HEADS": 3,
        "DROP_PATH_RATE": 0.1, "EPOCHS": 200, "BATCH_SIZE": 128,
        "OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 0,
        "RRC_MIN_AREA": 0.3, "FLIP": True, "ROTATE": 0.0, "SCALE": 0.0, "TRANSLATE": 0.0,
        "AUTO_AUGMENT": "trivial", "RANDOM_ERASING": 0.25, "MIXUP": 0.8, "CUTMIX": 1.0,
        "MIX_PROBABILITY": 0.5, "EMA_DECAY": 0.0, "PRECISION": "auto",
    },
}  # fmt: skip


Build = Callable[[SimpleNamespace, Dataset], tuple[nn.Module, str, dict[str, Any]]]


def build(c: SimpleNamespace, data: Dataset) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model that the constants ask for, with random weights; its name; more for the records."""
    if c.MODEL == "vit":
        return VisionTransformer(vit_config(c, data)), f"vit_{c.EMBED_DIM}x{c.DEPTH}", {}
    asked = {"num_classes": len(data.classes), "in_chans": data.channels}
    if c.DROP_PATH_RATE:
        asked["drop_path_rate"] = c.DROP_PATH_RATE
    return (
        build_timm_model(TimmConfig.parse(c.MODEL, c.IMG_SIZE, c.MODEL_ARGS, **asked)),
        c.MODEL,
        {},
    )


def vit_config(c: SimpleNamespace, data: Dataset) -> ViTConfig:
    return ViTConfig(
        img_size=c.IMG_SIZE, patch_size=c.PATCH_SIZE, in_chans=data.channels,
        num_classes=len(data.classes), embed_dim=c.EMBED_DIM, depth=c.DEPTH,
        num_heads=c.NUM_HEADS, mlp_ratio=c.MLP_RATIO, global_pool=c.GLOBAL_POOL,
        class_token=c.GLOBAL_POOL == "token", drop_rate=c.DROP_RATE,
        drop_path_rate=c.DROP_PATH_RATE, dynamic_img_size=c.PROGRESSIVE_RESIZE > 0,
    )  # fmt: skip


def main() -> None:
    over_seeds(constants.override(sys.modules[__name__]), partial(train, build=build))


def train(values: dict[str, Any], build: Build) -> Run:
    """One run: data, model, training, records; cnn_baseline.py brings another model."""
    size = native_size(values["DATASET"])
    c = constants.resolve(values, {"IMG_SIZE": size, **RECIPES[dataset_kind(values["DATASET"])]})

    # Photographs are kept larger than the model's input, to leave room for crops.
    crop_pct = 1.0 if size else 0.875
    kept = resized(c.IMG_SIZE, crop_pct)
    with runtime.process_state().main_process_first():  # one process downloads and decodes for all
        data = load_data(c.DATASET, c.DATA_DIR, kept, c.VAL_FRACTION, c.SKIP_UNREADABLE)
        data = subsample(data, c.TRAIN_FRACTION)
    preprocess = Preprocess(c.IMG_SIZE, data.mean, data.std, crop_pct)
    augmentation = Augmentation(
        c.CROP_PADDING,
        c.RRC_MIN_AREA,
        c.FLIP,
        c.ROTATE,
        c.SCALE,
        c.TRANSLATE,
        c.AUTO_AUGMENT,
        c.RANDOM_ERASING,
    )
    torch.manual_seed(c.SEED)
    model, short, more = build(c, data)
    how = FitConfig(
        epochs=c.EPOCHS, progressive_resize=c.PROGRESSIVE_RESIZE,
        small_size=c.IMG_SIZE // 2 // c.PATCH_SIZE * c.PATCH_SIZE,  # whole patches
        warmup_fraction=c.WARMUP_FRACTION, lr_schedule=c.LR_SCHEDULE, clip_grad=c.CLIP_GRAD,
        accumulation_steps=c.ACCUMULATION_STEPS, label_smoothing=c.LABEL_SMOOTHING,
        mixup=c.MIXUP, cutmix=c.CUTMIX, mix_probability=c.MIX_PROBABILITY,
        ema_decay=c.EMA_DECAY, precision=c.PRECISION, compile=c.COMPILE, seed=c.SEED,
        tensorboard=c.TENSORBOARD,
    )  # fmt: skip
    optimizer = OPTIMIZERS[c.OPTIMIZER](model, c.LEARNING_RATE, c.WEIGHT_DECAY)
    loaders = Loaders(data, preprocess, c.BATCH_SIZE, augmentation, c.SEED)

    full, small = ((data.channels, side, side) for side in (c.IMG_SIZE, how.small_size))
    facts = {
        "model": profile_model(model, full) | profile_small_images(model, small, how.small_epochs),
        "dataset": data.summary(),
        **more,
    }
    name = c.NAME or f"{data.label}-{short}-s{c.SEED}"
    with runtime.process_state().main_process_first():
        run = Run.open(Path(c.RESULTS_DIR), name, vars(c), facts, c.OVERWRITE)
    fit(model, optimizer, loaders, how, run)
    return run


if __name__ == "__main__":
    run_script(main)
