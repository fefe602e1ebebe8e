"""The first training step with one library, in a process that benchmarks.startup times.

    python -m benchmarks.first_step timm 64 4 4 64 0    # width, depth, heads, batch size, workers

It prints IMPORTED after the imports, STEPPED after the step, and MEMORY with its peak in MB. The
imports are in the functions, because each library has to pay for its own.
"""

import sys
from typing import Any

IMPORTED, STEPPED, MEMORY = "-- imported", "-- stepped", "-- MB"
IMG_SIZE, PATCH_SIZE = 8, 4


def finish() -> None:
    """Reports the end of the first step, and ends the process."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    print(STEPPED, flush=True)
    from lab.core import machine

    print(MEMORY, machine.peak_memory_mb(torch.device("cpu")), flush=True)
    sys.exit()


def ours(width: int, depth: int, heads: int, batch_size: int, workers: int) -> None:
    import runpy
    import tempfile

    from lab.core import constants

    override = constants.override

    def first_call(*args: Any, **kwargs: Any) -> Any:  # main() begins with it
        print(IMPORTED, flush=True)
        from lab.training.progress import Progress

        Progress.finish_step = lambda progress: finish()  # called at the end of each step
        return override(*args, **kwargs)

    constants.override = first_call
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "train.py", f"--results-dir={folder}", "--dataset=digits", f"--embed-dim={width}",
            f"--depth={depth}", f"--num-heads={heads}", f"--batch-size={batch_size}",
        ]  # fmt: skip
        runpy.run_path("train.py", run_name="__main__")


def setup(width: int, depth: int, heads: int, batch_size: int, workers: int) -> tuple:
    """What the other libraries share: the ViT's sizes, the images, how to train, and the device.

    It reports the end of the imports, which is before the images are read, as in `ours`.
    """
    from importlib.util import find_spec
    from pathlib import Path

    import numpy as np
    import torch

    from benchmarks.libraries import Images, Recipe
    from model import ViTConfig

    print(IMPORTED, flush=True)
    # As in lab.data.datasets, which avoids the time that importing scikit-learn takes.
    path = Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.tensor(np.loadtxt(path, delimiter=","))
    pixels = (table[:, :-1] * (255 / 16)).to(torch.uint8).reshape(-1, 1, IMG_SIZE, IMG_SIZE)
    config = ViTConfig(
        img_size=IMG_SIZE, patch_size=PATCH_SIZE, num_classes=10, embed_dim=width, depth=depth,
        num_heads=heads,
    )  # fmt: skip
    recipe = Recipe(100, len(pixels) // batch_size, batch_size, 2e-3, workers=workers)
    gpu = torch.accelerator.current_accelerator(check_available=True)
    device = gpu or torch.device("cpu")
    return config, Images(pixels, table[:, -1].long()), recipe, device


def augmentation() -> Any:
    """torchvision's transform for the augmentation of digits."""
    from torchvision.transforms import v2

    return v2.RandomAffine(10, translate=(0.0625, 0.0625), scale=(0.9, 1.1))


def augmentation_to_tensor() -> Any:
    import torch
    from torchvision.transforms import v2

    to_float, normalize = v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)
    return v2.Compose([augmentation(), v2.ToImage(), to_float, normalize])


def timm(*sizes: int) -> None:
    from itertools import islice

    from timm.data import create_loader
    from torchvision.transforms import v2

    from benchmarks.libraries import timm_epoch, timm_model

    config, images, recipe, device = setup(*sizes)
    batches = create_loader(
        images, (3, IMG_SIZE, IMG_SIZE), recipe.batch_size, is_training=True, no_aug=True,
        mean=[0.5] * 3, std=[0.5] * 3, num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0, device=device,
    )  # fmt: skip
    images.transform = v2.Compose([augmentation(), images.transform])
    timm_epoch(timm_model(config).to(device), islice(batches, 1), recipe)()
    finish()


def transformers(*sizes: int) -> None:
    import tempfile

    from transformers import TrainerCallback

    from benchmarks.libraries import transformers_model, transformers_trainer

    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            finish()

    transform = augmentation_to_tensor()
    config, images, recipe, _ = setup(*sizes)
    images.transform = transform
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_model(config)
        transformers_trainer(model, images, recipe, folder, (Stop(),)).train()


def torchvision(*sizes: int) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from benchmarks.libraries import torchvision_model

    transform = augmentation_to_tensor()
    config, images, recipe, device = setup(*sizes)
    images.transform = transform
    model = torchvision_model(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    loader = DataLoader(images, recipe.batch_size, shuffle=True, num_workers=recipe.workers)
    for batch, labels in loader:
        F.cross_entropy(model(batch.to(device)), labels.to(device)).backward()
        optimizer.step()
        finish()


if __name__ == "__main__":
    functions = {f.__name__: f for f in (ours, timm, transformers, torchvision)}
    functions[sys.argv[1]](*map(int, sys.argv[2:]))
