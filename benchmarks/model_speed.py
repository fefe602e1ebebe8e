"""Training step and inference of the same ViT in five libraries.

    python -m benchmarks.model_speed                                 # two CPU cores: half an hour
    python -m benchmarks.model_speed --workloads "training, fp32" --libraries ours,timm
    python -m benchmarks.model_speed --workloads "training with data, auto" --img-size 224 \
        --patch-size 16 --embed-dim 768 --depth 12                   # ViT-B/16 with its data

- training: a step on a batch that stays on the device. Ours is lab.training.loop.train_one_epoch;
  the others run zero_grad, forward, cross-entropy, backward and a fused AdamW step.
- training with data: an epoch with random crops, flips and normalization of synthetic photographs
  in memory. Ours is what finetune.py does between two validations; timm uses create_loader and the
  loop of its train.py; transformers uses its Trainer with torchvision's transforms.
- inference: a forward pass without gradients.

bf16 and fp16 mean autocast, auto the best precision of the hardware, compiled torch.compile. Each
library has its own process, and they alternate with a product of square matrices. Utilization is
the rate of the model's operations, counted by torch, as a fraction of the rate of that product.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import libraries, table
from benchmarks.timing import MATRIX_PRODUCT, Times, Worker, alternate_processes, matrix_product
from lab.core import UserError, constants, runtime
from lab.data import Augmentation, Loaders, Preprocess
from lab.models import profile_model
from lab.training import FitConfig
from model import VisionTransformer, ViTConfig

# --- What is measured ---
LIBRARIES: str = "ours,timm,transformers,torchvision,vit-pytorch"  # in the order of the table
WORKLOADS: str = (
    "training, fp32;training, auto;training, auto, compiled;inference, fp32;inference, auto"
)
# --- The model: 10 classes, a class token, heads of 64 ---
IMG_SIZE: int = 32  # pixels
PATCH_SIZE: int = 4  # pixels along one side of a patch
EMBED_DIM: int = 192  # a multiple of 64
DEPTH: int = 9  # blocks
BATCH_SIZE: int = 128  # images per step
# --- How it is measured ---
ROUNDS: int = 3  # each with new processes, whose memory placement changes speed by up to a fifth
REPEATS: int = 3  # measurements per round, after two that do not count
STEPS: int | None = None  # per measurement; None: 1 on a CPU, 20 on a GPU
PRODUCT_SIDE: int | None = None  # of the matrix product; None: 2048 on a CPU, 8192 on a GPU
WORKERS: int | None = None  # processes of the others' DataLoaders; None: one per core, at most 16
OUT: str = "benchmarks/local/model_speed-{device}.md"  # where the table goes; empty: nowhere

KNOWN_WORKLOADS = (
    "(training|inference), (auto|fp32|bf16|fp16)(, compiled)?"
    "|training with data, (auto|fp32|bf16|fp16)"
)
WITH_DATA = ("ours", "timm", "transformers")  # libraries that load data
WARMUP = 2  # measurements: the first one compiles, the second one allocates memory
CLASSES, HEAD_DIM, CROP_PCT = 10, 64, 0.875
AUGMENTATION = Augmentation(rrc_min_area=0.4, flip=True)  # that of finetune.py


def vit_config() -> ViTConfig:
    return ViTConfig(
        img_size=IMG_SIZE, patch_size=PATCH_SIZE, num_classes=CLASSES, embed_dim=EMBED_DIM,
        depth=DEPTH, num_heads=EMBED_DIM // HEAD_DIM,
    )  # fmt: skip


def build(library: str) -> nn.Module:
    """A library's ViT with random weights. Raises UserError if its size is not as expected."""
    config = vit_config()
    ours = VisionTransformer(config)
    model = ours if library == table.OURS else libraries.MODELS[library](config)
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, model)]
    if counts[1] - counts[0] != libraries.extra_parameters(config, library):
        raise UserError(f"{library}'s model has {counts[1]} parameters, ours has {counts[0]}")
    return model


def our_steps(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str, compiled: bool
) -> Callable[[], None]:
    """STEPS steps of our training loop on one batch."""
    size = images.shape[-1]
    data = libraries.synthetic_data(len(images), size, CLASSES)
    loaders = Loaders(data, Preprocess(size, data.mean, data.std), len(images), Augmentation())
    recipe = libraries.Recipe(1, STEPS, len(images), clip_grad=0, precision=precision)
    loaders.steps = STEPS
    epoch = libraries.our_epoch(model, loaders, recipe, compiled)
    loaders.train = lambda epoch, first_step: [(images, labels)] * STEPS
    return epoch


def measure_library(name: str, settings: dict[str, Any], worker: Worker) -> None:
    """What one library's process does for one workload."""
    globals().update(settings)
    # What our training loop switches on, for all libraries and for the matrix product.
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; no effect on a CPU
    torch.backends.cudnn.benchmark = True
    device, (kind, precision, *compiled) = worker.device, settings["WORKLOAD"].split(", ")
    if name == MATRIX_PRODUCT:
        worker.serve(matrix_product(device.type, libraries.DTYPES[precision], PRODUCT_SIDE)[0])
    torch.manual_seed(0)
    model = build(name)
    if kind == "training with data":
        measure_with_data(name, model, precision, worker)
        return
    images = torch.randn(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE, device=device)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), device=device)
    if name == table.OURS and kind == "training":
        worker.serve(our_steps(model, images, labels, precision, bool(compiled)))
    model.to(device)
    if compiled:
        model.compile()
    if kind == "training":
        step = libraries.plain_step(model, images, labels, precision)
    else:
        step = inference(model, images, precision)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    worker.serve(steps)


