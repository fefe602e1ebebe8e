"""Trains a plain ViT for a fixed time, with a learning-rate schedule that follows the clock.

This loop cannot be lab.training.loop. That one counts epochs, while a race has none: here both the
learning rate and the image size depend on the seconds left. That one also saves, validates and
writes records as part of training; here the clock must stop during validation. The batches, the
optimizers, the formula of the schedule and the predictions are those of lab.training.
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

from benchmarks.timing import synchronize
from lab.core import checkpoints
from lab.data import Loaders
from lab.training import FitConfig, Predictions, optimizers
from model import VisionTransformer, ViTConfig

LOOKED_AT = 1000  # validation images in a look, at most
WARMUP_STEPS = 3  # per image size: to compile, to warm up and to capture a CUDA graph
TICKS = 10**6  # the schedule counts steps: here, millionths of the time


class Clock:
    """Seconds of training so far; it stands still inside `stopped`."""

    def __init__(self, device: torch.device, kind: str):
        self.device, self.away = device, 0.0
        self.now = {"wall": time.perf_counter, "cpu": time.process_time}[kind]
        synchronize(device.type)
        self.start = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.start - self.away

    @contextmanager
    def stopped(self) -> Iterator[None]:
        synchronize(self.device.type)
        since = self.now()
        yield
        synchronize(self.device.type)
        self.away += self.now() - since


class Runner:
    """A model that trains until its time is up, on small images first."""

    def __init__(self, c: SimpleNamespace, loaders: Loaders, seed: int):
        """c: the constants of benchmarks/speedrun.py; loaders: on the device."""
        torch.manual_seed(seed)
        val = loaders.data.val  # its images may lie in the order of their classes
        some = val.select(torch.arange(0, len(val), -(-len(val) // LOOKED_AT)))
        self.c, self.device = c, loaders.device
        self.loaders = replace(loaders, seed=seed, data=replace(loaders.data, val=some))
        self.loaders.to(self.device)
        self.bf16 = FitConfig(1, precision=c.PRECISION).mixed_precision == "bf16"
        self.schedule = optimizers.Schedule(TICKS, int(TICKS * c.WARMUP_FRACTION), "linear")
        self.cutmix = v2.CutMix(num_classes=len(loaders.data.classes))
        self.model = VisionTransformer(ViTConfig(
            img_size=loaders.preprocess.img_size, patch_size=c.PATCH_SIZE, embed_dim=c.EMBED_DIM,
            in_chans=loaders.data.channels,
            depth=c.DEPTH, num_heads=c.NUM_HEADS, num_classes=len(loaders.data.classes),
            class_token=False, global_pool="avg", dynamic_img_size=True,
        )).to(self.device)  # fmt: skip
        self.pooled = 2 if c.PROGRESSIVE_RESIZE else 1  # pixels to a side that become one
        images, labels = next(self.loaders.train(0))
        if c.WARM_START:
            warm_start(self.model, F.avg_pool2d(images, self.pooled))
        if c.COMPILE:  # with CUDA graphs, before the clock starts; no weight moves
            self.model.compile(mode="reduce-overhead", dynamic=False)
        for pooled in sorted({1, self.pooled}):
            self.pooled = pooled
            for _ in range(WARMUP_STEPS):
                self.loss(images, labels).backward()
                self.model.zero_grad()
        self.optimizer = optimizers.OPTIMIZERS[c.OPTIMIZER](
            self.model, c.LEARNING_RATE, c.WEIGHT_DECAY
        )
        self.average = None
        if c.EMA_DECAY:
            self.average = ModelEmaV3(self.model, decay=c.EMA_DECAY, use_warmup=True)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(F.avg_pool2d(images, self.pooled))
            return F.cross_entropy(logits, labels, label_smoothing=self.c.LABEL_SMOOTHING)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end."""
        for epoch in itertools.count(1):
            yield from self.loaders.train(epoch)

    def step(self, images: Tensor, labels: Tensor, done: float) -> None:
        """One optimizer step; `done` is the share of the time that has passed."""
        if done < self.c.CUTMIX_UNTIL and torch.rand(()) < 0.5:
            images, labels = self.cutmix(images, labels)
        self.schedule.set_lr(self.optimizer, int(done * TICKS))
        self.loss(images, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def scores(self, split: str) -> Predictions:
        model: nn.Module = self.average.module if self.average else self.model
        model.eval()
        out = []
        for _, images, _ in self.loaders.evaluation(split):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                out.append(model(F.avg_pool2d(images, self.pooled)).float().cpu())
        model.train()
        return Predictions(torch.cat(out), getattr(self.loaders.data, split).labels)

    def run(self, budget: float) -> dict[str, Any]:
        """Trains for `budget` seconds, then sees the test images once; returns what came out."""
        curve, steps = [], 0
        clock = Clock(self.device, self.c.CLOCK)

        def look() -> None:
            with clock.stopped():
                curve.append([round(clock.spent, 2), self.scores("val").accuracy])

        for images, labels in self.batches():
            if (done := clock.spent / budget) >= 1:
                break
            if done >= self.c.PROGRESSIVE_RESIZE:
                self.pooled = 1
            if done * self.c.CHECKS >= len(curve) + 1:
                look()
            self.step(images, labels, done)
            steps += 1
            if self.average:
                self.average.update(self.model, step=steps)
        synchronize(self.device.type)
        spent = clock.spent
        look()
        test = self.scores("test")
        return {
            "seconds": round(spent, 2), "images": steps * self.loaders.batch_size, "curve": curve,
            "test_accuracy": test.accuracy, "test_loss": test.loss, "test_images": len(test.labels),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }  # fmt: skip

    def profile(self, path: Path, steps: int = 10) -> None:
        """Writes where the time of a step goes, operation by operation, as torch's profiler says.

        A GPU that Python keeps waiting shows as less time on it than on the wall.
        """
        batches = self.batches()
        for _ in range(3):
            self.step(*next(batches), 0.5)
        synchronize(self.device.type)
        with profile() as seen:
            start = time.perf_counter()
            for _ in range(steps):
                self.step(*next(batches), 0.5)
            synchronize(self.device.type)
            spent = time.perf_counter() - start
        column = "device" if self.device.type == "cuda" else "cpu"
        table = seen.key_averages().table(sort_by=f"self_{column}_time_total", row_limit=30)
        text = f"{steps} steps of {self.loaders.batch_size} images in {spent:.3f} s\n{table}\n"
        checkpoints.write_atomically(
            path, lambda scratch: scratch.write_text(text, encoding="utf-8")
        )


@torch.no_grad()
def warm_start(model: VisionTransformer, images: Tensor) -> None:
    """Lets the patch embedding begin as the whitened principal components of patches.

    First as many as a patch has values, then their negatives, and again until the width is full;
    the deviation of the weights stays. Source: the whitening layer of Jordan 2024, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", for patches.
    """
    proj = model.patch_embed.proj
    patches = F.unfold(images, proj.kernel_size, stride=proj.stride).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + 1e-2 * values.max()).sqrt()).T.flip(0)  # the largest first
    filters = torch.cat([filters, -filters]).repeat(-(-proj.out_channels // len(filters)), 1)
    filters = filters[: proj.out_channels]
    proj.weight.copy_((filters * proj.weight.std() / filters.std()).reshape(proj.weight.shape))
