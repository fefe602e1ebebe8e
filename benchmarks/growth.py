"""How time and memory grow with images, image size, depth, width and batch, beside the expected.

    python -m benchmarks.growth                                    # 9 minutes on two busy cores
    python -m benchmarks.growth --quantities "depth,batch" --depths "1,2,4"

A turn is an epoch of `lab.training.loop` on synthetic images, batches included.
The values of a quantity take turns, each in a process of its own with its own memory peak; all else
stays at the sizes below. Expected are the FLOPs of torch's counter, scaled through the last point,
and the bytes of weights, gradients, moments, images and what autograd keeps. A constant share, such
as the overhead of small steps, makes a measured exponent smaller than the expected one.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.growth_fit import Growth, plot, table
from benchmarks.growth_stages import KINDS, stage_peer
from benchmarks.table import command
from benchmarks.timing import Turns, hardware, in_turns
from lab.core import constants, runtime
from lab.data.augment import Augmentation
from lab.data.datasets import Dataset, full_split
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess
from lab.models.profiling import profile_model
from lab.training.config import FitConfig
from lab.training.loop import Trainer, train_one_epoch
from lab.training.optimizers import adamw
from lab.training.state import TrainState
from model import VisionTransformer, ViTConfig

# --- What is measured; values in growing order, separated by commas ---
QUANTITIES: str = "images,size,depth,width,batch,stages,files"  # which, and in which order
IMAGES: str = "2000,4000,8000,16000,32000"  # an epoch of a tiny model
SIZES: str = "16,32,64,128,192"  # pixels; patches of 4, so 16 to 2,304 of them
DEPTHS: str = "1,2,4,8,16"  # blocks
WIDTHS: str = "64,128,256,512,1024"  # heads of 32
BATCHES: str = "4,8,16,32,64,128"  # images a step
STAGES: str = "1000,10000,100000,1000000"  # images in memory, from a source to the records
FILES: str = "1000,2000,4000,8000,16000"  # image files in a folder
# --- How ---
REPEATS: int = 3  # of every value; the median is reported, and the range drawn
STEPS: int = 2  # training steps in a turn, but where the images grow: then an epoch
OUT: str = "benchmarks/local/growth-{device}"  # .png, .md and .json; empty: nowhere

CONSTANT = {"stages": "STAGES", "batch": "BATCHES", "files": "FILES", "images": "IMAGES"}
CLASSES = 10
FEW = 100  # images or files: the memory of so few is that of the libraries


@dataclass(frozen=True)
class Work:
    """One training step's sizes; `images` make an epoch."""

    size: int = 32
    patch: int = 4
    width: int = 128
    depth: int = 2
    batch: int = 16
    images: int = 0

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def model(self) -> VisionTransformer:
        heads = max(1, self.width // 32)
        return VisionTransformer(
            ViTConfig(self.size, self.patch, 3, CLASSES, self.width, self.depth, heads)
        )


TINY = Work(patch=16, width=32, depth=1, batch=64)
BASE = {"images": TINY, "size": Work(batch=4)}  # what stays; for the others: Work()
NAMES = {
    "images": ("training images", "an epoch", 1), "size": ("image size (pixels)", "a step", 4),
    "depth": ("depth (blocks)", "a step", 1), "width": ("width", "a step", 2),
    "batch": ("batch (images)", "a step", 1), "stages": ("images in memory", "a stage", 1),
    "files": ("image files", "a stage", 1),
}  # fmt: skip
MEMORY_SLOPE = {"size": 2}  # attention is computed in tiles: no matrix of tokens x tokens is kept


def work_of(quantity: str, value: int, steps: int) -> Work:
    """The sizes with one of them set."""
    work = replace(BASE.get(quantity, Work()), **{quantity: value})
    return work if quantity == "images" else replace(work, images=work.batch * steps)


def trainer_of(work: Work) -> Trainer:
    """The training loop's state, ready to train on synthetic images of these sizes."""
    torch.manual_seed(0)
    store = torch.randint(256, (work.images, 3, work.size, work.size), dtype=torch.uint8)
    split = full_split(store, torch.randint(CLASSES, (work.images,)), [""] * work.images)
    classes = [str(c) for c in range(CLASSES)]
    data = Dataset("synthetic", classes, split, split, split, [0.5] * 3, [0.3] * 3, [])
    preprocess = Preprocess(work.size, data.mean, data.std)
    loaders = Loaders(data, preprocess, work.batch, Augmentation(flip=True))
    how = FitConfig(epochs=1, clip_grad=1.0, precision="fp32", trial=True)
    model = work.model()
    return Trainer(model, adamw(model, 1e-4, 0.05), loaders, how, run=None)


def step_peer(name: str, values: dict[str, Any], line: Connection) -> None:
    """A peer for `in_turns`: "depth 4"; "least 0" is what libraries take."""
    quantity, value = name.split()
    if quantity == "least":
        work = Work(size=4, width=32, depth=1, batch=1, images=2)
    else:
        work = work_of(quantity, int(value), values["STEPS"])
    trainer = trainer_of(work)
    trainer.state = TrainState(step=trainer.loaders.steps - 1)
    train_one_epoch(trainer)  # a single step, to warm up
    turns = Turns(line, trainer.accelerator.device)
    while True:
        turns.begin()
        trainer.state = TrainState()
        train_one_epoch(trainer)
        turns.end()


def expected(work: Work) -> tuple[float, float]:
    """FLOPs of an epoch by torch's counter, and MB that its steps keep at once."""
    model, pair = work.model(), 2
    flops = profile_model(model, (3, work.size, work.size))["training_flops"]
    images = torch.zeros(pair, 3, work.size, work.size)
    kept: dict[int, torch.UntypedStorage] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(images), torch.zeros(pair, dtype=torch.long))
    activations = sum(storage.nbytes() for storage in kept.values()) * work.batch / pair
    weights = 4 * sum(p.nbytes for p in model.parameters())  # gradient and two moments as well
    pixels = work.images * 3 * work.size**2
    return float(flops * work.steps * work.batch), (activations + weights + pixels) / 1e6


