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

import train
from lab import constants
from lab.errors import run_script
from lab.loaders import Loaders, center
from lab.plots import TRAIN, VAL, save
from lab.runs import Run
from model import Attention, VisionTransformer

RUNS = ROOT / "theory" / "broken"
RECIPE = ["--patch-size", "2", "--epochs", "40"]  # 16 patches: with 4, positions hardly matter
SCALE = 16**-0.5  # 1 / sqrt(d) of the heads of this ViT


TUNED = "healthy-finetuning"
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
    return (center(images.to(self.device), self.preprocess) - 0.449) / 0.226


evaluation, views = Loaders.evaluation, itertools.count(1)


def augmented_validation(self: Loaders, split: str, view: int = 0):
    return evaluation(self, split, next(views) if split == "val" else view)


MISTAKES = {  # name of the run: what was done, and what is put in whose place
    "healthy": ("nothing is broken", None),
    "no-scale": ("no 1/sqrt(d)", (Attention, "forward", attention(1.0, -1))),
    "no-positions": ("no positions", (VisionTransformer, "embed", without_positions)),
    "augmented-validation": ("augmented validation", (Loaders, "evaluation", augmented_validation)),
    "wrong-mean": ("wrong mean and std in evaluation", (Loaders, "normalised", wrongly_normalised)),
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
        for part, colour, label in (("train", TRAIN, "training"), ("val", VAL, "validation")):
            values = [row[f"{part}_loss"] for row in rows]
            axis.plot([row["epoch"] for row in rows], values, color=colour, label=label, lw=1.8)
        best = max(row["val_accuracy"] for row in rows)
        test = run_of(name).metrics()["test_accuracy"]
        axis.set_title(f"{title}\nbest validation {100 * best:.1f} %, test {100 * test:.1f} %")
        axis.set(xlabel="epoch", ylabel="loss (logarithmic)", yscale="log")
        axis.set_ylim(0.003, 4)
        axis.grid(alpha=0.25)
        axis.legend(loc="lower left")
    save(figure, path, 110)


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


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def numbers() -> dict[str, str]:
    said = {}
    for name, title in TITLES.items():
        rows, metrics = run_of(name).history(), run_of(name).metrics()
        best = max(row["val_accuracy"] for row in rows)
        said[title] = (
            f"| {title} | {percent(rows[-1]['train_accuracy'])} | {percent(best)} "
            f"| {rows[-1]['val_loss']:.3f} | {percent(metrics['test_accuracy'])} |"
        )
    return said


def main() -> None:
    if "--train" in sys.argv:
        train_all()
    elif "--quiz" in sys.argv:
        quiz()
    else:
        if "--draw" in sys.argv:
            draw(ROOT / "theory" / "broken_recipes.png", TITLES)
        check(__file__, numbers())


if __name__ == "__main__":
    run_script(main)
