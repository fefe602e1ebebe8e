"""How time and memory grow with images, image size, depth, width and batch size.

    python -m benchmarks.growth                                    # 5 minutes on two idle cores
    python -m benchmarks.growth --quantities "depth,batch" --depth "1,2,4"

A measurement is an epoch of `lab.training.loop` on synthetic images, or a stage around it, such as
loading. The values of a quantity alternate, each in its own process. The expected time of a step is
proportional to the FLOPs that torch counts; all else is expected to have the order of large values.
A constant part, such as the overhead of small steps, lowers a measured exponent.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.ticker import EngFormatter, NullLocator
from PIL import Image
from torch import nn

from benchmarks import libraries, table
from benchmarks.timing import Worker, alternate_processes
from lab.core import Run, UserError, constants, plots, runtime
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.models import profile_model
from lab.report import records
from lab.training import evaluate, results
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


# --- A training step ---


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
    data = libraries.synthetic_data(w.images, w.size, CLASSES)
    preprocess = Preprocess(w.size, data.mean, data.std)
    loaders = Loaders(data, preprocess, w.batch, Augmentation(flip=True))
    recipe = libraries.Recipe(1, w.steps, w.batch)
    worker.serve(libraries.our_epoch(w.build(), loaders, recipe))


def expected_flops(workload: Workload) -> float:
    """Floating-point operations of an epoch, counted by torch."""
    cost = profile_model(workload.build(), (3, workload.size, workload.size))
    return float(cost["training_flops"] * workload.steps * workload.batch)


# --- The stages around training: the project's own functions, on synthetic images ---

SIDE, STAGE_BATCH = 8, 1024  # pixels; images per batch
HISTORY = {"epoch": 1, "seconds": 1.0, "images_per_second": 1.0, "images": 1, "peak_memory_mb": 1}
HISTORY |= {f"{part}_{key}": 0.5 for part in ("train", "val") for key in ("loss", "accuracy")}


class InMemory:
    """`count` images in memory, from loading to the records of a run."""

    stages = ("load and split", "subsample half", "fingerprint", "batches of an epoch",
              "evaluate", "write records", "read records")  # fmt: skip

    def __init__(self, count: int, scratch: Path):
        self.run = Run(scratch / f"run-{count}")
        self.run.folder.mkdir()
        config = {"constants": {}, "model": {"training_flops": 1}}
        (self.run.folder / "config.json").write_text(json.dumps(config))
        store = torch.randint(256, (count, 1, SIDE, SIDE), dtype=torch.uint8)
        names, labels = [f"image-{i}" for i in range(count)], torch.randint(CLASSES, (count,))
        split = datasets.full_split(store, labels, names)
        self.source = datasets.Source([str(c) for c in range(CLASSES)], {"train": split})
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, CLASSES))
        self.accelerator = Accelerator()
        self.functions = [
            self.load,
            lambda: datasets.subsample(self.data, 0.5),
            lambda: replace(self.data).fingerprint,
            lambda: [None for _ in self.loaders.train(1)],
            self.evaluate,
            lambda: results.write_results(self.run, self.test, self.data, [HISTORY], 1),
            lambda: records.read_predictions(
                self.run.folder / "predictions.csv", self.data.classes
            ),
        ]

    def prepare(self, stage: int) -> Callable[[], object]:
        return self.functions[stage]

    def load(self) -> None:
        datasets.load_digits = lambda: self.source  # from here on, like real data
        self.data = load_data("digits")
        preprocess = Preprocess(SIDE, self.data.mean, self.data.std)
        self.loaders = Loaders(self.data, preprocess, STAGE_BATCH, Augmentation(flip=True))
        self.loaders.to(self.accelerator.device)
        self.model.to(self.accelerator.device)

    def evaluate(self) -> None:
        self.test = evaluate(self.model, self.loaders, "test", self.accelerator)


class Files:
    """`count` image files in a folder, as a user's own data."""

    stages = ("find and decode", "again, from the cache")

    def __init__(self, count: int, scratch: Path):
        self.root = scratch / f"files-{count}"
        rng = np.random.default_rng(0)
        for label in range(CLASSES):
            folder = self.root / "train" / str(label)
            folder.mkdir(parents=True)
            png = BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(png, "PNG")
            for i in range(label, count, CLASSES):
                (folder / f"{i}.png").write_bytes(png.getvalue())

    def prepare(self, stage: int) -> Callable[[], object]:
        if stage == 0:
            shutil.rmtree(self.root / "vit-lab-cache", ignore_errors=True)
        return lambda: load_data(str(self.root))


KINDS = {"stages": InMemory, "files": Files}


def measure_stages(name: str, settings: dict, worker: Worker) -> None:
    """A process for `alternate_processes`; its name is a kind and a count, as in "stages 1000"."""
    kind, count = name.split()
    subject, measured = KINDS[kind](int(count), Path(settings["scratch"])), 0
    while True:
        function = subject.prepare(measured % len(subject.stages))
        worker.start()
        function()
        worker.stop()
        measured += 1


# --- Exponents, table and figure ---


