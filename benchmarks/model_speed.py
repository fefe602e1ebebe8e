"""Training step and inference of the same ViT in five libraries, and their share of the machine.

    python -m benchmarks.model_speed                                 # two CPU cores: see WORKS
    python -m benchmarks.model_speed --works "training, fp32" --libraries ours,timm

A training step of ours is lab.training.loop.train_one_epoch with lab.training.optimizers.adamw; of
the others zero_grad, forward, cross-entropy, backward and a fused AdamW step. Inference is a
forward pass without gradients. bf16 means autocast, compiled torch.compile. The images are random
and stay where they are; `python -m benchmarks.data_feeding` is about those that do not.

For each work every library has a process of its own, and with it its own memory. They take turns,
and so does a square matrix product: utilisation is the model's operations, counted by torch, over
time, in units of that product's rate.
"""

import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import table
from benchmarks.peers import IN, parameters_beside, usual_step
from benchmarks.timing import PRODUCT, Turns, hardware, in_turns, product, product_flop
from lab.core import Run, constants, runtime
from lab.data import Augmentation, Dataset, Loaders, Preprocess, datasets
from lab.models import profile_model
from lab.training import FitConfig, loop, optimizers
from lab.training.state import TrainState
from model import VisionTransformer, ViTConfig

# --- What is measured ---
LIBRARIES: str = "ours,timm,transformers,torchvision,vit-pytorch"  # in the order of the table
WORKS: str = (
    "training, fp32;training, bf16;training, bf16, compiled;"
    "inference, fp32;inference, bf16"
)  # in this order; any of them compiled, which takes a minute a library  # fmt: skip
# --- The model: 10 classes, a class token, heads of 64 ---
IMG_SIZE: int = 32  # pixels
PATCH_SIZE: int = 4  # pixels along one side of a patch
EMBED_DIM: int = 192  # width; a multiple of 64
DEPTH: int = 9  # blocks
BATCH_SIZE: int = 128  # images in a step
# --- How it is measured ---
ROUNDS: int = 3  # fresh processes of everybody: where its memory lies moves one by a fifth
REPEATS: int = 3  # turns in a round after two that do not count; medians are over all rounds
STEPS: int | None = None  # in a turn; none: 1 on a CPU, 20 on a GPU
OUT: str = "benchmarks/local/model_speed-{device}.md"  # where the table goes; empty: nowhere

KNOWN = [f"{kind}, {dtype}{compiled}" for kind in ("training", "inference")
         for dtype in ("fp32", "bf16") for compiled in ("", ", compiled")]  # fmt: skip
WARMUP_TURNS = 2  # the first compiles, the second finds the memory
CLASSES, HEAD_DIM = 10, 64


def config() -> ViTConfig:
    return ViTConfig(
        img_size=IMG_SIZE, patch_size=PATCH_SIZE, num_classes=CLASSES, embed_dim=EMBED_DIM,
        depth=DEPTH, num_heads=EMBED_DIM // HEAD_DIM,
    )  # fmt: skip


def built(library: str) -> nn.Module:
    """The ViT of a library, with random weights.

    Raises: SystemExit, if it has not as many parameters as it should: another model?
    """
    ours = VisionTransformer(config())
    model = ours if library == table.OURS else IN[library](config(), ours.state_dict())
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, model)]
    if counts[1] - counts[0] != parameters_beside(config(), library):
        raise SystemExit(f"{library} has {counts[1]} parameters, ours {counts[0]}: another model?")
    return model


def loop_steps(images: Tensor, labels: Tensor, bf16: bool, compiled: bool) -> Callable[[], Any]:
    """STEPS steps of our training loop, as the scripts take them, on the same batch."""
    split = datasets.Split(images, torch.arange(len(images)), labels, [""] * len(images))
    plain = [0.5] * images.shape[1]
    data = Dataset("random", [str(i) for i in range(CLASSES)], *[split] * 3, plain, plain, [])
    loaders = Loaders(data, Preprocess(IMG_SIZE, plain, plain), len(images), Augmentation())
    how = FitConfig(1, precision="bf16" if bf16 else "fp32", compile=compiled, trial=True)
    loaders.steps = STEPS
    model = built(table.OURS)
    trainer = loop.Trainer(
        model, optimizers.adamw(model, 1e-4, 0.05), loaders, how, Run(Path())
    )  # writes nothing
    loaders.train = lambda epoch, first_step: [(images, labels)] * STEPS

    def steps() -> None:
        trainer.state = TrainState()
        loop.train_one_epoch(trainer)

    return steps


