"""Seconds from starting Python to the end of the first training step, on digits.

    python -m benchmarks.startup                         # about two minutes on two CPU cores

The same small ViT, batch and optimizer; every repetition is a fresh process, the ways take turns.

- ours: the real train.py, which leaves after its first step; its records go to a folder that is
  deleted.
- timm: its model, create_loader and create_optimizer_v2, in the loop of its train.py.
- transformers: ViTForImageClassification and Trainer.
- torchvision: its VisionTransformer, transforms and a DataLoader, in a plain loop.

The others' images are made of three channels, as their loaders give them.
"""

# Nothing heavy is imported up here: each way pays for its own imports alone.
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from lab.core import constants

# --- What is measured ---
WAYS: str = "ours,timm,transformers,torchvision"  # in the order of the table
EMBED_DIM: int = 64  # width; these are the sizes of train.py on digits
DEPTH: int = 4  # blocks
NUM_HEADS: int = 4  # attention heads
BATCH_SIZE: int = 64  # images in a step
# --- How it is measured ---
WORKERS: int = 0  # of the others' DataLoaders; none is the fastest start
REPEATS: int = 3  # the median over so many is reported, after one that is not
OUT: str = "benchmarks/local/startup-{device}.md"  # where the table goes; empty: nowhere
# --- For the processes that this starts ---
ONLY: str = ""  # take this way's first step, here and now

# What a way prints when it is so far; at last its peak memory.
IMPORTED, STEPPED, HELD = "-- imported", "-- stepped", "-- MB"
IMG_SIZE, PATCH_SIZE = 8, 4


def reached(where: str) -> None:
    """Tells the benchmark, and ends the process after the first step."""
    if where == STEPPED:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    print(where, flush=True)
    if where == STEPPED:
        from lab.core import runtime

        print(HELD, runtime.peak_memory_mb(torch.device("cpu")), flush=True)
        sys.exit()


def ours() -> None:
    override = constants.override

    def first_call(*given: Any, **named: Any) -> Any:  # main() begins with it
        reached(IMPORTED)
        from lab.training.progress import Progress

        # The loop calls it at the end of each step.
        Progress.finish_step = lambda progress: reached(STEPPED)
        return override(*given, **named)

    constants.override = first_call
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "train.py", f"--results-dir={folder}", "--dataset=digits", f"--embed-dim={EMBED_DIM}",
            f"--depth={DEPTH}", f"--num-heads={NUM_HEADS}", f"--batch-size={BATCH_SIZE}",
        ]  # fmt: skip
        runpy.run_path("train.py", run_name="__main__")


def setting(transform: Callable | None = None) -> tuple[Any, Any, Any]:
    """What the others share: the model's sizes, the digits one by one, how to train."""
    import torch
    from sklearn.datasets import load_digits

    from benchmarks.peers import Pictures, Recipe
    from model import ViTConfig

    bunch = load_digits()
    images = torch.tensor(bunch.images * 15.9375).to(torch.uint8)[:, None]  # (N, 1, 8, 8)
    config = ViTConfig(
        img_size=IMG_SIZE, patch_size=PATCH_SIZE, num_classes=10, embed_dim=EMBED_DIM,
        depth=DEPTH, num_heads=NUM_HEADS,
    )  # fmt: skip
    recipe = Recipe(
        epochs=100, steps=len(images) // BATCH_SIZE, batch_size=BATCH_SIZE, learning_rate=2e-3,
        weight_decay=0.05, warmup=0.05, clip_grad=1.0, bf16=False, workers=WORKERS,
    )  # fmt: skip
    return config, Pictures(images, torch.tensor(bunch.target), transform), recipe


