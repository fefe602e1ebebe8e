"""Fine-tuning a pretrained ViT: the numbers in fine_tuning.md, from our records.

python theory/fine_tuning.py                       # prints the steps, and fails if the text differs
python theory/fine_tuning.py --draw                # draws fine_tuning.png too
"""

import itertools
import math
import sys

import torch
from _text import ROOT, check, claim
from torch import nn

from lab.core import stats
from lab.finetuning import set_trainable
from lab.models import registry
from lab.report import Record, comparisons, read_runs, sentences
from lab.training import optimizers
from model import VisionTransformer, ViTConfig

SOURCES = {  # definitions and results of others
    "scores of 1,000 ImageNet classes. Oxford Pets has 37 breeds": "the datasets",
    "The learning rate rises linearly from near 0": "definition",
    "Then it **decays** to 0": "definition",
    "pulls weights toward 0": "definition",
    "**ImageNet-1k** has 1.28 million images of 1,000 classes, **ImageNet-21k** 14 million of "
    "about 21,000 (Deng et al. 2009; Russakovsky et al. 2015)":
        "Deng et al. 2009, Russakovsky et al. 2015",
    "they should change less": "Clark et al. 2020",
    "Lower layers hold general features": "Yosinski et al. 2014",
    "More images and finer classes give better features: with ViT-B/16, pretraining on 21k instead "
    "of 1k raises ImageNet accuracy from 77.9 % to 84.0 %":
        "Dosovitskiy et al. 2021, table 5",
    "was pretrained on 21k and then fine-tuned on 1k, so it comes with a head of 1,000 classes":
        "the model card",
    "`num_labels=37, ignore_mismatched_sizes=True`": "the interface of transformers",
    "`num_classes=37` in timm": "the interface of timm",
    "`google/vit-base-patch16-224` was": "the name of the model",
    "`google/vit-base-patch16-224-in21k` has no": "the name of the model",
    "mean = std = 0.5, which maps [0, 1] to [-1, 1]": "the preprocessor of the model",
    "one seed with its 95 % interval": "lab/core/stats.py",
}  # fmt: skip
MNIST, PETS, BREEDS = ("mnist-5k-of0.1-vit_128x6_cifar10",
                       "pets-vit_small_patch14_dinov2_saliency", "pets-3breeds")  # fmt: skip
ROWS = {"head": "head", "top 2": "top2", "full": "full", "full, layer decay 0.7": "full-decay0.7",
        "from scratch": "scratch"}  # fmt: skip
VIT_B = ViTConfig(num_classes=37)


def parameters_said() -> dict[str, str]:
    """What each mode trains in a ViT-B/16 with a head for 37 classes."""
    with torch.device("meta"):
        model = VisionTransformer(VIT_B)
    total = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in registry.classifier(model).parameters())

    def trained(mode: str, top_k: int = 2) -> str:
        with torch.device("meta"):
            model = VisionTransformer(VIT_B)
        set_trainable(model, mode, top_k, lora_rank=8)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = 100 * count / total
        return f"{count:,} ({share:.{0 if share > 1 else 2}f} %)"

    return {
        "features": f"a feature vector of {VIT_B.embed_dim} numbers",
        "new head": f"$37 \\cdot 768 + 37$ = {head:,} parameters",
        "backbone": f"All other {total - head:,} parameters",
        "head only": f"| {trained('head')} |",
        "top k": f"here k = 2 blocks | {trained('top-k')} |",
        "full": f"| {trained('full')} |",
        "dropped": f"from {1000:,} classes to {VIT_B.num_classes}",
    }


def layer_decay_said() -> dict[str, str]:
    """Learning rates by layer, from the optimizer that finetune.py uses."""
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(num_classes=37))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = 0.7
    optimizer = optimizers.adamw(model, 1e-3, 0.05, layer_decay=decay, head_lr_mult=10)
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    top, bottom, patches = (
        scale[f"{name}.weight"]
        for name in ("blocks.11.attn.qkv", "blocks.0.attn.qkv", "patch_embed.proj")
    )
    head = scale["head.weight"]
    return {
        "factor": f"a factor of {decay} per layer",
        "layer decay": f"block 12 of a ViT-B gets {top:.1f} of the peak learning rate, block 1 "
                       f"gets {bottom:.3f} and the patch embedding {patches:.4f}",
        "learning rate of the head": claim(
            f"**A higher learning rate for the new head** (here {head:.0f} times the peak)",
            head > top,
        ),
    }  # fmt: skip


