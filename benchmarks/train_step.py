"""Times the whole training step of the same ViT in five libraries, side by side in one process.

    python -m benchmarks.train_step                      # CPU or GPU, fp32 and bf16
    python -m benchmarks.train_step --compiled           # and each model under torch.compile

A step is zero_grad, forward, cross-entropy, backward and a fused AdamW step. The models take
turns within every repeat, so that whatever else the machine does meets all of them alike; the
speed is the median over the repeats and the ratio to timm the median of the ratios per repeat.
"""

import copy
import importlib.metadata
import statistics
import sys
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import hardware, keep, matmul_rate, seconds
from lab import constants
from model import VisionTransformer, ViTConfig

# --- What is measured ---
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
DTYPE: Literal["both", "fp32", "bf16"] = "both"  # bf16: under autocast
COMPILED: bool = False  # also measure every model under torch.compile
MODELS: str = "ours,timm,transformers,torchvision,vit-pytorch"  # in the order of the table
# --- The model: 32 pixels, 10 classes, a class token, heads of 64 ---
PATCH: int = 4  # pixels along one side of a patch
DIM: int = 192  # width; a multiple of 64
DEPTH: int = 9  # blocks
BATCH_SIZE: int = 128  # images in a step
# --- How it is measured ---
WARMUP: int = 3  # steps of every model before the clock starts
REPEATS: int = 15  # the median over so many is reported
STEPS: int | None = None  # steps timed at once in a repeat; none: 1 on a CPU, 20 on a GPU
THREADS: int | None = None  # CPU threads; none: PyTorch's choice
OUT: str = "benchmarks/results/train_step-{device}.md"  # where the table goes; empty: nowhere

SIZE, CLASSES, HEAD_DIM, MLP_RATIO = 32, 10, 64, 4


def build(library: str) -> nn.Module:
    """The same ViT in the words of each library. Raises ImportError where it is not installed."""
    heads, mlp = DIM // HEAD_DIM, DIM * MLP_RATIO
    ours = {"img_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES, "embed_dim": DIM}
    ours |= {"depth": DEPTH, "num_heads": heads, "mlp_ratio": MLP_RATIO}
    if library == "ours":
        return VisionTransformer(ViTConfig(**ours))
    if library == "timm":
        from timm.models import VisionTransformer as Timm

        return Timm(**ours)
    if library == "transformers":
        from transformers import ViTConfig as Config
        from transformers import ViTForImageClassification

        config = Config(
            image_size=SIZE, patch_size=PATCH, num_labels=CLASSES, hidden_size=DIM,
            num_hidden_layers=DEPTH, num_attention_heads=heads, intermediate_size=mlp,
        )  # fmt: skip
        return ViTForImageClassification(config)
    if library == "torchvision":
        from torchvision.models import VisionTransformer as Torchvision

        return Torchvision(SIZE, PATCH, DEPTH, heads, DIM, mlp, num_classes=CLASSES)
    if library == "vit-pytorch":
        from vit_pytorch import ViT

        return ViT(
            image_size=SIZE, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=DEPTH,
            heads=heads, mlp_dim=mlp, dim_head=HEAD_DIM,
        )  # fmt: skip
    raise SystemExit(f"--models: {library!r} is none of ours, timm, transformers, torchvision, "
                     "vit-pytorch")  # fmt: skip


def parameter_difference(library: str) -> int:
    """How many parameters more than ours a library's model should have.

    vit-pytorch has no bias in its qkv layers, and a norm before and after the patch projection.
    """
    if library != "vit-pytorch":
        return 0
    return 2 * (3 * PATCH**2) + 2 * DIM - DEPTH * 3 * DIM


def train_step(model: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> Callable[[], None]:
    """A function that does one training step of `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            out = model(images)
            loss = F.cross_entropy(getattr(out, "logits", out), labels)
        loss.backward()
        optimizer.step()

    return step


def flops_per_image(model: nn.Module) -> float:
    """FLOPs of the matrix products of a forward and a backward pass, attention's included."""
    model, images = copy.deepcopy(model).cpu(), torch.randn(2, 3, SIZE, SIZE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / len(images)


def measure(models: dict[str, nn.Module], device: str, bf16: bool) -> list[str]:
    """Times all models, in turns, in one dtype; returns the rows of the table and a remark."""
    images = torch.randn(BATCH_SIZE, 3, SIZE, SIZE, device=device)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), device=device)
    steps, memory = {}, {}
    for mode in ["eager", "compiled"] if COMPILED else ["eager"]:
        for name, model in models.items():
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            model = copy.deepcopy(model).to(device).train()
            model = torch.compile(model) if mode == "compiled" else model
            step = steps[name, mode] = train_step(model, images, labels, bf16)
            seconds(step, device, times=WARMUP)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                seconds(step, device)
                memory[name, mode] = (torch.cuda.max_memory_allocated() - held) / 2**20

    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(REPEATS):
        for key, step in steps.items():
            times[key].append(seconds(step, device, times=STEPS or (20 if device == "cuda" else 1)))

    dtype, rows = "bf16" if bf16 else "fp32", []
    for (name, mode), own in times.items():
        ratios = [t / o for t, o in zip(times.get(("timm", mode), []), own, strict=False)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
        count = sum(p.numel() for p in models[name].parameters())
        peak = f"{memory[name, mode]:.0f}" if memory else "-"
        speed = BATCH_SIZE / statistics.median(own)
        rows.append(f"| {name} | {count:,} | {dtype} | {mode} | {speed:,.1f} | {ratio} | {peak} |")
    if "ours" in models:
        rate = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
        reached = flops_per_image(models["ours"]) * BATCH_SIZE
        reached /= statistics.median(times["ours", "eager"])
        rows.append(
            f"{dtype}: a 2048 x 2048 x 2048 product runs at {rate / 1e9:,.0f} GFLOP/s here; "
            f"ours, eager, reaches {reached / 1e9:,.0f}, {reached / rate:.0%} of it."
        )
    return rows


def main() -> None:
    constants.override(sys.modules[__name__])
    device = DEVICE if DEVICE != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if THREADS:
        torch.set_num_threads(THREADS)
    models, versions, notes = {}, [f"torch {torch.__version__}"], []
    for name in MODELS.split(","):
        try:
            models[name] = build(name)
        except ImportError:
            notes.append(f"{name}: not installed, skipped.")
            continue
        versions += [f"{name} {importlib.metadata.version(name)}"] if name != "ours" else []
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for name, count in counts.items():
        expected = counts.get("ours", count) + parameter_difference(name)
        if "ours" in counts and count != expected:
            raise SystemExit(f"{name} has {count} parameters, not {expected}: another model?")

    rows = []
    for dtype in ["fp32", "bf16"] if DTYPE == "both" else [DTYPE]:
        lines = measure(models, device, bf16=dtype == "bf16")
        rows += [line for line in lines if line.startswith("|")]
        notes += [line for line in lines if not line.startswith("|")]
    table = "\n".join([
        f"Training step of a ViT at {SIZE} pixels: patch {PATCH}, width {DIM}, depth {DEPTH}, "
        f"batch {BATCH_SIZE}, AdamW.  ",
        f"{hardware(device)}. {', '.join(versions)}.  ",
        f"Median of {REPEATS} repeats, models in turns.", "",
        "| model | parameters | dtype | mode | images/s | x timm | peak MiB |",
        "|---|---|---|---|---|---|---|", *rows, "", *(f"- {note}" for note in notes),
    ])  # fmt: skip
    keep(table, OUT.format(device=device))


if __name__ == "__main__":
    main()