def inference(model: nn.Module, images: Tensor, bf16: bool) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            model(images)

    model.eval()
    return forward


def library_process(name: str, values: dict[str, Any], line: Connection) -> None:
    """One library's process for one work, or the matrix product's."""
    globals().update(values)
    turns, work = Turns(line, runtime.process_state().device), values["WORK"]
    device, bf16, compiled = turns.device, "bf16" in work, "compiled" in work
    if name == PRODUCT:
        turns.take(product(device.type, torch.bfloat16 if bf16 else torch.float32))
    torch.manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE, device=device)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), device=device)
    if name == table.OURS and work.startswith("training"):
        turns.take(loop_steps(images, labels, bf16, compiled))
    else:
        model = built(name).to(device)
        if compiled:
            model.compile()
        if work.startswith("training"):
            step = usual_step(model, images, labels, bf16)
        else:
            step = inference(model, images, bf16)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    turns.take(steps)


def rounds_of(
    work: str, names: list[str], values: dict[str, Any]
) -> tuple[table.Times, dict[str, int]]:
    """Seconds of everybody's turns at a work, round after round, and each one's peak MB."""
    times: table.Times = {name: [] for name in names}
    memory: dict[str, int] = {}
    for _ in range(ROUNDS):
        found, held = in_turns(
            library_process, names, {**values, "WORK": work}, REPEATS, WARMUP_TURNS
        )
        memory = {name: max(mb or 0, memory.get(name, 0)) for name, mb in held.items()}
        for name in names:
            times[name] += found[name]
    return times, memory


def main() -> None:
    global STEPS
    values = constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    STEPS = values["STEPS"] = STEPS or (20 if device == "cuda" else 1)
    names, notes = table.present(LIBRARIES.split(","))
    for work in WORKS.split(";"):
        if work not in KNOWN:
            raise SystemExit(f"--works: {work!r} is none of {'; '.join(KNOWN)}")
    facts = profile_model(VisionTransformer(config()), (3, IMG_SIZE, IMG_SIZE))
    images, failed = BATCH_SIZE * STEPS, []
    rows, shares = [], []
    for work in WORKS.split(";"):
        try:
            times, memory = rounds_of(work, [*names, PRODUCT], values)
        except SystemExit as failure:  # such as no compiler: the other works can go on
            failed.append(f"{work}: {failure}.")
            continue
        rows += table.compared(work, times, table.OURS, names, images, memory)
        flops = facts["training_flops" if work.startswith("training") else "macs"]
        flops *= 1 if work.startswith("training") else 2
        shares += table.shares(work, times, PRODUCT, flops * images, product_flop(device))
    held = "allocated" if device == "cuda" else "resident, the library itself and torch included"
    model = (
        f"A ViT of {facts['parameters']:,} parameters, {IMG_SIZE} pixels, patch {PATCH_SIZE}, "
        f"width {EMBED_DIM}, depth {DEPTH}, batch {BATCH_SIZE}; a training step is "
        f"{facts['training_flops'] / 1e9:.2f} GFLOP an image."
    )
    notes += [model, f"Peak memory: {held}; a process for each library and work.", *failed]
    lines = [
        f"{model}  ",
        f"{hardware(device)}. {table.versions(names)}.  ",
        f"Medians of {ROUNDS} x {REPEATS} repeats of {STEPS} steps, in turns, everybody in "
        f"{ROUNDS} processes one after another.  ",
        f"`{table.command('model_speed')}`", "", *table.row_lines(rows), "",
        *table.share_lines(shares), "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
    table.keep("model_speed", lines, OUT.format(device=device), rows, notes, shares)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