def decay_said() -> dict[str, str]:
    """Weight decay in Adam and in AdamW on two weights whose gradients differ in size."""
    rate, decay, steps, start, sizes = 0.01, 0.1, 100, 1, (1, 0.01)

    def after(kind: type[torch.optim.Optimizer]) -> list[float]:
        weight = nn.Parameter(torch.full((2,), start, dtype=torch.float64))
        optimizer = kind([weight], lr=rate, weight_decay=decay)
        for step in range(steps):
            weight.grad = torch.tensor(sizes, dtype=torch.float64) * (-1) ** step
            optimizer.step()
        return weight.tolist()

    coupled, decoupled = after(torch.optim.Adam), after(torch.optim.AdamW)
    assert f"{decoupled[0]:.2f}" == f"{decoupled[1]:.2f}"
    return {
        "example": f"two weights start at {start}; their gradients alternate between "
                   f"+{sizes[0]} and -{sizes[0]}, and between +{sizes[1]} and -{sizes[1]}",
        "AdamW": f"After {steps} steps ($\\eta = {rate}$, $\\lambda = {decay}$) Adam with L2 has "
                 f"brought them to {coupled[0]:.2f} and {coupled[1]:.2f}, AdamW both to "
                 f"{decoupled[0]:.2f}",
    }  # fmt: skip


def percent_range(run: Record) -> str:
    return sentences.result(comparisons.Configuration([run]))


def overlap(one: Record, other: Record) -> bool:
    (low, high), (bottom, top) = (r.metrics["test_accuracy_95"] for r in (one, other))
    return low <= top and bottom <= high


def table(runs: dict[str, Record]) -> dict[str, dict[str, comparisons.Configuration]]:
    """The large table: mode, then dataset."""
    found = {c.name: c for c in comparisons.configurations(list(runs.values()))}
    return {
        label: {data: found[f"{data}-{suffix}"] for data in (MNIST, PETS, BREEDS)}
        for label, suffix in ROWS.items()
    }


def forgetting_said(runs: dict[str, Record]) -> dict[str, str]:
    """The run at a learning rate that was too high, beside its healthy twin and scratch."""
    healthy, high, scratch = (runs[f"{PETS}-{name}-s0"]
                              for name in ("full", "full-rate2e-4", "scratch"))  # fmt: skip
    (usual,), (raised,), _ = rates = [r.constants["RATES"] for r in (healthy, high, scratch)]
    classes = len(healthy.config["dataset"]["classes"])
    labels = ("full, usual learning rate",
              f"full, learning rate {raised / usual:.1f} times as high",
              "from scratch")  # fmt: skip
    said = {
        label: f"| {label} | {rate:.0e} | {sentences.percent(run.history[-1]['train_accuracy'])} "
               f"| {percent_range(run)} |"
        for label, (rate,), run in zip(labels, rates, (healthy, high, scratch), strict=True)
    }  # fmt: skip
    assert not overlap(high, healthy)
    warmup = {r.constants["WARMUP_FRACTION"] for r in (healthy, high)}
    loss = high.history[-1]["train_loss"]
    modes = [runs[f"{PETS}-{name}-s0"] for name in ("head", "top2", "full", "full-decay0.7")]
    memory, seconds = ([r.metrics[key] for r in modes[:3]]
                       for key in ("peak_memory_mb", "training_seconds"))  # fmt: skip
    (peak,) = modes[3].constants["RATES"]
    return said | {
        "no better": claim(
            "ends no better than the model from scratch (the intervals overlap)",
            overlap(high, scratch),
            high.metrics["test_accuracy"] < scratch.metrics["test_accuracy"],
        ),
        "lower": claim("remedies besides a lower learning rate", usual < raised),
        "higher peak": claim(
            f"permits a higher peak, on the Pets sample {peak:.0e} instead of {usual:.0e}",
            peak > usual,
            modes[3].history[-1]["train_accuracy"] > 0.9,  # it learns, unlike the run without decay
        ),
        "cost of top k": claim(
            "backpropagation stops below the trained blocks: less memory and time",
            memory[1] < memory[2],
            seconds[1] < seconds[2],
        ),
        "cost of full": claim("needs the most memory", max(memory) == memory[2]),
        "training images": f"stands for {healthy.config['dataset']['train']} training images of "
                           f"{classes} breeds",
        "chance": f"where chance is {100 / classes:.1f} %",
        "loss": f"After {high.metrics['epochs']} epochs the run at the higher learning rate cannot "
                f"even fit its training images: the loss is {loss:.2f}, and guessing gives "
                f"ln {classes} = {math.log(classes):.2f}",
        "warm-up": f"over the first {100 * warmup.pop():.0f} % of the steps",
        "high": f"learning rate {raised / usual:.1f} times as high destroys",
    }  # fmt: skip


