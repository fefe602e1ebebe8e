"""How time and memory grow with images, image size, depth, width and batch size.

    python -m benchmarks.growth                                    # 9 minutes on two busy cores
    python -m benchmarks.growth --quantities "depth,batch" --depths "1,2,4"

A measurement is an epoch of `lab.training.loop` on synthetic images, or a stage around it (see
growth_stages.py). The values of a quantity alternate, each in its own process. The expected time
of a step is proportional to the FLOPs that torch counts; all else is expected to have the order of
large values. A constant part, such as the overhead of small steps, lowers a measured exponent.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import our_loop, table
from benchmarks.growth_plot import Growth, growth_table, plot
from benchmarks.growth_stages import KINDS, measure_stages
from benchmarks.libraries import Recipe
from benchmarks.timing import Worker, alternate_processes
from lab.core import UserError, constants, runtime
from lab.data import Augmentation, Loaders, Preprocess
from lab.models import profile_model
from model import VisionTransformer, ViTConfig

# --- What is measured; values in increasing order, separated by commas ---
QUANTITIES: str = "images,size,depth,width,batch,stages,files"  # which, and in which order
IMAGES: str = "2000,4000,8000,16000,32000"  # an epoch of a tiny model
SIZE: str = "16,32,64,128,192"  # pixels; patches of 4, so 16 to 2,304 of them
DEPTH: str = "1,2,4,8,16"  # blocks
WIDTH: str = "64,128,256,512,1024"  # heads of 32
BATCH: str = "4,8,16,32,64,128"  # images per step
STAGES: str = "1000,10000,100000,1000000"  # images in memory, from loading to the records
FILES: str = "1000,2000,4000,8000,16000"  # image files in a folder
# --- How it is measured ---
REPEATS: int = 3  # measurements of every value
STEPS: int = 2  # training steps per measurement; where the images grow, an epoch
OUT: str = "benchmarks/local/growth-{device}.md"  # .md, .json and .png; empty: nowhere

CLASSES = 10
FEW = 100  # images or files; the libraries then dominate the memory


@dataclass(frozen=True)
class Workload:
    """The sizes of a training step; `images` make an epoch."""

    size: int = 32
    patch: int = 4
    width: int = 128
    depth: int = 2
    batch: int = 16
    images: int = 0

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def build(self) -> VisionTransformer:
        heads = max(1, self.width // 32)
        return VisionTransformer(
            ViTConfig(self.size, self.patch, 3, CLASSES, self.width, self.depth, heads)
        )


# What stays constant while another quantity grows; Workload() for the other quantities.
BASE = {
    "images": Workload(patch=16, width=32, depth=1, batch=64), "size": Workload(batch=4),
    "libraries": Workload(size=4, width=32, depth=1, batch=1, images=2),
}  # fmt: skip
NAMES = {  # label, what is timed, and the exponent of the order of its time
    "images": ("training images", "an epoch", 1), "size": ("image size (pixels)", "a step", 4),
    "depth": ("depth (blocks)", "a step", 1), "width": ("width", "a step", 2),
    "batch": ("batch (images)", "a step", 1), "stages": ("images in memory", "a stage", 1),
    "files": ("image files", "a stage", 1),
}  # fmt: skip
MEMORY_ORDER = {"size": 2}  # attention is computed in tiles: no (tokens, tokens) matrix is kept


def workload_of(quantity: str, value: int, steps: int) -> Workload:
    """The sizes with one of them replaced."""
    workload = BASE.get(quantity, Workload())
    if quantity != "libraries":
        workload = replace(workload, **{quantity: value})
    return workload if workload.images else replace(workload, images=workload.batch * steps)


def measure_training(name: str, settings: dict[str, Any], worker: Worker) -> None:
    """A process for `alternate_processes`; its name is a quantity and a value, as in "depth 4"."""
    quantity, value = name.split()
    w = workload_of(quantity, int(value), settings["STEPS"])
    data = our_loop.synthetic_data(w.images, w.size, CLASSES)
    preprocess = Preprocess(w.size, data.mean, data.std)
    loaders = Loaders(data, preprocess, w.batch, Augmentation(flip=True))
    worker.serve(our_loop.training_epoch(w.build(), loaders, Recipe(1, w.steps, w.batch)))


def expected_flops(workload: Workload) -> float:
    """Floating-point operations of an epoch, counted by torch."""
    cost = profile_model(workload.build(), (3, workload.size, workload.size))
    return float(cost["training_flops"] * workload.steps * workload.batch)


def measure(quantity: str, values: list[int], scratch: str) -> list[Growth]:
    """Time and memory for the values of a quantity."""
    label, what, order = NAMES[quantity]
    settings = {"STEPS": STEPS, "scratch": scratch}
    names = [f"{quantity} {value}" for value in values]
    if quantity in KINDS:
        target, smallest, stages = measure_stages, f"{quantity} {FEW}", KINDS[quantity].stages
        warmup = 0  # a measurement is one stage, and the first one has to come first
    else:
        target, smallest, stages, warmup = measure_training, "libraries 0", ("",), 1
    _, memory = alternate_processes(target, [smallest], settings, len(stages))
    libraries = memory[smallest]
    times, memory = alternate_processes(target, names, settings, REPEATS * len(stages), warmup)
    if quantity in KINDS:
        found = [
            Growth(label, stage, "seconds", values,
                   [times[name][i :: len(stages)] for name in names], values, order)
            for i, stage in enumerate(stages)
        ]  # fmt: skip
    else:
        divisor = 1 if quantity == "images" else STEPS
        seconds = [[t / divisor for t in times[name]] for name in names]
        flops = [expected_flops(workload_of(quantity, value, STEPS)) for value in values]
        found = [Growth(label, what, "seconds", values, seconds, flops, order)]
    peaks, order = [[memory[n] - libraries] for n in names], MEMORY_ORDER.get(quantity, order)
    bound = [value**order for value in values]
    return [*found, Growth(label, "peak memory", "MB beyond the libraries", values, peaks, bound,
                           order)]  # fmt: skip


def parse_values(settings: dict[str, Any]) -> dict[str, list[int]]:
    """The values of each quantity.

    Raises: UserError, for an unknown quantity, or values that are not numbers.
    """
    found = {}
    for quantity in QUANTITIES.split(","):
        if quantity not in NAMES:
            raise UserError(f"QUANTITIES: {quantity!r} is none of {', '.join(NAMES)}")
        text = settings[quantity.upper()]
        try:
            found[quantity] = [int(word) for word in text.split(",")]
        except ValueError:
            raise UserError(f"{quantity.upper()}={text!r} must be numbers such as 1,2,4") from None
    return found


def main() -> None:
    settings = constants.override(sys.modules[__name__])
    hardware = table.describe_hardware(runtime.process_state().device.type)
    growths = []
    for quantity, values in parse_values(settings).items():
        print(f"{quantity}: {values}", flush=True)
        with tempfile.TemporaryDirectory(prefix="vit-lab-") as scratch:
            growths += measure(quantity, values, scratch)
    record = {**table.provenance(), "growths": [growth.summary() for growth in growths]}
    text = "\n".join([
        f"Growth of time and memory. {hardware}; torch {torch.__version__}; medians of {REPEATS} "
        "repeats.", "", f"`{record['command']}`", "", *growth_table(growths),
    ])  # fmt: skip
    print(text)
    if OUT:
        out = Path(OUT.format(device=runtime.process_state().device.type))
        table.write(out, text, record)
        plot(out.with_suffix(".png"), growths, f"Growth of time and memory: {hardware}")
        print(out.with_suffix(".png"))


if __name__ == "__main__":
    runtime.run_script(main)
