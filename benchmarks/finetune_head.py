"""Training the head alone: on cached features, and through the frozen model as others do it.

    python -m benchmarks.finetune_head              # our small weights on digits: about 6 minutes
    python -m benchmarks.finetune_head --pretrained vit_base_patch16_224.augreg_in21k --dataset pets

Four ways, with the same frozen weights, images, batch size, AdamW, rates and a head of zeros:

- cached: what finetune.py --mode head does for one rate and one weight decay: the features of every
  image once (lab.finetuning.linear_probe.cached_features), then lab.training.loop.fit on them.
- uncached: the frozen model in lab.training.loop.fit, with a forward pass in every epoch.
- timm: the frozen model, its loader and the loop of its train.py.
- transformers: the frozen ViTForImageClassification and Trainer.

Only training is timed, in units of one forward pass of ours over the training images in the same
repeat: for all ways the clock leaves out the validation and test images, which pass through the
model once more whatever the way. The ways take turns; seeds differ between repeats.
"""

import copy
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

import finetune
from benchmarks import peers, table
from benchmarks.head_ways import OURS, WAY, Task
from benchmarks.timing import hardware, seconds
from lab.core import constants, run_script, runtime
from lab.data import Augmentation, Loaders, load_data
from lab.finetuning.linear_probe import Backbone
from lab.models import load_pretrained
from lab.training import FitConfig, Predictions, predict

# --- What is measured ---
PRETRAINED: str = "weights/vit_128x6_cifar10.safetensors"  # as in finetune.py, but a plain ViT
IMG_SIZE: int | None = None  # pixels; none: the size that the weights were trained at
DATASET: str = "digits"  # as in finetune.py
DATA_DIR: str = "data"  # where downloads are
WAYS: str = "cached,uncached,timm,transformers"  # in the order of the table
# --- Training ---
EPOCHS: int = 10  # passes over the training images
BATCH_SIZE: int = 64  # images in a step
LEARNING_RATE: float = 3e-2  # peak rate of AdamW; warm-up, cosine and clipping are finetune.py's
WEIGHT_DECAY: float = 0.0  # of the head's weights
PRECISION: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is in hardware
# --- How it is measured ---
REPEATS: int = 5  # the median over so many is reported
WORKERS: int | None = None  # of the others' DataLoaders; none: one a core, at most 16
OUT: str = "benchmarks/local/finetune_head-{device}.md"  # where the table goes; empty: nowhere


def one_pass(model: nn.Module, loaders: Loaders, bf16: bool) -> float:
    """Seconds of a forward pass over the training images."""
    device = runtime.process_state().device
    model = copy.deepcopy(model).to(device)
    loaders.to(device)

    @torch.no_grad()
    def work() -> None:
        for _, images, _ in loaders.evaluation("train"):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model(images)

    return seconds(work, device.type)


def measure(task: Task, names: list[str], test: Predictions) -> dict[str, list[tuple[float, ...]]]:
    """For each way and repeat: seconds of all, of the features, of a pass, and test accuracy.

    test: the features of the test images in place of logits.
    """
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    one_pass(task.model, task.loaders, task.recipe.bf16)  # warm-up
    for repeat in range(REPEATS):
        loaders = replace(task.loaders, seed=repeat)
        unit = one_pass(task.model, loaders, task.recipe.bf16)
        # In another order at every turn: who always follows the same neighbour finds its caches.
        for name in random.Random(repeat).sample(names, len(names)):
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(repeat)
                work = WAY[name](replace(task, loaders=loaders, folder=Path(folder)))
                out = []
                spent = seconds(
                    lambda w=work, o=out: o.append(w()), runtime.process_state().device.type
                )
            head, features = out[0]
            with torch.no_grad():
                scores = replace(test, logits=head.cpu().float()(test.logits))
            found[name].append((spent, features, unit, 100 * scores.accuracy))
    return found


