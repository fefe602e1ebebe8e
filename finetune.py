"""Fine-tune a pretrained ViT: how much of it must be trained?

    python finetune.py                                 # our own small weights on digits, offline
    python finetune.py --mode head                     # only the output layer, in seconds
    python finetune.py --mode all                      # every mode: one picture, one table
    python finetune.py --dataset pets --pretrained vit_base_patch16_224.augreg_in21k   # hand-in

Every constant is also a flag. Weights may be a timm name, a repository of the Hugging Face hub, a
.safetensors, .pth or Google .npz file, or a run of ours; a plain ViT always runs in model.py.
Plots and records go to results/finetune/<run>/. The same command goes on where a run was stopped.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from lab.core import Run, constants, run_script, runtime
from lab.data.augment import Augmentation
from lab.data.datasets import dataset_kind, load_data, subsample
from lab.data.loaders import Loaders
from lab.finetuning.comparison import compare_modes
from lab.finetuning.linear_probe import cached_features, train_linear_probe
from lab.finetuning.modes import (
    default_learning_rate,
    learning_rate_warning,
    set_trainable,
    variant_of,
)
from lab.models.pretrained import load_pretrained, reinitialized, reset_classifier, short_name
from lab.models.profiling import profile_model
from lab.training.config import FitConfig
from lab.training.loop import fit
from lab.training.optimizers import adamw, layers
from lab.training.results import over_seeds

# --- Weights ---
PRETRAINED: str = "weights/vit_128x6_cifar10.safetensors"  # timm name, owner/repository, file, run
IMG_SIZE: int | None = None  # pixels; none: the size that the weights were trained at

# --- Data ---
DATASET: str = "digits"  # digits, cifar10, cifar100, fashion-mnist, pets, or a folder
DATA_DIR: str = "data"  # where downloads and cached features go
VAL_FRACTION: float = 0.1  # share of the training images that chooses the epoch
TRAIN_FRACTION: float = 1.0  # share of the training images; repeated, so steps stay as many
SKIP_UNREADABLE: bool = False  # go on without images that cannot be read
AUGMENT: bool = True  # training images are changed at random, see AUGMENTATIONS below

# --- What is trained ---
MODE: Literal["full", "head", "top-k", "lora", "scratch", "all"] = "full"  # all: one after another
TOP_K: int = 2  # of top-k: the last so many blocks, the final norm and the head
LAYER_DECAY: float = 1.0  # of full: each layer's rate is so many times that of the layer above
LORA_RANK: int = 8  # of lora: rank of what is added to the attention layers
AUGMENT_VIEWS: int = 0  # of head: augmented views of each image that are cached; 0: the plain one

# --- Training ---
EPOCHS: int = 20  # passes over the training images
BATCH_SIZE: int = 64  # images a step, over all processes
ACCUMULATION_STEPS: int = 1  # cut a batch into parts when memory is short
LEARNING_RATE: float | None = None  # peak rate of AdamW; none: right for the mode, head tries some
HEAD_LR_MULT: float = 10.0  # the new head's rate is so many times that of the rest
WARMUP_FRACTION: float = 0.1  # share of the run in which the rate rises to its peak
LR_SCHEDULE: Literal["cosine", "linear", "none"] = "cosine"  # of the rate after the warm-up
WEIGHT_DECAY: float | None = None  # of weight matrices; none: 0.05, head tries some
CLIP_GRAD: float = 1.0  # largest norm of the gradient; 0: no limit
DROP_PATH_RATE: float = 0.0  # 0.1 to 0.2 for large models on few images
LABEL_SMOOTHING: float = 0.0  # share of the target spread over all classes

# --- Run ---
SEED: int = 0  # of the new head, order and augmentation; the validation split never changes
NUM_SEEDS: int = 1  # runs, from SEED on, one after another; then mean and deviation
PRECISION: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is in hardware
COMPILE: bool = False  # torch.compile: a slow start, then faster; pays on a GPU
TENSORBOARD: bool = False  # TensorBoard files too: tensorboard --logdir results
RESULTS_DIR: str = "results/finetune"  # one folder a run
NAME: str | None = None  # of the run's folder; none: from dataset, weights, mode and seed
OVERWRITE: bool = False  # start over, replacing the records of the same run

HEAD_SWEEP = ([1e-3, 3e-3, 1e-2, 3e-2], [0.0, 0.5])  # rates and weight decays that head tries
AUGMENTATIONS = {  # by kind of dataset: see lab/data/augment.py
    "digits": Augmentation(rotate=10, scale=0.1, translate=0.5),
    "small": Augmentation(crop_padding=4, flip=True),
    "photographs": Augmentation(rrc_min_area=0.4, flip=True),
}
MODES = ("scratch", "head", "top-k --top-k 1", "top-k --top-k 2", "top-k --top-k 4",
         "top-k --top-k 8", "lora", "full --layer-decay 0.7", "full")  # fmt: skip


def main() -> None:
    run_all_or_one(constants.override(sys.modules[__name__]), plain_only=True)


def run_all_or_one(values: dict[str, Any], plain_only: bool) -> None:
    c = SimpleNamespace(**values)
    if c.MODE == "all":
        pretrained = load_pretrained(c.PRETRAINED, c.IMG_SIZE, plain_only=plain_only)
        reset_classifier(pretrained, ["a", "b"])
        depth = max(layers(pretrained.model).values()) - 1
        modes = [mode.split() for mode in MODES]
        modes = [words for words in modes if words[0] != "top-k" or int(words[-1]) < depth]
        compare_modes(modes, Path(c.RESULTS_DIR))
    else:
        over_seeds(values, partial(finetune, plain_only=plain_only))


def finetune(values: dict[str, Any], plain_only: bool) -> Run:
    """One run: weights, data, what of it is trained, training, records."""
    c = SimpleNamespace(**values)
    pretrained = load_pretrained(c.PRETRAINED, c.IMG_SIZE, c.DROP_PATH_RATE, plain_only)
    preprocess = pretrained.preprocess
    with runtime.process_state().main_process_first():  # one process downloads and decodes for all
        data = load_data(c.DATASET, c.DATA_DIR, preprocess.resized, c.VAL_FRACTION,
                         c.SKIP_UNREADABLE, preprocess.interpolation)  # fmt: skip
        data = subsample(data, c.TRAIN_FRACTION)
    torch.manual_seed(c.SEED)
    weights = pretrained.fingerprint()
    notes = [*pretrained.remarks, reset_classifier(pretrained, data.classes)]
    model = pretrained.model
    if c.MODE == "scratch":
        model, notes = reinitialized(model), ["random weights: nothing is pretrained"]
    set_trainable(model, c.MODE, c.TOP_K, c.LORA_RANK)
    if c.MODE == "head":
        rates = [c.LEARNING_RATE] if c.LEARNING_RATE else HEAD_SWEEP[0]
        decays = HEAD_SWEEP[1] if c.WEIGHT_DECAY is None else [c.WEIGHT_DECAY]
    else:
        variant = variant_of(model, c.MODE, c.TOP_K, c.LAYER_DECAY)
        rates = [c.LEARNING_RATE or default_learning_rate(model, variant)]
        decays = [0.05 if c.WEIGHT_DECAY is None else c.WEIGHT_DECAY]
        notes += filter(None, [learning_rate_warning(model, variant, rates[0])])

    augmentation = AUGMENTATIONS[dataset_kind(c.DATASET)] if c.AUGMENT else Augmentation()
    loaders = Loaders(data, preprocess, c.BATCH_SIZE, augmentation, c.SEED)
    how = FitConfig(
        epochs=c.EPOCHS, warmup_fraction=c.WARMUP_FRACTION, lr_schedule=c.LR_SCHEDULE,
        clip_grad=c.CLIP_GRAD,
        accumulation_steps=c.ACCUMULATION_STEPS, label_smoothing=c.LABEL_SMOOTHING,
        precision=c.PRECISION, compile=c.COMPILE, seed=c.SEED,
        tensorboard=c.TENSORBOARD,
    )  # fmt: skip
    size = (len(preprocess.mean), preprocess.img_size, preprocess.img_size)
    facts = {
        "model": profile_model(model, size),
        "dataset": data.summary(),
        "pretrained": {"origin": pretrained.origin, "weights": weights, "notes": notes},
    }
    identity = {**vars(c), "WEIGHTS": weights, "RATES": rates, "WEIGHT_DECAYS": decays}
    with runtime.process_state().main_process_first():
        run = Run.open(Path(c.RESULTS_DIR), name_of(c, data.label), identity, facts, c.OVERWRITE)
    if runtime.process_state().is_main_process:
        print("\n".join(notes))
    if run.finished:
        run.say_finished()
    elif c.MODE == "head":
        features, seconds = cached_features(model, weights, loaders, c.AUGMENT_VIEWS,
                                            Path(c.DATA_DIR, "vit-lab-cache"),
                                            how.mixed_precision)  # fmt: skip
        train_linear_probe(model, features, how, run, (rates, decays), seconds)
    else:
        head_scale = 1.0 if c.MODE == "scratch" else c.HEAD_LR_MULT
        optimizer = adamw(model, rates[0], decays[0], (0.9, 0.999), c.LAYER_DECAY, head_scale)
        fit(model, optimizer, loaders, how, run)
    return run


def name_of(c: SimpleNamespace, dataset: str) -> str:
    """A readable name: dataset, weights, what is trained, seed."""
    weights = short_name(c.PRETRAINED)
    mode: dict[str, Any] = {"top-k": f"top{c.TOP_K}", "lora": f"lora{c.LORA_RANK}"}
    decay = f"-decay{c.LAYER_DECAY:g}" if c.MODE == "full" and c.LAYER_DECAY < 1 else ""
    return c.NAME or f"{dataset}-{weights}-{mode.get(c.MODE, c.MODE)}{decay}-s{c.SEED}"


if __name__ == "__main__":
    run_script(main)