def modes_said(runs: dict[str, Record]) -> dict[str, str]:
    rows = table(runs)
    counts = [c.first.metrics["test_images"] for c in rows["head"].values()]
    said = {
        "test images": f"| mode | mnist-5k ({counts[0]:,} test images) | Pets sample ({counts[1]}) "
                       f"| three breeds ({counts[2]}) |",
    }  # fmt: skip
    for label, by_data in rows.items():
        said[f"records, {label}"] = (
            f"| {label} | {' | '.join(map(sentences.result, by_data.values()))} |"
        )
    head, top, full, decay, scratch = (
        {data: c.first for data, c in by_data.items()} for by_data in rows.values()
    )

    def p(one: Record, other: Record) -> tuple[int, int, float]:
        return stats.mcnemar(one.predictions.correct, other.predictions.correct)

    said |= mnist_said({label: by_data[MNIST] for label, by_data in rows.items()})
    # Pets sample
    assert overlap(head[PETS], full[PETS])
    only_head, only_full, value = p(head[PETS], full[PETS])
    assert value < 0.05
    assert only_full > only_head
    said["Pets sample"] = (
        "the intervals of head and full **overlap**. But both models saw the same test images: "
        f"only full is correct on {only_full} of them, only head on {only_head} (McNemar's test, "
        f"p = {value:.3f}), so full is probably better"
    )
    only_full, only_decay, value = p(full[PETS], decay[PETS])
    said["Pets sample, layer decay"] = claim(
        f"Layer decay made full fine-tuning worse (p = {value:.3f})",
        value < 0.05, only_decay < only_full,
    )  # fmt: skip
    value = p(head[PETS], top[PETS])[2]
    assert value > 0.05
    said["Pets sample, top 2"] = f"Head and top 2 cannot be told apart (p = {value:.2f})"
    # Three breeds
    dataset = full[BREEDS].config["dataset"]
    side = full[BREEDS].constants["IMG_SIZE"]
    said["three breeds, images"] = f"*three breeds* for {dataset['train']} images at {side} pixels"
    value, (only_head, only_decay, better) = (
        p(head[BREEDS], full[BREEDS])[2],
        p(head[BREEDS], decay[BREEDS]),
    )
    said["three breeds"] = claim(
        f"head and full **overlap** (p = {value:.2f}), and plain full is lower. With layer decay, "
        f"full is better than the head (p = {better:.3f}), although the intervals still overlap",
        value > 0.05 > better,
        only_decay > only_head,
        overlap(head[BREEDS], full[BREEDS]),
        overlap(head[BREEDS], decay[BREEDS]),
        full[BREEDS].metrics["test_accuracy"] < head[BREEDS].metrics["test_accuracy"],
    )
    # Scratch
    gaps = [
        mode[data].metrics["test_accuracy_95"][0] - scratch[data].metrics["test_accuracy_95"][1]
        for data in (PETS, BREEDS) for mode in (head, top, full, decay)
    ]  # fmt: skip
    said["scratch"] = claim(
        "on both Pets sets every pretrained mode is far ahead; no interval overlaps",
        min(gaps) > 0.1,
    )
    return said


def mnist_said(modes: dict[str, comparisons.Configuration]) -> dict[str, str]:
    """The modes on a tenth of the labels of mnist-5k, over seeds."""
    first = modes["full"].first
    share = first.constants["TRAIN_FRACTION"]

    def p(one: str, other: str) -> float:
        return comparisons.welch(modes[one], modes[other])

    steps = list(itertools.pairwise(("from scratch", "head", "top 2", "full")))
    layer_decay = p("full", "full, layer decay 0.7")
    return {
        "mnist-5k, images": f"*mnist-5k* for {share * first.config['dataset']['train']:.0f} images "
                            f"of handwritten digits, each seen {1 / share:.0f} times in each of "
                            f"{first.metrics['epochs']} epochs",
        "mnist-5k": claim(
            "**mnist-5k:** from scratch, head, top 2 and full: each step is significant (Welch's "
            "t-test, p < 0.01)",
            all(modes[low].mean < modes[high].mean for low, high in steps),
            max(p(*step) for step in steps) < 0.01,
        ),
        "mnist-5k, layer decay": claim(
            f"Layer decay makes no significant difference (p = {layer_decay:.2f})",
            layer_decay > 0.05,
        ),
    }  # fmt: skip