def main() -> None:
    global WORKERS
    constants.override(sys.modules[__name__])
    pretrained = load_pretrained(PRETRAINED, IMG_SIZE, plain_only=True)
    how = pretrained.preprocess
    data = load_data(DATASET, DATA_DIR, how.resized, interpolation=how.interpolation)
    pretrained.reset_classifier(data.classes)
    model = pretrained.model
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)  # weights of these very classes come with a trained head
    names, notes = table.present(WAYS.split(","), OURS)
    peers.check_twins(model, names)

    WORKERS = min(os.cpu_count() or 1, 16) if WORKERS is None else WORKERS
    mixed = FitConfig(1, precision=PRECISION).mixed_precision
    device, accelerator = runtime.process_state().device.type, Accelerator(mixed_precision=mixed)
    loaders = Loaders(data, how, BATCH_SIZE, Augmentation())
    loaders.to(accelerator.device)
    backbone = Backbone(copy.deepcopy(model).to(accelerator.device))
    test = Predictions(predict(backbone, loaders, "test", accelerator), data.test.labels)
    recipe = peers.Recipe(
        EPOCHS, loaders.steps, loaders.batch_size, LEARNING_RATE, WEIGHT_DECAY,
        finetune.WARMUP_FRACTION, finetune.CLIP_GRAD, mixed == "bf16", WORKERS,
    )  # fmt: skip
    one = data.val.select(torch.arange(len(data.val)) == 0)  # stands for all that is not timed
    loaders = replace(loaders, data=replace(data, val=one, test=one))
    found = measure(Task(model, loaders, recipe, Path()), names, test)

    times = {name: [repeat[0] for repeat in repeats] for name, repeats in found.items()}
    what = f"head-only fine-tuning, {EPOCHS} epochs"
    rows = table.compared(what, times, "cached", [n for n in names if n not in OURS])
    cells, accuracies = [], []
    for name, repeats in found.items():
        spent, features, unit, accuracy = zip(*repeats, strict=True)
        passes, low, high = table.ratios(unit, spent)
        accuracies.append(mean(accuracy))
        cells.append([
            f"{'ours, ' * (name in OURS)}{name}", f"{median(spent):,.2f}",
            f"{passes:.2f} ({low:.2f} to {high:.2f})",
            f"{mean(accuracy):.2f} ± {pstdev(accuracy):.2f}",
        ])  # fmt: skip
        if name == "cached":
            first = median(f / u for f, u in zip(features, unit, strict=True))
            rest = median((s - f) / u for s, f, u in zip(spent, features, unit, strict=True))
            notes.append(f"Head only, ours, cached: {first:.2f} passes over the images for the "
                         f"features, {rest:.2f} for the head and the files.")  # fmt: skip
    notes.append(f"A pass takes {median(unit):.2f} s; accuracies differ by "
                 f"{max(accuracies) - min(accuracies):.2f} points at most.")  # fmt: skip
    heads = ["way", "seconds", "passes over the training images (range)", "test accuracy in %"]
    lines = [
        f"The head of {Path(PRETRAINED).stem}, {how.img_size} pixels, trained on {data.name}: "
        f"{EPOCHS} epochs of {len(data.train):,} images, batch {BATCH_SIZE}, "
        f"{'bf16' if recipe.bf16 else 'fp32'}.  ",
        f"{hardware(device)}. {table.versions(names)}.  ",
        f"Median of {REPEATS} repeats, ways in turns; workers of a DataLoader: {WORKERS}. "
        f"Accuracy: mean and deviation over seeds 0 to {REPEATS - 1}, {len(data.test):,} images, "
        "after the last epoch.  ",
        f"`{table.command('finetune_head')}`", "", *table.in_markdown(heads, cells), "",
        *(f"- {note}" for note in notes),
    ]  # fmt: skip
    table.keep("finetune_head", lines, OUT.format(device=device), rows, notes)


if __name__ == "__main__":
    run_script(main)