def inference(model: nn.Module, images: Tensor, precision: str) -> Callable[[], object]:
    dtype, model = libraries.DTYPES[precision], model.eval()

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(images.device.type, dtype, enabled=precision != "fp32"):
            model(images)

    return forward


def measure_with_data(name: str, model: nn.Module, precision: str, worker: Worker) -> None:
    """Measures epochs of a library's usual training, data included."""
    preprocess = Preprocess(IMG_SIZE, [0.5] * 3, [0.5] * 3, CROP_PCT)
    data = libraries.synthetic_data(STEPS * BATCH_SIZE, preprocess.resized, CLASSES)
    recipe = libraries.Recipe(
        ROUNDS * (WARMUP + REPEATS), STEPS, BATCH_SIZE, precision=precision, workers=WORKERS
    )
    scale = (AUGMENTATION.rrc_min_area, 1.0)
    if name == table.OURS:
        loaders = Loaders(data, preprocess, BATCH_SIZE, AUGMENTATION)
        worker.serve(libraries.our_epoch(model, loaders, recipe))
    if name == "timm":
        import timm

        batches = timm.data.create_loader(
            libraries.Images(data.train.store, data.train.labels), (3, IMG_SIZE, IMG_SIZE),
            BATCH_SIZE, is_training=True, scale=scale, color_jitter=None,
            interpolation="bilinear", mean=data.mean, std=data.std, num_workers=WORKERS,
            pin_memory=worker.device.type == "cuda", device=worker.device,
        )  # fmt: skip
        worker.serve(libraries.timm_epoch(model.to(worker.device), batches, recipe))
    from torchvision.transforms import v2
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            worker.start()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            worker.stop()

    transform = v2.Compose([
        v2.RandomResizedCrop(IMG_SIZE, scale=scale), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std),
    ])  # fmt: skip
    images = libraries.Images(data.train.store, data.train.labels, transform)
    with tempfile.TemporaryDirectory() as folder:
        libraries.transformers_trainer(model, images, recipe, folder, (Measure(),)).train()


def measure_rounds(
    workload: str, names: list[str], settings: dict[str, Any]
) -> tuple[Times, dict[str, int]]:
    """Seconds of every library, round after round, and its highest peak memory in MB."""
    times: Times = {name: [] for name in names}
    memory: dict[str, int] = {}
    for _ in range(ROUNDS):
        found, peaks = alternate_processes(
            measure_library, names, {**settings, "WORKLOAD": workload}, REPEATS, WARMUP
        )
        memory = {name: max(mb or 0, memory.get(name, 0)) for name, mb in peaks.items()}
        for name in names:
            times[name] += found[name]
    return times, memory


def parse_workloads() -> list[str]:
    """WORKLOADS with the precision of this hardware in place of `auto`.

    Raises: UserError, for a workload that does not exist.
    """
    best = FitConfig(1, precision="auto").mixed_precision.replace("no", "fp32")
    found = []
    for workload in WORKLOADS.split(";"):
        if not re.fullmatch(KNOWN_WORKLOADS, workload):
            raise UserError(f"WORKLOADS: {workload!r} is none of {KNOWN_WORKLOADS}")
        found.append(workload.replace("auto", best))
    return list(dict.fromkeys(found))


def main() -> None:
    global STEPS, WORKERS
    settings = constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    STEPS = settings["STEPS"] = STEPS or (20 if device == "cuda" else 1)
    WORKERS = min(os.cpu_count() or 1, 16) if WORKERS is None else WORKERS
    settings["WORKERS"] = WORKERS
    installed, notes = table.installed_libraries(LIBRARIES.split(","))
    cost = profile_model(VisionTransformer(vit_config()), (3, IMG_SIZE, IMG_SIZE))
    images, failed = BATCH_SIZE * STEPS, []
    _, product_flop = matrix_product(device, torch.float32, PRODUCT_SIDE)
    rows, fractions = [], []
    for workload in parse_workloads():
        is_training = workload.startswith("training")
        names = [n for n in installed if "with data" not in workload or n in WITH_DATA]
        try:
            times, memory = measure_rounds(workload, [*names, MATRIX_PRODUCT], settings)
        except SystemExit as failure:  # no compiler, for example: measure the other workloads
            failed.append(f"{workload}: {failure}.")
            continue
        rows += table.compare(workload, times, table.OURS, names, images, memory)
        flop = images * (cost["training_flops"] if is_training else 2 * cost["macs"])
        fractions += table.utilization(workload, times, MATRIX_PRODUCT, flop, product_flop)
    title = (
        f"ViT with {cost['parameters']:,} parameters, {IMG_SIZE} pixels, patch {PATCH_SIZE}, width "
        f"{EMBED_DIM}, depth {DEPTH}, batch {BATCH_SIZE}; {cost['training_flops'] / 1e9:.2f} GFLOP "
        f"per image and training step. Medians of {ROUNDS} rounds of {REPEATS} repeats of {STEPS} "
        "steps; one process per library and round."
    )
    held = "allocated on the GPU" if device == "cuda" else "resident, including libraries"
    notes += [f"Peak memory: {held}.", *failed]
    table.save(OUT, title, rows, fractions, notes)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run_script(main)
