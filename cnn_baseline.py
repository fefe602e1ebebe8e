"""The ViT's twin: a residual CNN of the same size, trained in the same way on the same data.

    python cnn_baseline.py                             # twin of train.py's ViT on digits, offline
    python cnn_baseline.py --match macs                # as many multiply-adds instead of parameters
    python cnn_baseline.py --dataset cifar10           # each dataset with train.py's recipe
    python cnn_baseline.py --vit results/train/<run>   # twin of that run's ViT

All is as in train.py, whose constants are constants here too: they say which ViT is matched, and
how both are trained. The CNN's width is solved for, so that it has as many parameters within 1 %.
Plots and records go to results/cnn_baseline/<run>/.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

import train
from lab.core import UserError, checkpoints, constants, run_script
from lab.data.datasets import Dataset
from lab.models.cnn import ResidualCNN, matched_cnn
from lab.models.profiling import profile_model
from lab.training.results import over_seeds
from model import VisionTransformer, ViTConfig

# --- Twin ---
VIT: str | None = None  # a run of ours whose ViT is matched; none: the ViT of train.py's constants
MATCH: Literal["params", "macs"] = "params"  # what is equal: parameters, or multiply-adds an image

# --- Run ---
RESULTS_DIR: str = "results/cnn_baseline"  # one folder a run

NOT_HERE = ("MODEL", "MODEL_ARGS")  # the model is the CNN


def main() -> None:
    values = constants.override(sys.modules[__name__], base=train, without=NOT_HERE)
    over_seeds(values, partial(train.train, build=build))


def build(c: SimpleNamespace, data: Dataset) -> tuple[ResidualCNN, str, dict[str, Any]]:
    """The CNN that matches the ViT; both sizes are printed and go into the records."""
    vit = vit_of_run(Path(c.VIT)) if c.VIT else train.vit_config(c, data)
    image = (data.channels, c.IMG_SIZE, c.IMG_SIZE)
    vit = replace(vit, img_size=c.IMG_SIZE, in_chans=data.channels, num_classes=len(data.classes))
    theirs = profile_model(VisionTransformer(vit), image)
    config, _ = matched_cnn(vit, theirs["parameters" if c.MATCH == "params" else "macs"], c.MATCH)
    model = ResidualCNN(config)
    ours = profile_model(model, image)
    widths = "-".join(map(str, config.dims))
    print(f"twin of a ViT {vit.embed_dim} wide, {vit.depth} deep: a CNN {widths} channels wide")
    for name, key in (("parameters", "parameters"), ("multiply-adds an image", "macs")):
        gap = 100 * (ours[key] / theirs[key] - 1)
        print(f"  {name}: {theirs[key]:,} of the ViT, {ours[key]:,} of the CNN ({gap:+.2f} %)")
    counts = {key: theirs[key] for key in ("parameters", "macs")}
    twin_of = {"model": f"vit_{vit.embed_dim}x{vit.depth}", "matched": c.MATCH, **counts}
    # The same function; training is some 20 to 40 % faster so (measured on a CPU).
    return model.to(memory_format=torch.channels_last), f"cnn_{widths}", {"twin_of": twin_of}


def vit_of_run(folder: Path) -> ViTConfig:
    """The shape of a run's ViT.

    Raises: UserError, for a folder that holds no ViT of ours.
    """
    path = folder / "best.safetensors"
    if not path.is_file():
        raise UserError(f"VIT={str(folder)!r} is no finished run: {path} is missing")
    _, header = checkpoints.load_weights(path)
    if header.get("model") != "VisionTransformer":
        raise UserError(f"VIT={str(folder)!r} holds a {header.get('model')}, not a ViT of ours")
    return ViTConfig(**header["config"])


if __name__ == "__main__":
    run_script(main)
