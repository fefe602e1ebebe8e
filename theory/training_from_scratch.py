"""Why a ViT from scratch falls behind: the numbers in training_from_scratch.md, from our runs.

python theory/training_from_scratch.py             # prints them, and fails if the text differs
python theory/training_from_scratch.py --draw      # draws the picture again
"""

import sys

import matplotlib.pyplot as plt
from _text import ROOT, check

from lab.core import plots
from lab.report import Record, comparisons, read_runs, sentences

PLACE = ROOT / "results"
PICTURE = ROOT / "theory" / "training_from_scratch.png"
COLOURS = {"vit_64x4": "#c2571a", "CNN twin of vit_64x4": "#1f5fa8",
           "vit_128x6_cifar10, full": "#2a8a57", "vit_128x6_cifar10, head": "#7b4fa3"}  # fmt: skip
LABELS = {"vit_64x4": "ViT from scratch", "CNN twin of vit_64x4": "CNN of its size, from scratch",
          "vit_128x6_cifar10, full": "ViT pretrained on CIFAR-10 images, fine-tuned",
          "vit_128x6_cifar10, head": "the same, head alone"}  # fmt: skip


def numbers(runs: dict[str, Record], curves: dict) -> dict[str, str]:
    def accuracy(name: str) -> str:
        return sentences.percent(runs[name].metrics["test_accuracy"])

    vit, cnn = curves["vit_64x4"], curves["CNN twin of vit_64x4"]
    said = {}
    for share in (0.01, 0.1, 1.0):
        a, b = vit[share], cnn[share]
        said[f"ViT and CNN on {100 * share:g} %"] = (
            f"| {100 * share:g} % ({sentences.images(a)}) "
            f"| {sentences.percent(a.mean)} | {sentences.percent(b.mean)} "
            f"| {100 * (b.mean - a.mean):.1f} |"
        )
    last = runs["digits-of0.01-vit_64x4-s0"].history[-1]
    said["10 images, learnt"] = (
        f"{sentences.percent(last['train_accuracy'])} of the (augmented) training"
    )
    said["10 images, validation"] = (
        f"{sentences.percent(last['val_accuracy'])} of the validation images"
    )
    said["five times the images"] = (
        f"from {sentences.images(vit[0.01])} to {sentences.images(vit[0.05])} images"
    )
    said["gains"] = f"{100 * (vit[0.05].mean - vit[0.01].mean):.1f} points"
    said["ten times the images"] = (
        f"from {sentences.images(vit[0.1])} to {sentences.images(vit[1.0])}"
    )
    said["gains less"] = f"{100 * (vit[1.0].mean - vit[0.1].mean):.1f} points"

    short = ("cifar10-jpeg-vit_128x6-s0", "cifar10-jpeg-cnn_42-85-168-s0")
    for name, run in zip(("ViT", "CNN"), short, strict=True):
        end = runs[run].history[-1]
        said[f"{name} on CIFAR-10, five epochs"] = f"{name} {accuracy(run)}"
        said[f"{name}, training"] = (
            f"{sentences.percent(end['train_accuracy'])} of the training images"
        )
    longer = runs["cifar10-jpeg-vit_128x6-pretraining"]
    epochs = f"{longer.metrics['epochs']} epochs"
    said["longer"] = f"{epochs}: {sentences.percent(longer.metrics['test_accuracy'])}"

    pets = "pets-vit_small_patch14_dinov2_saliency"
    said["Pets sample, scratch"] = f"from scratch {accuracy(f'{pets}-scratch-s0')}"
    said["Pets sample, our own ViT-Ti"] = f"train.py's recipe {accuracy('pets-vit_192x12-s0')}"
    said["Pets sample, head alone"] = f"the head alone {accuracy(f'{pets}-head-s0')}"
    said["Pets sample, full"] = f"all of it {accuracy(f'{pets}-full-s0')}"
    tuned, head = (curves[f"vit_128x6_cifar10, {mode}"] for mode in ("full", "head"))
    said["fine-tuned on 10 digits"] = f"fine-tuned {sentences.percent(tuned[0.01].mean)}"
    said["head on 10 digits"] = f"head alone {sentences.percent(head[0.01].mean)}"
    return said


def draw(curves: dict) -> None:
    """Accuracy by share of the training images; a line for each model."""
    figure, axis = plt.subplots(figsize=(8.4, 5), layout="constrained")
    for name, line in curves.items():
        shares = sorted(line)
        means = [100 * line[s].mean for s in shares]
        low = [m - 100 * line[s].around[0] for m, s in zip(means, shares, strict=True)]
        high = [100 * line[s].around[1] - m for m, s in zip(means, shares, strict=True)]
        axis.errorbar([100 * s for s in shares], means, [low, high], color=COLOURS[name],
                      label=LABELS[name], marker="o", ms=5, capsize=3, lw=1.8)  # fmt: skip
    first = curves["vit_64x4"]
    axis.set_xscale("log")
    axis.set_xticks(
        [100 * s for s in first],
        [f"{100 * s:g} %\n({sentences.images(c)})" for s, c in first.items()],
    )
    axis.minorticks_off()
    axis.set(xlabel="share of the training images (number)", ylabel="test accuracy (%)",
             title="Digits: the fewer images, the further the CNN is ahead of the ViT")  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    figure.supxlabel(
        "All of a line take equally many steps. Bars: 95 % interval of one run, 359 test images; "
        "standard deviation where there are several seeds.", fontsize=8, color="dimgray"
    )  # fmt: skip
    plots.save_figure(figure, PICTURE)


def main() -> None:
    found = read_runs(PLACE / "official")
    runs = {run.folder.name: run for run in found.runs}
    (series,) = comparisons.efficiencies(comparisons.configurations(found.runs, PLACE), PLACE)
    curves = {line[0].first.model: {c.first.share: c for c in line} for line in series}
    if "--draw" in sys.argv:
        draw(curves)
    check(__file__, numbers(runs, curves))


if __name__ == "__main__":
    main()