def cifar_said(runs: dict[str, Record]) -> dict[str, str]:
    """The ViT-S/14 on CIFAR-10: a linear head, and its top two blocks, as on the second sheet."""
    small, large, blocks = (
        runs[f"cifar10-jpeg-{name}-s0"] for name in ("56-head", "224-head", "56-top2")
    )
    (images,) = {run.config["dataset"]["train"] for run in (small, large, blocks)}
    (epochs,) = {run.metrics["epochs"] for run in (small, large, blocks)}
    assert blocks.constants["IMG_SIZE"] == small.constants["IMG_SIZE"]
    assert blocks.constants["TOP_K"] == 2
    ordered = [run.metrics["test_accuracy_95"] for run in (small, large, blocks)]
    return {
        "CIFAR-10": claim(
            f"after {epochs} epochs on {images:,} training images, a head on the frozen ViT-S/14 "
            f"reaches {percent_range(small)} at {small.constants['IMG_SIZE']} pixels and "
            f"{percent_range(large)} at {large.constants['IMG_SIZE']} pixels. Training the top "
            f"{blocks.constants['TOP_K']} blocks reaches {percent_range(blocks)} at "
            f"{blocks.constants['IMG_SIZE']} pixels. No interval overlaps another",
            *(low[1] < high[0] for low, high in itertools.pairwise(ordered)),
        ),
    }  # fmt: skip


def draw(runs: dict[str, Record]) -> None:
    """The figure: accuracy by mode with intervals, and training loss with a rate too high."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 3.5), width_ratios=(1.5, 1), layout="constrained"
    )
    names = {MNIST: "mnist-5k", PETS: "Pets sample", BREEDS: "three breeds"}
    rows = table(runs)
    looks = {MNIST: ("o", "black"), PETS: ("s", "#7b4fa3"), BREEDS: ("D", "gray")}
    for shift, (data, (marker, color)) in zip((-0.18, 0, 0.18), looks.items(), strict=True):
        picked = [by_data[data] for by_data in rows.values()]
        errors = [[100 * abs(c.around[end] - c.mean) for c in picked] for end in (0, 1)]
        left.errorbar([i + shift for i in range(len(rows))], [100 * c.mean for c in picked], errors,
                      fmt=marker, capsize=3, color=color, label=names[data])  # fmt: skip
    left.set_xticks(range(len(rows)), [label.replace(", ", ",\n") for label in rows])
    left.set(title="Every pretrained mode beats scratch; full beats head clearly only on mnist-5k",
             ylabel="test accuracy (%), 95 % interval\n"
                    "(mnist-5k: ± standard deviation)")  # fmt: skip
    left.title.set_fontsize(10)
    left.legend(loc="lower left")
    curves = {"full": ("usual learning rate", "#2a8a57"), "scratch": ("from scratch", "gray"),
              "full-rate2e-4": ("3.3 times as high", "#c2571a")}  # fmt: skip
    for name, (label, color) in curves.items():
        history = runs[f"{PETS}-{name}-s0"].history
        right.plot([row["epoch"] for row in history], [row["train_loss"] for row in history],
                   color=color, label=label, marker="o", markersize=3)  # fmt: skip
    right.axhline(math.log(37), color="black", linestyle=":", label="guessing: ln 37")
    right.set(title="A learning rate that is too high\ndestroys the pretrained weights",
              xlabel="epoch (Pets sample)", ylabel="training loss (nats)")  # fmt: skip
    right.title.set_fontsize(10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "fine_tuning.png", dpi=130)


def main() -> None:
    runs = {run.folder.name: run for run in read_runs(ROOT / "results" / "official").runs}
    if "--draw" in sys.argv:
        draw(runs)
    numbers = (parameters_said() | layer_decay_said() | decay_said() | forgetting_said(runs)
               | modes_said(runs) | cifar_said(runs))  # fmt: skip
    check(__file__, numbers, SOURCES)


if __name__ == "__main__":
    main()
