"""The cost of extracting attention, compared with a forward pass and with other libraries.

    python -m benchmarks.attention_maps                          # ViT-B/16, 32 images: 10 minutes
    python -m benchmarks.attention_maps --model vit_small_patch14_dinov2 --img-size 448 \
        --batch-size 2

All methods use the same random weights and images, in fp32:

- class token: lab.attention.saliency.raw_attention, for every block and head.
- whole: lab.attention.attention_maps, which keeps every attention matrix.
- forward: our ViT's forward pass with the fused kernel, without attention.
- transformers: ViTForImageClassification with output_attentions=True, which keeps every matrix.
- hooks: timm.utils.AttentionExtract on timm's ViT without the fused kernel (with it, there is
  nothing to extract); keeps every matrix.

Each method has its own process, and they alternate.
"""

import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks import libraries, table
from benchmarks.timing import Worker, alternate_processes
from lab.attention import attention_maps, saliency
from lab.core import constants, runtime
from lab.models.conversion import config_of
from model import VisionTransformer

# --- What is measured ---
MODEL: str = "vit_base_patch16_224"  # timm's name of a plain ViT
IMG_SIZE: int = 224  # pixels
BATCH_SIZE: int = 32  # images
# --- How it is measured ---
REPEATS: int = 5  # measurements, after one that does not count
OUT: str = "benchmarks/local/attention_maps-{device}.md"  # where the table goes; empty: nowhere

OURS = {"class token": saliency.raw_attention, "whole": attention_maps}
OTHERS = ["forward", "transformers", "hooks"]


def measure_method(name: str, settings: dict[str, Any], worker: Worker) -> None:
    """What one method's process does."""
    globals().update(settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = timm.create_model(MODEL, img_size=IMG_SIZE)
    heads = shapes.blocks[0].attn.num_heads
    model = VisionTransformer(config_of(shapes.state_dict(), heads, shapes.norm.eps)).eval()
    images = torch.randn(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE).to(worker.device)
    method = build_method(name, model, worker.device)
    with torch.no_grad():
        worker.serve(lambda: method(images))


def build_method(
    name: str, model: VisionTransformer, device: torch.device
) -> Callable[[Tensor], Any]:
    if name == "transformers":
        other = libraries.transformers_model(model.config, model.state_dict()).eval().to(device)
        other.set_attn_implementation("eager")  # the other implementations return no weights
        return lambda images: other(images, output_attentions=True).attentions
    if name == "hooks":
        timm.layers.set_fused_attn(False)
        other = libraries.timm_model(model.config, model.state_dict())
        return timm.utils.AttentionExtract(other.eval().to(device), method="hook")
    model.to(device)
    return model if name == "forward" else lambda images: OURS[name](model, images)


def main() -> None:
    settings = constants.override(sys.modules[__name__])
    names, notes = table.installed_libraries([*OURS, *OTHERS], (*OURS, *OTHERS))
    times, memory = alternate_processes(measure_method, names, settings, REPEATS)
    rows, rivals = [], [name for name in OTHERS if name != "forward"]
    for ours in OURS:
        workload = f"attention maps, {ours}"
        rows += table.compare(workload, times, ours, rivals, BATCH_SIZE, memory)
        plain = f"{workload}, against a plain forward pass"
        rows += table.compare(plain, times, ours, ["forward"], BATCH_SIZE, memory)
    title = f"Attention of {MODEL}, {IMG_SIZE} pixels, {BATCH_SIZE} images, fp32; {REPEATS} repeats"
    notes.append("Class token: of every head, only its attention is kept; the others keep all.")
    table.save(OUT, title, rows, notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)
