"""Trains a plain ViT for a fixed time; the learning rate and the image size follow the clock.

This loop cannot be lab.training.loop, which counts epochs: here the schedules depend on the seconds
left, and the clock has to stop during validation. Batches, optimizers, the formula of the schedule
and predictions are those of lab.training.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import profile
from torchvision.transforms import v2

from benchmarks.libraries import DTYPES
from benchmarks.timing import synchronize
from benchmarks.variants import build_model, set_dropping
from lab.core import checkpoints
from lab.data import Loaders
from lab.training import FitConfig, Predictions, optimizers

VAL_IMAGES = 1000  # at most, in a validation
WARMUP_STEPS = 3  # per phase: to compile, to warm up and to capture a CUDA graph
TICKS = 10**6  # the schedule counts steps: here, millionths of the time


class Clock:
    """Seconds of training so far, without the time spent inside `stopped`."""

    def __init__(self, device: torch.device, kind: str):
        self.device, self.excluded = device, 0.0
        self.now = {"wall": time.perf_counter, "cpu": time.process_time}[kind]
        synchronize(device.type)
        self.start = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.start - self.excluded

    @contextmanager
    def stopped(self) -> Iterator[None]:
        synchronize(self.device.type)
        since = self.now()
        yield
        synchronize(self.device.type)
        self.excluded += self.now() - since


class Runner:
    """A model that trains until its time is up, first on small images."""

    def __init__(self, c: SimpleNamespace, loaders: Loaders, seed: int):
        """c: the constants of benchmarks/speedrun.py; loaders: on the device."""
        torch.manual_seed(seed)
        val = loaders.data.val
        val = val.select(torch.arange(0, len(val), -(-len(val) // VAL_IMAGES)))
        self.c, self.device = c, loaders.device
        self.loaders = replace(loaders, seed=seed, data=replace(loaders.data, val=val))
        self.loaders.to(self.device)
        self.precision = FitConfig(1, precision=c.PRECISION).mixed_precision.replace("no", "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.schedule = optimizers.Schedule(TICKS, int(TICKS * c.WARMUP_FRACTION), "linear")
        self.cutmix = v2.CutMix(num_classes=len(loaders.data.classes))
        self.model = build_model(c, loaders).to(self.device)
        self.enter_phase(0.0)
        images, labels = next(self.loaders.train(0))
        if c.WARM_START:
            warm_start(self.model, F.avg_pool2d(images, self.shrink))
        if c.COMPILE:  # before the clock starts, and no weight changes
            torch.compiler.reset()  # forget the programs of earlier runs: their number is limited
            self.model.compile(mode="reduce-overhead", dynamic=False)
        for done in sorted({0.0, c.PROGRESSIVE_RESIZE, c.DROP_UNTIL}, reverse=True):
            self.enter_phase(done)
            for _ in range(WARMUP_STEPS):
                self.loss(images, labels).backward()
                self.model.zero_grad()
        self.optimizer = optimizers.by_name(c.OPTIMIZER)(
            self.model, c.LEARNING_RATE, c.WEIGHT_DECAY
        )
        self.ema = ModelEmaV3(self.model, decay=c.EMA_DECAY, use_warmup=True)

    def enter_phase(self, done: float) -> None:
        """Chooses the size of the images and what is dropped; `done`: fraction of the time."""
        self.shrink = 2 if done < self.c.PROGRESSIVE_RESIZE else 1  # factor by which images shrink
        set_dropping(self.model, self.c, active=done < self.c.DROP_UNTIL)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        dtype, enabled = DTYPES[self.precision], self.precision != "fp32"
        with torch.autocast(self.device.type, dtype, enabled):
            return model(F.avg_pool2d(images, self.shrink))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.forward(self.model, images).float()
        return F.cross_entropy(logits, labels, label_smoothing=self.c.LABEL_SMOOTHING)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches."""
        for epoch in itertools.count(1):
            yield from self.loaders.train(epoch)

    def step(self, images: Tensor, labels: Tensor, done: float) -> None:
        """One optimizer step; `done` is the fraction of the time that has passed."""
        if done < self.c.CUTMIX_UNTIL and torch.rand(()) < 0.5:
            images, labels = self.cutmix(images, labels)
        self.schedule.set_lr(self.optimizer, int(done * TICKS))
        self.scaler.scale(self.loss(images, labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, split: str) -> Predictions:
        model: nn.Module = (self.ema.module if self.c.EMA_DECAY else self.model).eval()
        batches = self.loaders.evaluation(split)
        logits = [self.forward(model, images).float().cpu() for _, images, _ in batches]
        model.train()
        return Predictions(torch.cat(logits), getattr(self.loaders.data, split).labels)

    def run(self, budget: float) -> dict[str, Any]:
        """Trains for `budget` seconds, tests once, and returns the results."""
        curve, steps = [], 0
        clock = Clock(self.device, self.c.CLOCK)

        def validate() -> None:
            with clock.stopped():
                curve.append([round(clock.spent, 2), self.evaluate("val").accuracy])

        for images, labels in self.batches():
            if (done := clock.spent / budget) >= 1:
                break
            self.enter_phase(done)
            if done * self.c.CHECKS >= len(curve) + 1:
                validate()
            self.step(images, labels, done)
            steps += 1
            if self.c.EMA_DECAY:
                self.ema.update(self.model, step=steps)
        synchronize(self.device.type)
        spent = clock.spent
        validate()
        test = self.evaluate("test")
        return {
            "seconds": round(spent, 2), "images": steps * self.loaders.batch_size, "curve": curve,
            "test_accuracy": test.accuracy, "test_loss": test.loss, "test_images": len(test.labels),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }  # fmt: skip

    def profile(self, path: Path, steps: int = 10) -> None:
        """Writes the time of each operation in a step, measured by torch's profiler."""
        batches = self.batches()
        for _ in range(WARMUP_STEPS):
            self.step(*next(batches), 0.5)
        with profile() as profiler:
            for _ in range(steps):
                self.step(*next(batches), 0.5)
            synchronize(self.device.type)
        column = "device" if self.device.type == "cuda" else "cpu"
        averages = profiler.key_averages()
        table = averages.table(sort_by=f"self_{column}_time_total", row_limit=30)
        text = f"{steps} steps of {self.loaders.batch_size} images\n{table}\n"
        checkpoints.write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


@torch.no_grad()
def warm_start(model: nn.Module, images: Tensor) -> None:
    """Initializes the patch embedding with the whitened principal components of patches.

    All components come first, then their negatives, and again until the width is full. The
    standard deviation of the weights does not change. Source: the whitening layer of Jordan 2024,
    "94% on CIFAR-10 in 3.29 Seconds on a Single GPU".
    """
    proj = model.patch_embed.proj
    patches = F.unfold(images, proj.kernel_size, stride=proj.stride).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + 1e-2 * values.max()).sqrt()).T.flip(0)  # the largest first
    filters = torch.cat([filters, -filters]).repeat(-(-proj.out_channels // len(filters)), 1)
    filters = filters[: proj.out_channels]
    proj.weight.copy_((filters * proj.weight.std() / filters.std()).reshape(proj.weight.shape))
