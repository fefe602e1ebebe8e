"""Train a Vision Transformer from scratch.

    python train.py                                    # mnist-5k, 40 s to 2 minutes on a CPU
    python train.py --dataset digits --epochs 10       # tiny images: a first look in ten seconds
    python train.py --dataset cifar10                  # one GPU; README.md has expected accuracies
    python train.py --dataset path/to/my/images        # train/<class>/*.jpg, test/<class>/*.jpg

Every constant below is also a flag, such as --batch-size. To see how a step works, read this file,
then the training loop in lab/training/loop.py, lab/training/optimizers.py and model.py.
Records and figures go to results/train/<run>/. After an interruption, the same command resumes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lab  # noqa: F401  before torch, so that Ctrl-C ends its slow import quietly

# isort: split
import torch

from lab.core import Run, UserError, constants, machine, runtime
from lab.data import Augmentation, Dataset, Loaders, Preprocess, datasets, load_data
from lab.models import own_model, profile_model, registry
from lab.training import FitConfig, fit, optimizers, results
from model import VisionTransformer, ViTConfig

# A constant that is None takes its value from RECIPES below, depending on the dataset. Set it here
# or on the command line to override the recipe.

# --- Data ---
DATASET: str = "mnist-5k"  # digits, mnist, fashion-mnist, cifar10, cifar100, pets, or a folder
DATA_DIR: str = "data"  # folder for downloads
VAL_FRACTION: float = 0.1  # fraction of the training images used for validation
TRAIN_FRACTION: float = 1.0  # fraction of the training images to use; the steps stay the same
SKIP_UNREADABLE: bool = False  # ignore images that cannot be read instead of stopping
IMG_SIZE: int | None = None  # side of the input in pixels, a multiple of PATCH_SIZE

# --- Model ---
MODEL_FILE: str | None = None  # your own model.py, used everywhere instead of the lab's
MODEL: str = "vit"  # vit: model.py with the sizes below; else a timm architecture, from scratch
MODEL_ARGS: str = ""  # arguments of the timm model: "img_size=32 embed_dim=48 depths=(2,2,2)"
PATCH_SIZE: int | None = None  # patch side in pixels; halving it gives four times as many patches
EMBED_DIM: int | None = None  # width of a token, a multiple of NUM_HEADS
DEPTH: int | None = None  # number of transformer blocks
NUM_HEADS: int | None = None  # attention heads per block
MLP_RATIO: float = 4.0  # hidden width of the MLP, divided by EMBED_DIM
GLOBAL_POOL: Literal["token", "avg"] = "token"  # input of the head: class token, or mean of patches
DROP_RATE: float = 0.0  # dropout before the head
DROP_PATH_RATE: float | None = None  # drop path (stochastic depth) in the last block

# --- Training ---
EPOCHS: int | None = None  # passes over the training split
BATCH_SIZE: int | None = None  # images per step, over all processes
ACCUMULATION_STEPS: int = 1  # split each batch into this many parts, which saves memory
OPTIMIZER: Literal["adamw", "muon"] | None = None  # muon: for the blocks' matrices, AdamW elsewhere
LEARNING_RATE: float | None = None  # peak learning rate, for this batch size
PROGRESSIVE_RESIZE: float = 0.0  # train this first fraction of the epochs on half-size images
WARMUP_FRACTION: float = 0.05  # fraction of the steps used to warm up the learning rate
LR_SCHEDULE: Literal["cosine", "linear", "none"] = "cosine"  # decay after the warm-up
WEIGHT_DECAY: float = 0.05  # for weight matrices; not for biases, norms and embeddings
CLIP_GRAD: float = 1.0  # maximum gradient norm (gradient clipping); 0: no clipping
EMA_DECAY: float | None = None  # validate and keep a moving average of the weights; 0: off

# --- Augmentation ---
CROP_PADDING: int | None = None  # random crop after padding each side by this many pixels
RRC_MIN_AREA: float | None = None  # random resized crop: minimum area, as a fraction; 0: off
FLIP: bool | None = None  # random horizontal flip; not for digits or text
ROTATE: float | None = None  # maximum rotation in either direction, in degrees
SCALE: float | None = None  # 0.1 scales by a random factor between 0.9 and 1.1
TRANSLATE: float | None = None  # maximum shift in each direction, in pixels; may be fractional
AUTO_AUGMENT: Literal["none", "trivial"] | None = None  # trivial: TrivialAugment
RANDOM_ERASING: float | None = None  # probability of erasing a random rectangle
MIXUP: float | None = None  # alpha of mixup, which averages two images; 0: off
CUTMIX: float | None = None  # alpha of cutmix, which pastes a patch of another image; 0: off
MIX_PROBABILITY: float | None = None  # fraction of the batches that mixup or cutmix changes
LABEL_SMOOTHING: float | None = None  # fraction of the target spread evenly over all classes

# --- Run ---
SEED: int = 0  # seed of weights, image order and augmentation; validation images never change
NUM_SEEDS: int = 1  # train with SEED, SEED + 1, ...; report mean and standard deviation
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # auto: the fastest in hardware
COMPILE: bool | None = None  # torch.compile; None: on a GPU, except for digits and mnist-5k
SNAPSHOTS: int | None = None  # copies of the weights, for attention.html; None: 10 for small ViTs
TENSORBOARD: bool = False  # also write TensorBoard files: tensorboard --logdir results
RESULTS_DIR: str = "results/train"  # each run gets a folder in it
NAME: str | None = None  # name of the run's folder; by default from dataset, model and seed
OVERWRITE: bool = False  # repeat a finished run and replace its records
RESUME_CHANGED_CODE: bool = False  # resume a stopped run even if the code has changed since

RECIPES = {
    "digits": {  # 8 x 8 pixels, 1,295 training images; for two CPU cores
        "PATCH_SIZE": 4, "EMBED_DIM": 64, "DEPTH": 4, "NUM_HEADS": 4, "DROP_PATH_RATE": 0.1,
        "EPOCHS": 100, "BATCH_SIZE": 64, "OPTIMIZER": "adamw",
        "LEARNING_RATE": 2e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 0, "RRC_MIN_AREA": 0.0,
        "FLIP": False, "ROTATE": 10.0, "SCALE": 0.1, "TRANSLATE": 0.5, "AUTO_AUGMENT": "none",
        "RANDOM_ERASING": 0.0, "MIXUP": 0.0, "CUTMIX": 0.0, "MIX_PROBABILITY": 0.0,
        "EMA_DECAY": 0.98, "PRECISION": "fp32",
    },
    "mnist-5k": {  # 28 x 28 pixels, 3,600 training images (also for mnist); for two CPU cores
        "PATCH_SIZE": 7, "EMBED_DIM": 64, "DEPTH": 4, "NUM_HEADS": 4, "DROP_PATH_RATE": 0.1,
        "EPOCHS": 35, "BATCH_SIZE": 128, "OPTIMIZER": "muon",
        "LEARNING_RATE": 4e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 0, "RRC_MIN_AREA": 0.0,
        "FLIP": False, "ROTATE": 10.0, "SCALE": 0.1, "TRANSLATE": 2.0, "AUTO_AUGMENT": "none",
        "RANDOM_ERASING": 0.0, "MIXUP": 0.0, "CUTMIX": 0.0, "MIX_PROBABILITY": 0.0,
        "EMA_DECAY": 0.0, "PRECISION": "fp32",
    },
    "small": {  # up to 64 x 64 pixels, tens of thousands of images; for one GPU
        "PATCH_SIZE": 4, "EMBED_DIM": 192, "DEPTH": 9, "NUM_HEADS": 3, "DROP_PATH_RATE": 0.1,
        "EPOCHS": 300, "BATCH_SIZE": 128, "OPTIMIZER": "muon",
        "LEARNING_RATE": 1e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 4, "RRC_MIN_AREA": 0.0,
        "FLIP": True, "ROTATE": 0.0, "SCALE": 0.0, "TRANSLATE": 0.0, "AUTO_AUGMENT": "trivial",
        "RANDOM_ERASING": 0.25, "MIXUP": 1.0, "CUTMIX": 1.0, "MIX_PROBABILITY": 0.5,
        "EMA_DECAY": 0.0, "PRECISION": "auto",
    },
    "photographs": {  # larger images, thousands of them; for one GPU
        "IMG_SIZE": 224, "PATCH_SIZE": 16, "EMBED_DIM": 192, "DEPTH": 12, "NUM_HEADS": 3,
        "DROP_PATH_RATE": 0.1, "EPOCHS": 200, "BATCH_SIZE": 128,
        "OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3, "LABEL_SMOOTHING": 0.1, "CROP_PADDING": 0,
        "RRC_MIN_AREA": 0.3, "FLIP": True, "ROTATE": 0.0, "SCALE": 0.0, "TRANSLATE": 0.0,
        "AUTO_AUGMENT": "trivial", "RANDOM_ERASING": 0.25, "MIXUP": 0.8, "CUTMIX": 1.0,
        "MIX_PROBABILITY": 0.5, "EMA_DECAY": 0.0, "PRECISION": "auto",
    },
}  # fmt: skip


# Constants that describe the ViT in model.py, and the value that each has if it is not set.
VIT_ONLY = {"EMBED_DIM": None, "DEPTH": None, "NUM_HEADS": None, "MLP_RATIO": 4.0,
            "GLOBAL_POOL": "token", "DROP_RATE": 0.0}  # fmt: skip


def main() -> None:
    values = constants.override(sys.modules[__name__], recipes=RECIPES)
    if values["MODEL"] != "vit":
        unset = VIT_ONLY if values["PROGRESSIVE_RESIZE"] else {**VIT_ONLY, "PATCH_SIZE": None}
        refuse(values, unset, f"MODEL={values['MODEL']}: set its sizes with MODEL_ARGS")
    results.summarize_seeds(
        [train(seed_values, build) for seed_values in results.each_seed(values)]
    )


def refuse(values: dict[str, Any], unset: dict[str, Any], reason: str) -> None:
    """Raises: UserError, if one of these constants is set, because it would have no effect."""
    if given := [name for name, value in unset.items() if values[name] != value]:
        raise UserError(f"{', '.join(given)} would have no effect on {reason}")


def train(values: dict[str, Any], build: Callable) -> Run:
    """Trains one model and writes its records.

    Args:
        values: the constants; None means the recipe's value.
        build: a function like the one below; cnn_baseline.py passes its own.
    """
    kind = datasets.dataset_kind(values["DATASET"])
    native = datasets.native_size(values["DATASET"])
    # Compiling takes about a minute, which pays off in long runs on a GPU.
    compile_it = RECIPES[kind]["PRECISION"] == "auto" and machine.can_compile(
        runtime.process_state().device
    )
    recipe = {"IMG_SIZE": native, "COMPILE": compile_it, **RECIPES[kind]}
    c = constants.resolve(values, recipe)
    print(constants.header(values, c, kind))
    for name in ("MIXUP", "CUTMIX"):
        if values[name] and not c.MIX_PROBABILITY:
            raise UserError(
                f"{name}={values[name]} has no effect while MIX_PROBABILITY is 0: set "
                "MIX_PROBABILITY, such as 0.5"
            )

    augmentation = Augmentation(
        crop_padding=c.CROP_PADDING, rrc_min_area=c.RRC_MIN_AREA, flip=c.FLIP, rotate=c.ROTATE,
        scale=c.SCALE, translate=c.TRANSLATE, auto_augment=c.AUTO_AUGMENT,
        random_erasing=c.RANDOM_ERASING,
    )  # fmt: skip
    # Photographs are stored larger than the model's input, which leaves room for crops.
    crop_pct = 1.0 if native else 0.875
    stored_size = Preprocess.resized_size(c.IMG_SIZE, crop_pct)
    with runtime.process_state().main_process_first():  # one process prepares the data for all
        data = load_data(c.DATASET, c.DATA_DIR, stored_size, c.VAL_FRACTION, c.SKIP_UNREADABLE,
                         crop_size=augmentation.crop_size(c.IMG_SIZE))  # fmt: skip
        data = datasets.subsample(data, c.TRAIN_FRACTION)
    preprocess = Preprocess(c.IMG_SIZE, data.mean, data.std, crop_pct)

    torch.manual_seed(c.SEED)
    too_large = "Lower the size of the model, such as EMBED_DIM or DEPTH."
    with own_model.explain_errors(), runtime.explain_out_of_memory(too_large):
        model, model_name, model_metadata = build(c, data)
    image_shape = (data.channels, c.IMG_SIZE, c.IMG_SIZE)
    if isinstance(model, VisionTransformer):
        own_model.check_model(model, image_shape, len(data.classes))
    try:
        profile = profile_model(model, image_shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{model_name} cannot process images of {c.IMG_SIZE} x {c.IMG_SIZE} pixels: {error}. "
            "Try another IMG_SIZE"
        ) from error
    if c.PATCH_SIZE < 1:  # models of timm do not check it, but PROGRESSIVE_RESIZE divides by it
        raise UserError(f"PATCH_SIZE={c.PATCH_SIZE} must be at least 1, such as 4")
    config = FitConfig(
        epochs=c.EPOCHS, progressive_resize=c.PROGRESSIVE_RESIZE,
        small_size=c.IMG_SIZE // 2 // c.PATCH_SIZE * c.PATCH_SIZE,  # a multiple of PATCH_SIZE
        warmup_fraction=c.WARMUP_FRACTION, lr_schedule=c.LR_SCHEDULE, clip_grad=c.CLIP_GRAD,
        accumulation_steps=c.ACCUMULATION_STEPS, label_smoothing=c.LABEL_SMOOTHING,
        mixup=c.MIXUP, cutmix=c.CUTMIX, mix_probability=c.MIX_PROBABILITY,
        ema_decay=c.EMA_DECAY, precision=c.PRECISION, compile=c.COMPILE,
        tensorboard=c.TENSORBOARD, snapshots=c.SNAPSHOTS,
    )  # fmt: skip
    optimizer = optimizers.by_name(c.OPTIMIZER)(model, c.LEARNING_RATE, c.WEIGHT_DECAY)
    loaders = Loaders(data, preprocess, c.BATCH_SIZE, augmentation, c.SEED)
    if loaders.batch_size < c.BATCH_SIZE:
        print(
            f"note: BATCH_SIZE={c.BATCH_SIZE} is more than the {len(data.train)} training images, "
            f"so an epoch is one step; try --batch-size {max(1, len(data.train) // 8)}"
        )

    small_shape = (data.channels, config.small_size, config.small_size)
    profile |= results.profile_small_images(model, small_shape, config.small_epochs)
    metadata = {"model": profile, "dataset": data.summary(), **model_metadata}
    name = c.NAME or f"{data.run_name}-{model_name}-s{c.SEED}"
    with runtime.process_state().main_process_first():
        results_dir = Path(c.RESULTS_DIR)
        run = Run.open(results_dir, name, vars(c), metadata, c.OVERWRITE, c.RESUME_CHANGED_CODE)
    if message := results.explain_more_epochs(run):
        print(message)
    fit(model, optimizer, loaders, config, run)
    return run


def build(c: SimpleNamespace, data: Dataset) -> tuple[torch.nn.Module, str, dict]:
    """The model that the constants describe, with random weights.

    Returns: the model, its name for the run's folder, and further entries of config.json.
    """
    if c.MODEL == "vit":
        if c.MODEL_ARGS:
            raise UserError(
                f"MODEL_ARGS={c.MODEL_ARGS!r} has no effect on MODEL=vit. Use the constants, such "
                "as EMBED_DIM and DEPTH, or set MODEL to a timm architecture"
            )
        return VisionTransformer(vit_config(c, data)), f"vit_{c.EMBED_DIM}x{c.DEPTH}", {}
    arguments = {"num_classes": len(data.classes), "in_chans": data.channels}
    if c.DROP_PATH_RATE:
        arguments["drop_path_rate"] = c.DROP_PATH_RATE

    def build_timm() -> torch.nn.Module:
        config = registry.TimmConfig.parse(c.MODEL, c.IMG_SIZE, c.MODEL_ARGS, **arguments)
        return registry.build_timm_model(config)

    try:
        model = build_timm()
    except UserError:
        if not arguments.pop("drop_path_rate", 0):
            raise
        model = build_timm()
        print(f"{c.MODEL} has no drop path: DROP_PATH_RATE={c.DROP_PATH_RATE} is not used")
        c.DROP_PATH_RATE = 0.0
    if type(model).__name__ == "VisionTransformer" and not model.patch_embed.dynamic_img_pad:
        patch = model.patch_embed.patch_size[0]
        if c.IMG_SIZE % patch:  # timm would ignore the remaining pixels
            fitting = [n for n in range(1, max(1, c.IMG_SIZE // 4) + 1) if c.IMG_SIZE % n == 0]
            closest = min(fitting, key=lambda n: abs(n - patch))
            raise UserError(
                f"{c.MODEL} has patches of {patch} pixels, which do not fit into {c.IMG_SIZE} "
                f"pixels: choose a size that does, such as MODEL_ARGS='patch_size={closest}'"
            )
    return model, c.MODEL, {}


def vit_config(c: SimpleNamespace, data: Dataset) -> ViTConfig:
    """The configuration of model.py that the constants describe."""
    return ViTConfig(
        img_size=c.IMG_SIZE, patch_size=c.PATCH_SIZE, in_chans=data.channels,
        num_classes=len(data.classes), embed_dim=c.EMBED_DIM, depth=c.DEPTH,
        num_heads=c.NUM_HEADS, mlp_ratio=c.MLP_RATIO, global_pool=c.GLOBAL_POOL,
        class_token=c.GLOBAL_POOL == "token", drop_rate=c.DROP_RATE,
        drop_path_rate=c.DROP_PATH_RATE, dynamic_img_size=c.PROGRESSIVE_RESIZE > 0,
    )  # fmt: skip


if __name__ == "__main__":
    runtime.run_script(main)
