"""Four ways to pretrain a ViT: the numbers in pretraining.md.

python theory/pretraining.py                       # prints the steps, and fails if the text differs
python theory/pretraining.py --draw                # draws pretraining.png too
"""

import json
import sys

import timm
import torch
from _text import ROOT, check, claim
from torch.utils.flop_counter import FlopCounterMode

from lab.data import load_data
from lab.report import read_runs, sentences
from model import Block, ViTConfig

SOURCES = {  # the examples, definitions, and results of others
    "The model gives cat 0.7, dog 0.2, car 0.1": "the example",
    "The teacher's logits (2, 1, 0) are **sharpened**: they are divided by a "
    "temperature of 0.04": "the example",
    "The student's logits (1, 1, 0) at temperature 0.1": "the example",
    "for a ViT-B/16 at 224 pixels": "the example",
    "| usual length on ImageNet-1k | 300 epochs | 300 epochs | 300 to 800 epochs "
    "| 800 to 1,600 epochs |": "the four papers",
    "| 78.2 % (ViT-B/16) | 68.0 % (ViT-B/16) |":
        "github.com/facebookresearch/dino, README; He et al. 2022, repeated in FINETUNE.md",
    "| top-1 accuracy of ViT-B/16 | 77.9 %; 84.0 % if pretrained on 21k | 83.4 % "
    "| 82.8 % after fine-tuning | 83.6 % after fine-tuning |":
        "Dosovitskiy et al. 2021, table 5; Touvron et al. 2021, README_deit.md; He et al. 2022, "
        "table 3",
    "on ImageNet-1k (the supervised ones at 384 pixels, the others at 224)": "the four papers",
    "DeiT with labels but only ImageNet-1k": "the name of the data",
    "In DINO the class token of the last block attends to the object": "Caron et al. 2021",
    "If model, data and training time grow *together*, the error falls as a power law":
        "Zhai et al. 2022",
    "Pretrained on ImageNet-1k (1.3 million images), ViT-L is worse than ViT-B; on JFT-300M "
    "(300 million) it is better": "Dosovitskiy et al. 2021, figure 3",
    "DeiT trains ViT-B on ImageNet-1k only": "Touvron et al. 2021",
    "142 million curated images": "Oquab et al. 2023",
    "| local; less object-like |": "He et al. 2022",
}  # fmt: skip
TEACHER = "regnety_160"  # of DeiT (Touvron et al. 2021)
MASKED = 0.75


def signals_said() -> dict[str, str]:
    model = torch.tensor([0.7, 0.2, 0.1]).double()
    label, distilled = -model[0].log().item(), -model[1].log().item()
    teacher = (torch.tensor([2.0, 1, 0]).double() / 0.04).softmax(0)
    student = (torch.tensor([1.0, 1, 0]).double() / 0.1).softmax(0)
    loss = -(teacher * student.log()).sum().item()
    visible = round((1 - MASKED) * 196)
    return {
        "hidden": claim("MAE hides most patches", visible < 196 - visible),
        "supervised": f"$-\\ln 0.7$ = {label:.3f}",
        "distillation": f"its loss is $-\\ln 0.2$ = {distilled:.3f}, and the total is the mean, "
                        f"{(label + distilled) / 2:.3f}",
        "DINO, teacher": f"puts {100 * teacher[0]:.9f} % of its probability on the first output",
        "DINO": f"give it {100 * student[0]:.1f} %, so the loss is {loss:.3f}",
        "MAE": f"{100 * MASKED:.0f} % of the 196 patches are **masked**. The encoder sees "
               f"{visible} patches, and a small decoder predicts the pixels of "
               f"the {196 - visible} others",
    }  # fmt: skip