def pipeline() -> Any:
    """The transforms of torchvision for the augmentation of digits."""
    import torch
    from torchvision.transforms import v2

    return v2.Compose([
        v2.RandomAffine(10, translate=(0.0625, 0.0625), scale=(0.9, 1.1)), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip


def timms() -> None:
    import timm
    import torch
    from torchvision.transforms import v2

    from benchmarks.peers import timm_training

    _, pictures, recipe = setting()
    reached(IMPORTED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = timm.data.create_loader(
        pictures, (3, IMG_SIZE, IMG_SIZE), BATCH_SIZE, is_training=True, no_aug=True,
        mean=[0.5] * 3, std=[0.5] * 3, num_workers=WORKERS, persistent_workers=WORKERS > 0,
        device=device,
    )  # fmt: skip
    affine = v2.RandomAffine(10, translate=(0.0625, 0.0625), scale=(0.9, 1.1))
    pictures.transform = v2.Compose([affine, pictures.transform])
    model = timm.models.VisionTransformer(
        img_size=IMG_SIZE, patch_size=PATCH_SIZE, num_classes=10, embed_dim=EMBED_DIM,
        depth=DEPTH, num_heads=NUM_HEADS,
    ).to(device)  # fmt: skip
    timm_training(model, First(batches), recipe)()
    reached(STEPPED)


class First:
    """The first batch alone."""

    def __init__(self, batches: Iterable):
        self.batches = batches

    def __iter__(self) -> Iterable:
        return islice(self.batches, 1)


def transformers() -> None:
    from transformers import TrainerCallback

    from benchmarks.peers import in_transformers, transformers_trainer

    class Leave(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            reached(STEPPED)

    config, pictures, recipe = setting(pipeline())
    reached(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers_trainer(
            in_transformers(config), pictures, recipe, folder, (Leave(),)
        )
        trainer.train()


def torchvision() -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from benchmarks.peers import in_torchvision

    config, pictures, recipe = setting(pipeline())
    reached(IMPORTED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = in_torchvision(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    for images, labels in DataLoader(pictures, BATCH_SIZE, shuffle=True, num_workers=WORKERS):
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        reached(STEPPED)


WAY = {"ours": ours, "timm": timms, "transformers": transformers, "torchvision": torchvision}


def start(name: str) -> tuple[float, float, int | None]:
    """Seconds from starting a way's process to the end of its imports, and of its first step.

    And its peak memory in MB, resident. Raises: SystemExit, if it never came so far.
    """
    asked = [f"--only={name}", f"--embed-dim={EMBED_DIM}", f"--depth={DEPTH}"]
    asked += [f"--num-heads={NUM_HEADS}", f"--batch-size={BATCH_SIZE}", f"--workers={WORKERS}"]
    words = [sys.executable, "-m", "benchmarks.startup", *asked]
    found, began = {}, time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            found.setdefault(line.strip(), time.perf_counter() - began)
    if not {IMPORTED, STEPPED} <= found.keys():
        raise SystemExit(f"{name} failed: see above")
    held = [int(line.split()[-1]) for line in found if line.startswith(HELD) and line[-1].isdigit()]
    return found[IMPORTED], found[STEPPED], held[0] if held else None


def measure() -> None:
    from statistics import median

    from benchmarks import table
    from benchmarks.timing import alternate, hardware
    from lab.core import runtime

    device = runtime.process_state().device.type
    names, notes = table.present(WAYS.split(","))
    imports: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = {}

    def first_step(name: str) -> float:
        imported, stepped, memory[name] = start(name)
        imports[name].append(imported)
        return stepped

    works = {name: lambda name=name: first_step(name) for name in names}
    times = alternate(works, REPEATS)
    rows = table.compared("start-up to the first step", times, table.OURS, names, memory=memory)
    cells = []
    for name in names:
        imported = median(imports[name][1:])
        cells.append([name, f"{imported:.2f}", f"{median(times[name]):.2f}"])
        if name == table.OURS:
            notes.append(f"Start-up: {imported:.2f} s of ours are imports.")
    lines = [
        f"Start-up to the end of the first training step: digits, width {EMBED_DIM}, depth "
        f"{DEPTH}, batch {BATCH_SIZE}, workers of the others' DataLoaders: {WORKERS}.  ",
        f"{hardware(device)}. {table.versions(names)}.  ",
        f"Medians of {REPEATS} repeats, a fresh process each, in turns.  ",
        f"`{table.command('startup')}`", "",
        *table.in_markdown(["way", "s to the end of imports", "s to the end of a step"], cells), "",
        *table.row_lines(rows), "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
    table.keep("startup", lines, OUT.format(device=device), rows, notes)


def main() -> None:
    constants.override(sys.modules[__name__])
    if ONLY:
        WAY[ONLY]()
    else:
        measure()


if __name__ == "__main__":
    main()