def measure(quantity: str, values: list[int], scratch: str) -> list[Growth]:
    """Time and memory over the values of a quantity."""
    label, what, slope = NAMES[quantity]
    given = {"STEPS": STEPS, "scratch": scratch}
    stages = KINDS[quantity].stages if quantity in KINDS else ("",)
    peer, least = (stage_peer, f"{quantity} {FEW}") if quantity in KINDS else (step_peer, "least 0")
    _, memory = in_turns(peer, [least], given, len(stages))
    base = memory[least]
    names = [f"{quantity} {value}" for value in values]
    # A turn is one stage, and the rounds start with the first: no turn goes before them.
    warmup = 0 if quantity in KINDS else 1
    times, memory = in_turns(peer, names, given, REPEATS * len(stages), warmup)
    rest = {"quantity": label, "values": values}
    peak = {
        **rest,
        "unit": "MB beyond the libraries",
        "measured": [[memory[n] - base] for n in names],
    }
    if quantity in KINDS:
        found = [
            Growth(what=what, unit="seconds", slope=1, expected=values, part=stage, **rest,
                   measured=[times[name][i :: len(stages)] for name in names])
            for i, stage in enumerate(stages)
        ]  # fmt: skip
        return [*found, Growth(what="peak memory", slope=1, expected=values, **peak)]
    works = [work_of(quantity, value, STEPS) for value in values]
    flops, megabytes = zip(*map(expected, works), strict=True)
    each = 1 if quantity == "images" else STEPS
    seconds = [[t / each for t in times[name]] for name in names]
    memory_slope = MEMORY_SLOPE.get(quantity, slope)
    return [
        Growth(what=what, unit="seconds", slope=slope, expected=flops, measured=seconds, **rest),
        Growth(what="peak memory", slope=memory_slope, expected=megabytes, absolute=True, **peak),
    ]


def asked_for(asked: dict[str, Any]) -> dict[str, list[int]]:
    """The values of each quantity.

    Raises: SystemExit, for a quantity that there is not, or values that are no numbers.
    """
    found = {}
    for quantity in QUANTITIES.split(","):
        if quantity not in NAMES:
            raise SystemExit(f"--quantities: {quantity!r} is none of {', '.join(NAMES)}")
        name = CONSTANT.get(quantity, f"{quantity.upper()}S")
        try:
            found[quantity] = [int(word) for word in asked[name].split(",")]
        except ValueError:
            raise SystemExit(f"{name}={asked[name]!r} must be numbers such as 1,2,4") from None
    return found


def main() -> None:
    asked = constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    growths = []
    for quantity, values in asked_for(asked).items():
        print(f"{quantity}: {values}", flush=True)
        with tempfile.TemporaryDirectory(prefix="vit-lab-") as scratch:
            growths += measure(quantity, values, scratch)
    facts = {**runtime.provenance(), "command": command("growth")}
    lines = [
        f"Growth of time and memory. {hardware(device)}; torch {torch.__version__}; medians of "
        f"{REPEATS} in turns.", "", f"`{facts['command']}`", "",
        *table(growths),
    ]  # fmt: skip
    print("\n".join(lines))
    if OUT:
        out = Path(OUT.format(device=device))
        out.parent.mkdir(parents=True, exist_ok=True)
        plot(out.with_suffix(".png"), growths, f"Growth of cost: {hardware(device)}")
        out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        record = {**facts, "growths": [g.summary() for g in growths]}
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(out.with_suffix(".png"))


if __name__ == "__main__":
    main()
