"""Full fine-tuning of the same ViT in ours, timm's way and the Hugging Face Trainer, side by side.

    python -m benchmarks.finetune_full                     # ViT-B/16 on two CPU cores: 6 minutes
    python -m benchmarks.finetune_full --model vit_tiny_patch16_224 --batch-size 16    # quick

Whole steps are timed: crop, flip, normalization, forward, backward, clipping, AdamW, schedule.
The photographs are random pixels, decoded and in memory for all, the weights are random.

- ours: what finetune.py runs, lab.training.loop.train_one_epoch on lab.data.loaders.Loaders.
- timm: its model, create_loader with the prefetcher, create_optimizer_v2, its scheduler and
  clipping under torch.autocast, put together as its train.py does (the wheel lacks that script).
- transformers: ViTForImageClassification and Trainer, torchvision's transforms in a Dataset.

Each has a process of its own, and with it its own memory. They take turns, an epoch of STEPS each,
and so does a square matrix product, whose rate is the measure of utilisation.
"""

import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torchvision.transforms import v2

import finetune
from benchmarks import table
from benchmarks.peers import Pictures, Recipe, in_transformers, timm_training, transformers_trainer
from benchmarks.timing import PRODUCT, Turns, hardware, in_turns, product, product_flop
from lab.core import Run, constants, runtime
from lab.data import Dataset, Loaders, Preprocess, datasets
from lab.models import profile_model
from lab.models.conversion import config_of
from lab.training import FitConfig, loop, optimizers
from lab.training.state import TrainState
from model import VisionTransformer, ViTConfig

# --- What is measured ---
MODEL: str = "vit_base_patch16_224"  # timm's name of a plain ViT
PEERS: str = "ours,timm,transformers"  # in the order of the table
CLASSES: int = 37  # outputs of the head
PRECISION: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is in hardware
# --- How it is measured ---
BATCH_SIZE: int | None = None  # images in a step; none: 8 on a CPU, 128 on a GPU
STEPS: int | None = None  # timed at once; none: 2 on a CPU, 40 on a GPU
REPEATS: int = 5  # the median over so many is reported, after one that is not
WORKERS: int | None = None  # of the others' DataLoaders; none: one a core, at most 16
OUT: str = "benchmarks/local/finetune_full-{device}.md"  # where the table goes; empty: nowhere

H100 = 989e12  # FLOP/s in bf16, dense, by the data sheet of the SXM version
AUGMENT = finetune.AUGMENTATIONS["photographs"]


def ours(turns: Turns, data: Dataset, config: ViTConfig, recipe: Recipe) -> None:
    """What finetune.py does between two validations."""
    loaders = Loaders(data, preprocess(config), recipe.batch_size, AUGMENT)
    model = VisionTransformer(config)
    optimizer = optimizers.adamw(model, recipe.learning_rate, recipe.weight_decay)
    how = FitConfig(
        epochs=recipe.epochs, warmup_fraction=recipe.warmup, clip_grad=recipe.clip_grad,
        precision="bf16" if recipe.bf16 else "fp32", trial=True,
    )  # fmt: skip
    trainer = loop.Trainer(model, optimizer, loaders, how, Run(Path()))  # nothing is written
    for epoch in range(1, 1 + recipe.epochs):
        trainer.state = TrainState(epoch)
        turns.begin()
        loop.train_one_epoch(trainer)
        turns.end()


def timms(turns: Turns, data: Dataset, config: ViTConfig, recipe: Recipe) -> None:
    batches = timm.data.create_loader(
        Pictures(data.train.store, data.train.labels), (3, config.img_size, config.img_size),
        recipe.batch_size, is_training=True, scale=(AUGMENT.rrc_min_area, 1.0), color_jitter=None,
        interpolation="bilinear", mean=data.mean, std=data.std, num_workers=recipe.workers,
        pin_memory=turns.device.type == "cuda", device=turns.device,
    )  # fmt: skip
    model = timm.create_model(MODEL, num_classes=CLASSES).to(turns.device)
    epoch = timm_training(model, batches, recipe)
    for _ in range(recipe.epochs):
        turns.begin()
        epoch()
        turns.end()


