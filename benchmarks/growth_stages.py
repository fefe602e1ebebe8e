"""What happens around the steps, stage by stage, for more and more images: see growth.py.

Every stage is the project's own function on synthetic images; a turn of a process is one stage.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from benchmarks.timing import Turns
from lab.core import Run, runtime
from lab.data import Augmentation, Loaders, Preprocess, datasets, load_data
from lab.report import records
from lab.training import evaluate, results

SIDE, CLASSES, BATCH = 8, 10, 1024  # pixels; images a batch
ROW = {"epoch": 1, "seconds": 1.0, "images_per_second": 1.0, "images": 1, "peak_memory_mb": 1}
ROW |= {f"{part}_{key}": 0.5 for part in ("train", "val") for key in ("loss", "accuracy")}


class Many:
    """The life of `count` images in memory, from a source to the records."""

    stages = ("load and split", "thin to half", "fingerprint", "batches of an epoch",
              "evaluate", "write records", "read records")  # fmt: skip

    def __init__(self, count: int, scratch: Path):
        self.count, self.run = count, Run(scratch / f"run-{count}")
        self.run.folder.mkdir()
        config = {"model": {"training_flops": 1}}
        (self.run.folder / "config.json").write_text(json.dumps(config))
        store = torch.randint(256, (count, 1, SIDE, SIDE), dtype=torch.uint8)
        names = [f"image-{i}" for i in range(count)]
        labels = torch.randint(CLASSES, (count,))
        self.source = lambda: datasets.Source(
            [str(c) for c in range(CLASSES)], {"train": datasets.full_split(store, labels, names)}
        )
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, CLASSES))
        self.accelerator = Accelerator()

    def work(self, stage: str) -> Callable[[], object]:
        return {
            "load and split": self.load,
            "thin to half": lambda: datasets.subsample(self.data, 0.5),
            "fingerprint": lambda: replace(self.data).fingerprint,
            "batches of an epoch": self.epoch,
            "evaluate": self.evaluate,
            "write records": lambda: results.write_results(
                self.run, self.scores, self.data, [ROW], 1
            ),
            "read records": lambda: records.read_predictions(
                self.run.folder / "predictions.csv", self.data.classes
            ),
        }[stage]

    def load(self) -> None:
        datasets.load_digits = self.source  # the rest treats it like real data
        self.data = load_data("digits")
        preprocess = Preprocess(SIDE, self.data.mean, self.data.std)
        self.loaders = Loaders(self.data, preprocess, BATCH, Augmentation(flip=True))
        device = self.accelerator.device
        self.loaders.to(device)
        self.model.to(device)

    def epoch(self) -> None:
        for _ in self.loaders.train(1):
            pass

    def evaluate(self) -> None:
        self.scores = evaluate(self.model, self.loaders, "test", self.accelerator)
        assert self.scores.accuracy <= 1


class Files:
    """`count` image files in a folder, as a user's own data."""

    stages = ("find and decode", "again, from the cache")

    def __init__(self, count: int, scratch: Path):
        self.root = scratch / f"files-{count}"
        rng = np.random.default_rng(0)
        for label in range(CLASSES):
            folder = self.root / "train" / str(label)
            folder.mkdir(parents=True)
            held = BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(held, "PNG")
            for i in range(label, count, CLASSES):
                (folder / f"{i}.png").write_bytes(held.getvalue())

    def work(self, stage: str) -> Callable[[], object]:
        if stage == "find and decode":
            shutil.rmtree(self.root / "vit-lab-cache", ignore_errors=True)
        return lambda: load_data(str(self.root))


KINDS = {"stages": Many, "files": Files}


def stage_peer(name: str, values: dict, line: Connection) -> None:
    """A peer for `benchmarks.timing.in_turns`: "stages 1000"; its turns are stage after stage."""
    kind, count = name.split()
    todo = KINDS[kind](int(count), Path(values["scratch"]))
    turns, number = Turns(line, runtime.process_state().device), 0
    while True:
        work = todo.work(todo.stages[number % len(todo.stages)])
        turns.begin()
        work()
        turns.end()
        number += 1
