"""The stages around training, for more and more images: see growth.py.

Every stage calls the project's own functions on synthetic images.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from benchmarks.timing import Worker
from lab.core import Run
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.report import records
from lab.training import evaluate, results

SIDE, CLASSES, BATCH = 8, 10, 1024  # pixels; images per batch
HISTORY = {"epoch": 1, "seconds": 1.0, "images_per_second": 1.0, "images": 1, "peak_memory_mb": 1}
HISTORY |= {f"{part}_{key}": 0.5 for part in ("train", "val") for key in ("loss", "accuracy")}


class InMemory:
    """`count` images in memory, from loading to the records of a run."""

    stages = ("load and split", "subsample half", "fingerprint", "batches of an epoch",
              "evaluate", "write records", "read records")  # fmt: skip

    def __init__(self, count: int, scratch: Path):
        self.run = Run(scratch / f"run-{count}")
        self.run.folder.mkdir()
        config = {"model": {"training_flops": 1}}
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
        self.loaders = Loaders(self.data, preprocess, BATCH, Augmentation(flip=True))
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