def transformers(turns: Turns, data: Dataset, config: ViTConfig, recipe: Recipe) -> None:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    transform = v2.Compose([
        v2.RandomResizedCrop(config.img_size, scale=(AUGMENT.rrc_min_area, 1)),
        v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data.mean, data.std),
    ])  # fmt: skip
    pictures = Pictures(data.train.store, data.train.labels, transform)
    with tempfile.TemporaryDirectory() as folder:
        model = in_transformers(config)
        transformers_trainer(model, pictures, recipe, folder, (Clock(),)).train()


def preprocess(config: ViTConfig) -> Preprocess:
    return Preprocess(
        config.img_size, [0.5] * 3, [0.5] * 3, timm.get_pretrained_cfg(MODEL).crop_pct
    )


def photographs(config: ViTConfig) -> Dataset:
    """Random pixels for one epoch, of the size that photographs are kept at."""
    how, count = preprocess(config), STEPS * BATCH_SIZE
    rng = torch.Generator().manual_seed(0)
    shape = (count, 3, how.resized, how.resized)
    images = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    split = datasets.Split(images, torch.arange(count), labels, [str(i) for i in range(count)])
    classes = [str(i) for i in range(CLASSES)]
    return Dataset("random", classes, split, split, split, how.mean, how.std, [])


def config_of_model() -> ViTConfig:
    with torch.device("meta"):
        model = timm.create_model(MODEL, num_classes=CLASSES)
    return config_of(model.state_dict(), model.blocks[0].attn.num_heads)


PEER = {"ours": ours, "timm": timms, "transformers": transformers}


def peer(name: str, values: dict[str, Any], line: Connection) -> None:
    """A peer's process."""
    globals().update(values)
    turns = Turns(line, runtime.process_state().device)
    if name == PRODUCT:
        dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
        turns.take(product(turns.device.type, dtype))
    torch.manual_seed(0)
    config = config_of_model()
    recipe = Recipe(1 + REPEATS, STEPS, BATCH_SIZE, 1e-4, 0.05, finetune.WARMUP_FRACTION,
                    finetune.CLIP_GRAD, PRECISION == "bf16", WORKERS)  # fmt: skip
    PEER[name](turns, photographs(config), config, recipe)


def main() -> None:
    global PRECISION, BATCH_SIZE, STEPS, WORKERS
    constants_given = constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    gpu = device == "cuda"
    PRECISION = "bf16" if FitConfig(1, precision=PRECISION).mixed_precision == "bf16" else "fp32"
    BATCH_SIZE = BATCH_SIZE or (128 if gpu else 8)
    STEPS = STEPS or (40 if gpu else 2)
    WORKERS = min(os.cpu_count() or 1, 16) if WORKERS is None else WORKERS
    values = {name: globals()[name] for name in constants_given}
    names, notes = table.present(PEERS.split(","))
    times, memory = in_turns(peer, [*names, PRODUCT], values, REPEATS)

    config, images = config_of_model(), STEPS * BATCH_SIZE
    size = (3, config.img_size, config.img_size)
    flops = profile_model(VisionTransformer(config), size)["training_flops"]
    what = f"full fine-tuning, {PRECISION}"
    rows = table.compared(what, times, table.OURS, names, images, memory)
    shares = table.shares(what, times, PRODUCT, flops * images, product_flop(device))
    notes.append(f"Full fine-tuning of {MODEL}, {config.img_size} pixels, batch {BATCH_SIZE}, "
                 f"data included; a step is {flops / 1e9:.1f} GFLOP an image.")  # fmt: skip
    held = "allocated; ours keeps the photographs there" if gpu else "resident, without workers"
    notes.append(f"Memory: the most that was {held}.")
    notes += [
        f"{s.name}: {s.share * s.product / H100:.0%} of an H100's 989 TFLOP/s (data sheet)."
        for s in shares
        if gpu
    ]
    lines = [
        f"Full fine-tuning of {MODEL}, {config.img_size} pixels, {PRECISION}, batch {BATCH_SIZE}: "
        "whole steps, data included.  ",
        f"{hardware(device)}. {table.versions(names)}.  ",
        f"Medians of {REPEATS} repeats of {STEPS} steps, in turns; workers of a DataLoader: "
        f"{WORKERS}.  ",
        f"`{table.command('finetune_full')}`", "", *table.row_lines(rows), "",
        *table.share_lines(shares), "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
    table.keep("finetune_full", lines, OUT.format(device=device), rows, notes, shares)


if __name__ == "__main__":
    main()
