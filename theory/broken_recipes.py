"""Six training runs that were broken on purpose: the numbers and curves in broken_recipes.md.

python theory/broken_recipes.py                    # prints the numbers, fails if the text differs
python theory/broken_recipes.py --quiz             # curves without names: which mistake is which?
python theory/broken_recipes.py --train            # the runs themselves, digits, about 10 minutes
"""

import itertools
import subprocess
import sys
from unittest.mock import patch

import torch
from _text import ROOT
from torch import Tensor

import train
from lab import constants
from lab.errors import run_script
from lab.loaders import Loaders, center
from model import Attention, VisionTransformer

RUNS = ROOT / "theory" / "broken"
RECIPE = ["--patch-size", "2", "--epochs", "40"]  # 16 patches: with 4, positions hardly matter
SCALE = 16**-0.5  # 1 / sqrt(d) of the heads of this ViT


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
    "healthy-finetuning": ("fine-tuning at its own rate", None),
    "rate-1e-3": ("rate 1e-3 in full fine-tuning", None),
}


def train_all() -> None:
    """Every run, one after another; those that are finished are not repeated."""
    for name, (_, broken) in MISTAKES.items():
        argv = ["--results-dir", RUNS.relative_to(ROOT).as_posix(), "--name", name]
        if name in ("rate-1e-3", "healthy-finetuning"):  # plain commands: nothing is patched
            rate = ["--learning-rate", "1e-3"] if name == "rate-1e-3" else []
            command = [sys.executable, "finetune.py", *argv, *rate]
            subprocess.run(command, cwd=ROOT, check=True)
            continue
        values = constants.override(train, [*argv, *RECIPE])
        place, attribute, wrong = broken or (VisionTransformer, "embed", VisionTransformer.embed)
        with patch.object(place, attribute, wrong):
            train.train(values, train.build)


if __name__ == "__main__":
    if "--train" in sys.argv:
        run_script(train_all)
