"""Fine-tune a pretrained ViT: how much of it needs to be trained?

    python finetune.py                                 # our CIFAR-10 weights on 360 MNIST images
    python finetune.py --mode head                     # only the output layer, in seconds
    python finetune.py --mode all --epochs 5           # every mode, with one figure and one table
    python finetune.py --dataset pets --pretrained vit_base_patch16_224.augreg_in21k   # on a GPU

Every constant below is also a flag, such as --batch-size. Weights can be a timm name, a Hugging
Face repository, a .safetensors, .pth or Google .npz file, or one of your runs. A plain ViT always
runs in model.py. Records and figures go to results/finetune/<run>/. After an interruption, the same
command resumes.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lab  # noqa: F401  before torch, so that Ctrl-C ends its slow import quietly

# isort: split
import torch

from lab.core import Run, UserError, constants, runtime
from lab.data import Augmentation, Loaders, datasets, load_data
from lab.finetuning import (
    cached_features,
    compare_modes,
    default_learning_rate,
    learning_rate_warning,
    set_trainable,
    train_linear_probe,
    variant_of,
)
from lab.models import load_pretrained, profile_model, registry
from lab.training import FitConfig, fit, optimizers, results

# --- Weights ---
PRETRAINED: str = "weights/vit_128x6_cifar10.safetensors"  # timm name, owner/repository, file, run
IMG_SIZE: int | None = None  # input size in pixels; None: the size the weights were trained at
MODEL_FILE: str | None = None  # your own model.py, used everywhere instead of the lab's

# --- Data ---
DATASET: str = "mnist-5k"  # digits, mnist, fashion-mnist, cifar10, cifar100, pets; a folder
DATA_DIR: str = "data"  # folder for downloads and cached features
VAL_FRACTION: float = 0.1  # fraction of the training images used for validation
# TRAIN_FRACTION keeps the number of steps: with 0.1, an epoch shows each image ten times.
TRAIN_FRACTION: float | None = None  # training images to use; None: 0.1 for mnist-5k, else 1
SKIP_UNREADABLE: bool = False  # ignore images that cannot be read instead of stopping
AUGMENT: bool = True  # augment training images (see AUGMENTATIONS below)

# --- What is trained ---
MODE: Literal["full", "head", "top-k", "lora", "scratch", "all"] = "full"  # all: one after another
TOP_K: int = 2  # for top-k: train this many of the last blocks, the final norm and the head
LAYER_DECAY: float = 1.0  # for full: each layer's rate is this factor times that of the layer above
LORA_RANK: int = 8  # for lora: rank of the matrices added to the attention layers
AUGMENT_VIEWS: int = 0  # for head: augmented views per image in the cache; 0: no augmentation

# --- Training ---
EPOCHS: int = 20  # passes over the training split
BATCH_SIZE: int = 64  # images per step, over all processes
ACCUMULATION_STEPS: int = 1  # split each batch into this many parts, which saves memory
LEARNING_RATE: float | None = None  # peak learning rate; None: depends on MODE; head tries several
HEAD_LR_MULT: float = 10.0  # the new head's learning rate is this factor times LEARNING_RATE
WARMUP_FRACTION: float = 0.1  # fraction of the steps used to warm up the learning rate
LR_SCHEDULE: Literal["cosine", "linear", "none"] = "cosine"  # decay after the warm-up
WEIGHT_DECAY: float | None = None  # for weight matrices; None: 0.05; head tries several
CLIP_GRAD: float = 1.0  # maximum gradient norm (gradient clipping); 0: no clipping
DROP_PATH_RATE: float = 0.0  # drop path; 0.1 to 0.2 for large models on few images
LABEL_SMOOTHING: float = 0.0  # fraction of the target spread over all classes

# --- Run ---
SEED: int = 0  # seed of weights, image order and augmentation; the splits never change
NUM_SEEDS: int = 1  # train with SEED, SEED + 1, ...; report mean and standard deviation
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest available
COMPILE: bool = False  # torch.compile: slow start, faster steps; worthwhile on a GPU
TENSORBOARD: bool = False  # also write TensorBoard files: tensorboard --logdir results
RESULTS_DIR: str = "results/finetune"  # one folder per run
NAME: str | None = None  # name of the run's folder; by default from dataset, weights, mode and seed
OVERWRITE: bool = False  # start over, replacing the records of the same run
RESUME_CHANGED_CODE: bool = False  # resume a stopped run even if the code has changed since

HEAD_LEARNING_RATES, HEAD_WEIGHT_DECAYS = [1e-3, 3e-3, 1e-2, 3e-2], [0.0, 0.5]  # head tries all
AUGMENTATIONS = {  # by kind of dataset: see lab/data/augment.py
    "mnist-5k": Augmentation(rotate=10, scale=0.1, translate=2),
    "digits": Augmentation(rotate=10, scale=0.1, translate=0.5),
    "small": Augmentation(crop_padding=4, flip=True),
    "photographs": Augmentation(rrc_min_area=0.4, flip=True),
}
ONLY_IN = {  # constants that affect one mode, and their values in the others
    "TOP_K": ("top-k", 2), "LORA_RANK": ("lora", 8), "AUGMENT_VIEWS": ("head", 0),
    "LAYER_DECAY": ("full", 1.0),
}  # fmt: skip
ALL_MODES = [
    {"MODE": "scratch"}, {"MODE": "head"},
    *({"MODE": "top-k", "TOP_K": blocks} for blocks in (1, 2, 4, 8)),
    {"MODE": "lora"}, {"MODE": "full", "LAYER_DECAY": 0.7}, {"MODE": "full", "LAYER_DECAY": 1.0},
]  # fmt: skip


def main() -> None:
    run_modes(constants.override(sys.modules[__name__]), plain_only=True)


def run_modes(values: dict[str, Any], plain_only: bool) -> None:
    """Runs all modes, or one mode for each seed."""
    c = SimpleNamespace(**values)
    if c.MODE != "all":
        runs = [finetune(seed_values, plain_only) for seed_values in results.each_seed(values)]
        results.summarize_seeds(runs)
        return
    pretrained = load_pretrained(c.PRETRAINED, c.IMG_SIZE, plain_only=plain_only)
    # Weights without a head get one first, because the head counts as a layer.
    pretrained.reset_classifier(["a", "b"])
    depth = max(optimizers.layers(pretrained.model).values()) - 1
    modes = [mode for mode in ALL_MODES if mode.get("TOP_K", 0) < depth]
    try:
        set_trainable(pretrained.model, "lora", c.TOP_K, c.LORA_RANK)
    except UserError as reason:
        print(f"skipping lora: {reason}")
        modes.remove({"MODE": "lora"})
    named = {mode_name(SimpleNamespace(**{**values, **mode})): mode for mode in modes}
    set_by_modes = {name for mode in ALL_MODES for name in mode}
    suffix = "".join(
        f"-{name.lower().replace('_', '-')}{values[name]}"
        for name, (_, usual) in ONLY_IN.items()
        if name not in set_by_modes and values[name] != usual
    )
    compare_modes(named, c.NAME, Path(c.RESULTS_DIR), suffix)


def finetune(values: dict[str, Any], plain_only: bool) -> Run:
    """Performs one run: loads weights and data, trains the chosen layers, writes the records."""
    if values["TRAIN_FRACTION"] is None:  # with few labels, the benefit of pretraining is visible
        values = {**values, "TRAIN_FRACTION": 0.1 if values["DATASET"] == "mnist-5k" else 1.0}
    for name, (mode, usual) in ONLY_IN.items():
        if values["MODE"] != mode and values[name] != usual:
            values = {**values, name: usual}
            if Run.FOLDERS_VARIABLE not in os.environ:  # MODE=all passes on the flags of all modes
                print(f"{name} affects only MODE={mode}; it is ignored here")
    c = SimpleNamespace(**values)
    pretrained = load_pretrained(c.PRETRAINED, c.IMG_SIZE, c.DROP_PATH_RATE, plain_only)
    preprocess = pretrained.preprocess
    kind = datasets.dataset_kind(c.DATASET)
    augmentation = AUGMENTATIONS[kind] if c.AUGMENT else Augmentation()
    crop_size = augmentation.crop_size(preprocess.img_size)
    if c.MODE == "head" and not c.AUGMENT_VIEWS:
        crop_size = 0  # features are computed without augmentation
    with runtime.process_state().main_process_first():  # one process downloads and decodes for all
        data = load_data(c.DATASET, c.DATA_DIR, preprocess.resized, c.VAL_FRACTION,
                         c.SKIP_UNREADABLE, preprocess.interpolation, crop_size)  # fmt: skip
        data = datasets.subsample(data, c.TRAIN_FRACTION)
    torch.manual_seed(c.SEED)
    weights = pretrained.fingerprint()
    notes = [*pretrained.remarks, pretrained.reset_classifier(data.classes)]
    model = pretrained.model
    if c.MODE == "scratch":
        model, notes = pretrained.reinitialized(), ["random weights: nothing is pretrained"]
    set_trainable(model, c.MODE, c.TOP_K, c.LORA_RANK)
    if c.MODE == "head":
        rates = [c.LEARNING_RATE] if c.LEARNING_RATE else HEAD_LEARNING_RATES
        decays = HEAD_WEIGHT_DECAYS if c.WEIGHT_DECAY is None else [c.WEIGHT_DECAY]
    else:
        variant = variant_of(model, c.MODE, c.TOP_K, c.LAYER_DECAY)
        rates = [c.LEARNING_RATE or default_learning_rate(model, variant)]
        decays = [0.05 if c.WEIGHT_DECAY is None else c.WEIGHT_DECAY]
        notes += filter(None, [learning_rate_warning(model, variant, rates[0])])

    loaders = Loaders(data, preprocess, c.BATCH_SIZE, augmentation, c.SEED)
    config = FitConfig(
        epochs=c.EPOCHS, warmup_fraction=c.WARMUP_FRACTION, lr_schedule=c.LR_SCHEDULE,
        clip_grad=c.CLIP_GRAD, accumulation_steps=c.ACCUMULATION_STEPS,
        label_smoothing=c.LABEL_SMOOTHING, precision=c.PRECISION,
        compile=c.COMPILE and c.MODE != "head",  # a linear layer is not worth compiling
        tensorboard=c.TENSORBOARD,
    )  # fmt: skip
    shape = (len(preprocess.mean), preprocess.img_size, preprocess.img_size)
    metadata = {
        "model": profile_model(model, shape),
        "dataset": data.summary(),
        "pretrained": {"origin": pretrained.origin, "weights": weights, "notes": notes},
    }
    identity = {**values, "WEIGHTS": weights, "RATES": rates, "WEIGHT_DECAYS": decays}
    name = c.NAME or f"{data.run_name}-{registry.short_name(c.PRETRAINED)}-{mode_name(c)}-s{c.SEED}"
    with runtime.process_state().main_process_first():
        results_dir = Path(c.RESULTS_DIR)
        run = Run.open(results_dir, name, identity, metadata, c.OVERWRITE, c.RESUME_CHANGED_CODE)
    if runtime.process_state().is_main_process:
        print("\n".join(notes))
    if run.finished:
        run.say_finished()
    elif c.MODE == "head":
        cache = Path(c.DATA_DIR, "vit-lab-cache")
        features, costs = cached_features(
            model, weights, loaders, c.AUGMENT_VIEWS, cache, config.mixed_precision
        )
        train_linear_probe(model, features, config, run, (rates, decays), costs)
    else:
        head_lr_mult = 1.0 if c.MODE == "scratch" else c.HEAD_LR_MULT
        optimizer = optimizers.adamw(
            model, rates[0], decays[0], layer_decay=c.LAYER_DECAY, head_lr_mult=head_lr_mult
        )
        fit(model, optimizer, loaders, config, run)
    return run


def mode_name(c: SimpleNamespace) -> str:
    """What is trained, for the name of a run."""
    names = {"top-k": f"top{c.TOP_K}", "lora": f"lora{c.LORA_RANK}"}
    decay = f"-decay{c.LAYER_DECAY:g}" if c.MODE == "full" and c.LAYER_DECAY < 1 else ""
    return names.get(c.MODE, c.MODE) + decay


if __name__ == "__main__":
    runtime.run_script(main)
