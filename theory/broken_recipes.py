"""Six training runs that were broken on purpose: the numbers and curves in broken_recipes.md.

python theory/broken_recipes.py                    # prints the numbers, fails if the text differs
python theory/broken_recipes.py --draw             # draws the curves again
python theory/broken_recipes.py --quiz             # curves without names: which mistake is which?
python theory/broken_recipes.py --train            # the runs themselves, digits, about 10 minutes
"""

import itertools
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from _text import ROOT, check
from torch import Tensor

import finetune
import train
from lab.core import Run, constants, plots, run_script
from lab.data import Augmentation, Loaders, Preprocess, load_data
from lab.finetuning import default_learning_rate, learning_rate_warning
from lab.models import load_pretrained
from lab.report import sentences
from model import Attention, VisionTransformer, ViTConfig

RUNS = ROOT / "theory" / "broken"
RECIPE = ["--patch-size", "2", "--epochs", "40"]  # 16 patches: with 4, positions hardly matter
SCALE = 16**-0.5  # 1 / sqrt(d) of the heads of this ViT


TUNED = "healthy-finetuning"
RUNS_ALIKE = ("healthy", "augmented-validation", "wrong-mean")  # in all that concerns training
QUIZ = ROOT / "results" / "broken_recipes_quiz.png"


def attention(scale: float, axis: int):
    """`Attention.forward` of model.py, written out with what a mistake would change."""

    def forward(self: Attention, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * scale).softmax(axis)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))

    return forward


def without_positions(self: VisionTransformer, x: Tensor) -> Tensor:
    x = self.patch_embed(x)
    return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


def wrongly_normalised(self: Loaders, images: Tensor) -> Tensor:
    """ImageNet's mean and deviation (of gray), where the model was trained with those of digits."""
    return (self.preprocess.center_crop(images.to(self.device)) - 0.449) / 0.226


evaluation, views = Loaders.evaluation, itertools.count(1)


def augmented_validation(self: Loaders, split: str, view: int = 0):
    return evaluation(self, split, next(views) if split == "val" else view)


MISTAKES = {  # name of the run: what was done, and what is put in whose place
    "healthy": ("nothing is broken", None),
    "no-scale": ("no 1/sqrt(d)", (Attention, "forward", attention(1.0, -1))),
    "no-positions": ("no positions", (VisionTransformer, "embed", without_positions)),
    "augmented-validation": ("augmented validation", (Loaders, "evaluation", augmented_validation)),
    "wrong-mean": ("wrong mean and std in evaluation", (Loaders, "normalize", wrongly_normalised)),
    "wrong-axis": ("softmax over the wrong axis", (Attention, "forward", attention(SCALE, -2))),
    "rate-1e-3": ("rate 1e-3 in full fine-tuning", None),
}


TITLES = {name: title for name, (title, _) in MISTAKES.items()} | {TUNED: "fine-tuning, healthy"}


def train_all() -> None:
    """Every run, one after another; those that are finished are not repeated."""
    for name, (_, broken) in MISTAKES.items():
        argv = ["--results-dir", RUNS.relative_to(ROOT).as_posix(), "--name", name]
        if name == "rate-1e-3":  # a plain command: nothing is patched
            command = [sys.executable, "finetune.py", *argv, "--learning-rate", "1e-3"]
            subprocess.run(command, cwd=ROOT, check=True)
            continue
        values = constants.override(train, [*argv, *RECIPE])
        place, attribute, wrong = broken or (VisionTransformer, "embed", VisionTransformer.embed)
        with patch.object(place, attribute, wrong):
            train.train(values, train.build)


