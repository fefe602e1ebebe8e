"""What looking at attention costs, beside the model's plain forward pass and the usual ways.

    python -m benchmarks.attention_maps                          # ViT-B/16, 32 images: 10 minutes
    python -m benchmarks.attention_maps --model vit_small_patch14_dinov2 --img-size 448 \
        --batch-size 2

The same random weights and images for all, fp32, on the CPU or a GPU.

- forward: our ViT's plain forward pass, with the fused kernel.
- ours, class token: saliency.raw_attention of lab.attention, every block and head.
- ours, reduced: lab.attention.attention_maps, mean over queries, block by block.
- ours, whole: lab.attention.attention_maps, every matrix kept.
- transformers: ViTForImageClassification with output_attentions=True, every matrix kept.
- hooks: timm.utils.AttentionExtract on timm's ViT without the fused kernel (with it, it finds
  nothing), every matrix kept.

Each has a process of its own, and with it its own memory. They take turns; the times are medians
over the repeats, ratios medians of the ratios to the forward pass of the same turn.
"""

import sys
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks import table
from benchmarks.peers import in_transformers
from benchmarks.timing import Turns, hardware, in_turns
from lab.attention import BlockAttention, attention_maps, saliency
from lab.core import constants, runtime
from lab.models.conversion import config_of
from model import VisionTransformer, ViTConfig

# --- What is measured ---
MODEL: str = "vit_base_patch16_224"  # timm's name of a plain ViT
IMG_SIZE: int = 224  # pixels
BATCH_SIZE: int = 32  # images
WAYS: str = "forward;ours, class token;ours, reduced;ours, whole;transformers;hooks"
# --- How it is measured ---
REPEATS: int = 5  # the median over so many is reported, after one that is not
OUT: str = "benchmarks/local/attention_maps-{device}.md"  # where the table goes; empty: nowhere


def received(block: BlockAttention) -> Tensor:
    return block.average("avg")


def way(name: str, values: dict[str, Any], line: Connection) -> None:
    """One way's process: the model, then as many turns as it is called for."""
    device = runtime.process_state().device
    torch.manual_seed(0)
    with torch.device("meta"):
        blueprint = timm.create_model(values["MODEL"], img_size=values["IMG_SIZE"])
    heads = blueprint.blocks[0].attn.num_heads
    config = config_of(blueprint.state_dict(), heads, blueprint.norm.eps)
    model = VisionTransformer(config).eval()
    shape = (values["BATCH_SIZE"], 3, values["IMG_SIZE"], values["IMG_SIZE"])
    images = torch.randn(shape).to(device)
    look = LOOKS[name](model, config, values, device)
    with torch.no_grad():
        Turns(line, device).take(lambda: look(images))


def in_ours(see: Any) -> Any:
    def made(model: VisionTransformer, _: ViTConfig, __: dict, device: torch.device) -> Any:
        model.to(device)
        return lambda images: see(model, images)

    return made


def transformers(model: VisionTransformer, config: ViTConfig, _: dict, device: torch.device) -> Any:
    theirs = in_transformers(config, model.state_dict()).eval().to(device)
    theirs.set_attn_implementation("eager")  # the others give no weights
    return lambda images: theirs(images, output_attentions=True).attentions


def hooks(model: VisionTransformer, _: ViTConfig, values: dict, device: torch.device) -> Any:
    timm.layers.set_fused_attn(False)
    theirs = timm.create_model(values["MODEL"], img_size=values["IMG_SIZE"])
    theirs.load_state_dict(model.state_dict())
    extract = timm.utils.AttentionExtract(theirs.eval().to(device), method="hook")
    return lambda images: extract(images)


LOOKS = {
    "forward": in_ours(lambda model, images: model(images)),
    "ours, class token": in_ours(saliency.raw_attention),
    "ours, reduced": in_ours(lambda model, images: attention_maps(model, images, received)),
    "ours, whole": in_ours(attention_maps),
    "transformers": transformers,
    "hooks": hooks,
}


def main() -> None:
    values = constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    own = tuple(name for name in LOOKS if name != "transformers")
    ways, notes = table.present(WAYS.split(";"), own)
    times, memory = in_turns(way, ways, values, REPEATS)
    rows, cells = [], []
    for name in ("ours, class token", "ours, whole"):
        what = f"attention maps, {name.removeprefix('ours, ')}"
        rows += table.compared(what, times, name, ["transformers", "hooks"], BATCH_SIZE, memory)
    for name in ways:
        # How many times as long as the forward pass of the same turn.
        middle, low, high = table.ratios(times[ways[0]], times[name])
        cells.append([name, f"{median(times[name]):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})",
                      f"{memory[name]:,}"])  # fmt: skip
    notes += [
        f"Attention of {MODEL}, {IMG_SIZE} pixels, {BATCH_SIZE} images, fp32. Class token: what "
        "it takes in every block and head, for which the peers keep every matrix.",
        "hooks: timm's AttentionExtract.",
    ]  # fmt: skip
    lines = [
        f"{MODEL} at {IMG_SIZE} pixels, {BATCH_SIZE} images, fp32, medians of {REPEATS} in turns; "
        f"{hardware(device)}; {table.versions(['timm', *ways])}.",
        "", f"`{table.command('attention_maps')}`", "",
        *table.in_markdown(["way", "seconds", "x forward pass (range)", "peak MB"], cells),
        "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
    table.keep("attention_maps", lines, OUT.format(device=device), rows, notes)


if __name__ == "__main__":
    main()