def teacher() -> int:
    """Multiply-adds of DeiT's teacher for one image."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(TEACHER).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def forward(tokens: int, dim: int = 768, depth: int = 12, heads: int = 12) -> int:
    """Multiply-adds of a stack of equal blocks, counted by torch without arithmetic."""
    with torch.device("meta"):
        block = Block(ViTConfig(embed_dim=dim, num_heads=heads))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.zeros(1, tokens, dim))
    return depth * counter.get_total_flops() // 2


def costs() -> dict[str, float]:
    """Multiply-adds per image and step, relative to supervised training.

    Training passes count three times a forward pass, teachers once.
    """
    full = forward(197)
    local = forward((96 // 16) ** 2 + 1)  # DINO: 2 global crops, and 10 local ones of 96 pixels
    encoder = forward(round((1 - MASKED) * 196) + 1)
    decoder = forward(197, dim=512, depth=8, heads=16)  # He et al. 2022
    steps = {
        "supervised": 3 * full,
        "DeiT": 3 * forward(198) + teacher(),
        "DINO": 3 * (2 * full + 10 * local) + 2 * full,
        "MAE": 3 * (encoder + decoder),
    }
    return {name: step / steps["supervised"] for name, step in steps.items()}


def costs_said() -> dict[str, str]:
    found = costs()
    ordered = sorted(found.values())
    return {
        "cost": "| relative cost per image | "
                + " | ".join(f"{value:.2f}" for value in found.values()) + " |",
        "factor": f"cost per image differs by a factor of {ordered[-1] / ordered[0]:.0f}",
    }  # fmt: skip


def records_said() -> dict[str, str]:
    official = ROOT / "results" / "official"

    def scores(name: str) -> dict[str, float]:
        place = official / "attention_viz" / f"3breeds-vit_s14-{name}-score" / "metrics.json"
        methods = json.loads(place.read_text(encoding="utf-8"))["methods"]
        return {m: s["trained"]["average_precision"]["mean"][0] for m, s in methods.items()}

    before = scores("pretrained")
    assert "block 13" not in before  # block 12 is the last one
    pretrained = before["block 12"]
    scratch = max(scores("scratch").values())
    runs = {r.folder.name: r for r in read_runs(official / "finetune").runs}
    tuned, bare = (runs[f"pets-3breeds-{name}-s0"] for name in ("full-decay0.7", "scratch"))
    low, high = tuned.metrics["test_accuracy_95"][0], bare.metrics["test_accuracy_95"][1]
    assert low > high
    images = bare.config["dataset"]["train"]
    assert pretrained > scratch
    return {
        "pretrained": "The last block of these weights, before fine-tuning, ranks the "
                      "pixels of the animal with an average precision of "
                      f"{sentences.percent(pretrained)}; with the same architecture trained from "
                      f"scratch on {images} images, even the map that scores best on the test "
                      f"images reaches only {sentences.percent(scratch)}",
        "fine-tuned": f"on three breeds of Pets at {bare.constants['IMG_SIZE']} pixels we measured "
                      f"{sentences.percent(tuned.metrics['test_accuracy'])} against "
                      f"{sentences.percent(bare.metrics['test_accuracy'])} from scratch",
    }  # fmt: skip


def draw() -> None:
    """The figure: an image masked by MAE, two crops of DINO, and the cost of each method."""
    import matplotlib.pyplot as plt

    data = load_data("mnist-5k").test
    image = data.images(slice(None))[int((data.labels == 5).nonzero()[0]), 0].float() / 255
    hidden = torch.randperm(49, generator=torch.Generator().manual_seed(0))[: round(MASKED * 49)]
    masked = image.clone()
    for patch in hidden.tolist():
        row, column = 4 * (patch // 7), 4 * (patch % 7)
        masked[row : row + 4, column : column + 4] = 0.5
    panels = {
        "the image": image, f"MAE: {100 * MASKED:.0f} % of\nthe patches are gray": masked,
        "DINO: global crop\n(teacher, student)": image[2:26, 2:26],
        "DINO: local crop\n(student only)": image[4:16, 8:20],
    }  # fmt: skip
    figure, axes = plt.subplots(
        1, 5, figsize=(13, 2.9), width_ratios=(1, 1, 1, 1, 1.9), layout="constrained"
    )
    for ax, (title, shown) in zip(axes, panels.items(), strict=False):
        ax.imshow(shown, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
    found = costs()
    bars = axes[4].barh(list(found), list(found.values()), color="#c2571a")
    axes[4].bar_label(bars, fmt="%.2f", padding=3)
    axes[4].invert_yaxis()
    axes[4].set(xlabel="multiply-adds per image (supervised = 1)", xlim=(0, 6))
    axes[4].set_title("DINO pays for many crops, MAE saves by masking", fontsize=10)
    figure.savefig(ROOT / "theory" / "pretraining.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, signals_said() | costs_said() | records_said(), SOURCES)