def draw(path: Path, titles: dict[str, str]) -> None:
    """A panel for each run with training and validation loss; `titles` in their order."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        rows = run_of(name).history()
        for part, colour, label in (
            ("train", plots.TRAIN_COLOR, "training"),
            ("val", plots.VAL_COLOR, "validation"),
        ):
            values = [row[f"{part}_loss"] for row in rows]
            axis.plot([row["epoch"] for row in rows], values, color=colour, label=label, lw=1.8)
        best = max(row["val_accuracy"] for row in rows)
        test = run_of(name).metrics()["test_accuracy"]
        axis.set_title(f"{title}\nbest validation {100 * best:.1f} %, test {100 * test:.1f} %")
        axis.set(xlabel="epoch", ylabel="loss (logarithmic)", yscale="log")
        axis.set_ylim(0.003, 4)
        axis.grid(alpha=0.25)
        axis.legend(loc="lower left")
    plots.save_figure(figure, path, 110)


def run_of(name: str) -> Run:
    """The healthy fine-tuning is the run that README.md quotes; all others are made here."""
    tuned = ROOT / "results/official/finetune/digits-vit_128x6_cifar10-full-s0"
    return Run(tuned if name == TUNED else RUNS / name)


def quiz() -> None:
    """Curves without names; the answers are checked one by one."""
    names = list(TITLES)
    random.shuffle(names)
    letters = dict(zip(names, "ABCDEFGH", strict=True))
    QUIZ.parent.mkdir(exist_ok=True)
    draw(QUIZ, {name: letters[name] for name in names})
    print(f"Open {QUIZ.relative_to(ROOT)}. Which run is which?\n")
    choices = sorted(TITLES.values())
    for number, title in enumerate(choices, 1):
        print(f"  {number}  {title}")
    right = 0
    for name, letter in letters.items():
        answer = input(f"\n{letter} (1 to {len(choices)}, or q to end): ").strip().lower()
        if answer in ("q", "quit"):
            break
        correct = choices.index(TITLES[name]) + 1
        right += answer == str(correct)
        verdict = "Right" if answer == str(correct) else f"No, it is {correct}"
        print(f"{verdict}: {TITLES[name]}. broken_recipes.md says how to find it.")
    print(f"\n{right} of {len(names)} are right.")


def numbers() -> dict[str, str]:
    said = {}
    for name, title in TITLES.items():
        rows, metrics = run_of(name).history(), run_of(name).metrics()
        best = max(row["val_accuracy"] for row in rows)
        said[title] = (
            f"| {title} | {sentences.percent(rows[-1]['train_accuracy'])} "
            f"| {sentences.percent(best)} "
            f"| {rows[-1]['val_loss']:.3f} | {sentences.percent(metrics['test_accuracy'])} |"
        )
    return said


def checks() -> dict[str, str]:
    """Each test that the text advises: what it says of a healthy model, and of the broken one."""
    torch.manual_seed(0)
    config = ViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=1, num_heads=4)
    layer, x = Attention(config).eval(), torch.randn(2, 17, 64) * 4
    gaps = {}
    with torch.no_grad():
        for name in ("healthy", "no-scale", "wrong-axis"):
            wrong = MISTAKES[name][1]
            q, k, v = layer.qkv(x).reshape(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
            fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            theirs = layer.proj(fused.transpose(1, 2).reshape(2, 17, 64))
            gaps[name] = (layer(x) if wrong is None else wrong[2](layer, x)).sub(theirs).abs().max()
    assert gaps["healthy"] < 1e-6 < 1e-3 < min(gaps["no-scale"], gaps["wrong-axis"])

    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        image = torch.randn(1, 1, 8, 8)
        turned = image.roll(2, dims=3)  # the columns of patches change places
        moved = (model(image) - model(turned)).abs().max()
        with patch.object(VisionTransformer, "embed", without_positions):
            still = (model(image) - model(turned)).abs().max()
    assert still < 1e-5 < 1e-2 < moved

    data = load_data("digits")
    preprocess = Preprocess(8, data.mean, data.std)
    loaders = Loaders(data, preprocess, 64, Augmentation(rotate=10.0))

    def images(split: str) -> Tensor:
        return torch.cat([batch for _, batch, _ in loaders.evaluation(split)])

    assert torch.equal(images("val"), images("val"))
    with patch.object(Loaders, "evaluation", augmented_validation):
        assert not torch.equal(images("val"), images("val"))
    healthy = images("train")
    with patch.object(Loaders, "normalize", wrongly_normalised):
        wrong = images("train")
    warning = learning_rate_warning(
        load_pretrained(str(ROOT / finetune.PRETRAINED)).model, "full", 1e-3
    )
    assert warning.startswith("warning: LEARNING_RATE=0.001 is unusual")
    rows = {name: [row["train_loss"] for row in run_of(name).history()] for name in RUNS_ALIKE}
    assert rows["healthy"] == rows["augmented-validation"] == rows["wrong-mean"]
    tuned = ROOT / "results" / "official" / "finetune"
    pets = [
        Run(tuned / f"pets-vit_small_patch14_dinov2_saliency-full{rate}-s0")
        for rate in ("", "-rate2e-4")
    ]
    usual, high = (sentences.percent(run.metrics()["test_accuracy"]) for run in pets)
    rates = [run.config()["constants"]["RATES"][0] for run in pets]
    ours = default_learning_rate(load_pretrained(str(ROOT / finetune.PRETRAINED)).model, "full")
    return {
        "on Pets": f"{rates[1] / rates[0]:.1f} times its usual rate, has {high}",
        "on Pets at the usual rate": f"the usual rate has {usual}",
        "1e-3 on our ViT": f"1e-3 is {1e-3 / ours:.1f} times",
        "mean and deviation, healthy": f"{abs(healthy.mean()):.2f} and {healthy.std():.2f}",
        "mean and deviation, wrong": f"{wrong.mean():.2f} and {wrong.std():.2f}",
    }


def main() -> None:
    if "--train" in sys.argv:
        train_all()
    elif "--quiz" in sys.argv:
        quiz()
    else:
        if "--draw" in sys.argv:
            draw(ROOT / "theory" / "broken_recipes.png", TITLES)
        check(__file__, numbers() | checks())


if __name__ == "__main__":
    run_script(main)