@dataclass
class Growth:
    """One cost, measured for the values of one quantity, and the expected cost."""

    quantity: str  # such as "depth (blocks)"
    what: str  # such as "a step", or a stage
    unit: str
    values: list[int]
    measured: list[list[float]]  # the repeats of each value
    expected: list[float]  # proportional to the expected cost
    order: float  # the exponent for large values: 1 is linear

    @property
    def medians(self) -> list[float]:
        return [median(repeats) for repeats in self.measured]

    def summary(self) -> dict:
        """Everything for the record, including the exponents."""
        return {
            **vars(self),
            "medians": self.medians,
            "exponent": exponent(self.values, self.medians),
            "expected_exponent": exponent(self.values, self.expected),
            "lowest_exponent": exponent(self.values, [min(m) for m in self.measured]),
        }


def exponent(values: list[float], costs: list[float]) -> float | None:
    """The slope of log cost against log value by least squares; None with fewer than two points.

    Costs that are not positive, such as memory below the resolution, are left out.
    """
    kept = [(v, c) for v, c in zip(values, costs, strict=True) if c > 0]
    if len({v for v, _ in kept}) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(kept, dtype=float)).T, 1)[0])


def growth_table(growths: list[Growth]) -> list[str]:
    """The lines of a Markdown table."""
    cells = []
    for growth in growths:
        s, medians = growth.summary(), growth.medians
        names = ("exponent", "expected_exponent", "lowest_exponent")
        fitted, wanted, lowest = ("-" if s[n] is None else f"{s[n]:.2f}" for n in names)
        cells.append([
            growth.quantity, f"{growth.what}: {growth.unit}",
            f"{growth.values[0]:,} to {growth.values[-1]:,}",
            f"{medians[0]:.3g} to {medians[-1]:,.4g}", f"**{fitted}** ({wanted})", lowest,
        ])  # fmt: skip
    heads = ["quantity", "cost", "values", "measured, first to last",
             "exponent of the medians (expected)", "of the lowest"]  # fmt: skip
    return table.to_markdown(heads, cells)


def plot(path: Path, growths: list[Growth], title: str) -> None:
    """One panel per quantity and unit."""
    panels: dict[tuple[str, str], list[Growth]] = {}
    for growth in growths:
        panels.setdefault((growth.quantity, growth.unit), []).append(growth)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.9 * rows + 0.8)
    with plots.plt.rc_context({"font.size": 12}):
        figure, axes = plots.plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, found in zip(axes.flat, panels.values(), strict=False):
            _draw_panel(axis, found)
        figure.suptitle(title, fontsize=14)
        plots.save_figure(figure, path, dpi=90)


def _draw_panel(axis: plots.plt.Axes, growths: list[Growth]) -> None:
    """Medians with their range; the expected cost, if there is one curve; the order as a line."""
    for growth in growths:
        middle = np.array(growth.medians)
        ends = np.array([[min(m), max(m)] for m in growth.measured]).T
        shown = middle > 0
        slope = growth.summary()["exponent"]
        label = growth.what if len(growths) > 1 else "measured"
        axis.errorbar(
            np.array(growth.values)[shown], middle[shown], np.abs(ends - middle)[:, shown],
            marker="o", ms=5, lw=1, capsize=3,
            label=label if slope is None else f"{label}: {slope:.2f}",
        )  # fmt: skip
    first = growths[0]
    if len(growths) == 1:
        scale = first.medians[-1] / first.expected[-1]
        axis.plot(first.values, [scale * e for e in first.expected], "--", label="expected")
    top = max(1e-9, *(growth.medians[-1] for growth in growths))
    x = np.array(first.values, dtype=float)
    line = top * (x / x[-1]) ** first.order
    axis.plot(x, line, ":", color="gray", label=f"slope {first.order:g}")
    axis.set(xscale="log", yscale="log", xlabel=first.quantity)
    axis.set_ylabel(f"{first.what if len(growths) == 1 else 'a stage'},\n{first.unit}")
    axis.set_xticks(first.values)
    axis.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    many = len(growths) > 2
    axis.legend(fontsize=7 if many else 10, loc="lower right" if many else "upper left")


# --- All measurements ---


def measure(quantity: str, values: list[int], scratch: str) -> list[Growth]:
    """Time and memory for the values of a quantity."""
    label, what, order = NAMES[quantity]
    settings = {"STEPS": STEPS, "scratch": scratch}
    names = [f"{quantity} {value}" for value in values]
    if quantity in KINDS:
        target, smallest, stages = measure_stages, f"{quantity} {FEW}", KINDS[quantity].stages
        warmup = 0  # a measurement is one stage, and the first one has to come first
        divisor, expected = 1, values
    else:
        target, smallest, stages, warmup = measure_training, "libraries 0", (what,), 1
        divisor = 1 if quantity == "images" else STEPS
        expected = [expected_flops(workload_of(quantity, value, STEPS)) for value in values]
    _, memory = alternate_processes(target, [smallest], settings, len(stages))
    of_libraries = memory[smallest]
    times, memory = alternate_processes(target, names, settings, REPEATS * len(stages), warmup)
    found = []
    for i, stage in enumerate(stages):
        seconds = [[t / divisor for t in times[name][i :: len(stages)]] for name in names]
        found.append(Growth(label, stage, "seconds", values, seconds, expected, order))
    order = MEMORY_ORDER.get(quantity, order)
    peaks = [[memory[name] - of_libraries] for name in names]
    bound = [value**order for value in values]
    unit = "MB beyond the libraries"
    return [*found, Growth(label, "peak memory", unit, values, peaks, bound, order)]


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
