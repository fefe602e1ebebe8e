"""Train a CNN with the same number of parameters as a ViT, with the same recipe and data.

    python cnn_baseline.py                             # as many parameters as train.py's ViT
    python cnn_baseline.py --match macs                # the same multiply-adds (MACs); much faster
    python cnn_baseline.py --dataset cifar10           # uses train.py's recipe for the dataset
    python cnn_baseline.py --vit results/train/<run>   # matches the ViT of that run

All constants of train.py are constants here, too: they describe the ViT to match, and how to train
the CNN. The width of the CNN is computed so that its size differs from the ViT's by at most 1 %.
Records and figures go to results/cnn_baseline/<run>/.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lab  # noqa: F401  before torch, so that Ctrl-C ends its slow import quietly

# isort: split
import torch

import train
from lab.core import UserError, checkpoints, constants, runtime
from lab.data import Dataset
from lab.models import cnn, profile_model
from lab.training import results
from model import VisionTransformer, ViTConfig

# --- Matched ViT ---
VIT: str | None = None  # folder of the run whose ViT is matched; None: train.py's constants
MATCH: Literal["params", "macs"] = "params"  # what to match: parameters, or multiply-adds per image

# --- Run ---
RESULTS_DIR: str = "results/cnn_baseline"  # each run gets a folder in it

# Constants of train.py that do not apply to a CNN.
EXCLUDED = ("MODEL_FILE", "MODEL", "MODEL_ARGS")
# Those that a VIT sets, and the value that each has if it is not set.
SIZES = {**train.VIT_ONLY, "PATCH_SIZE": None, "DROP_PATH_RATE": None}


def main() -> None:
    values = constants.override(
        sys.modules[__name__], base=train, without=EXCLUDED, recipes=train.RECIPES
    )
    if values["VIT"]:
        train.refuse(values, SIZES, f"VIT={values['VIT']}, which has its own")
    results.summarize_seeds(
        [train.train(seed_values, build) for seed_values in results.each_seed(values)]
    )


def build(c: SimpleNamespace, data: Dataset) -> tuple[cnn.ResidualCNN, str, dict[str, Any]]:
    """The CNN that matches the ViT; prints the size of both.

    Returns: the model, its name for the run's folder, and further entries of config.json.
    """
    vit = vit_of_run(Path(c.VIT)) if c.VIT else train.vit_config(c, data)
    image = (data.channels, c.IMG_SIZE, c.IMG_SIZE)
    vit = replace(vit, img_size=c.IMG_SIZE, in_chans=data.channels, num_classes=len(data.classes))
    if c.VIT:  # the recipe's values, which are in `c`, are those of another ViT
        vars(c).update({name: getattr(vit, name.lower()) for name in SIZES})
    vit_profile = profile_model(VisionTransformer(vit), image)
    target = vit_profile["parameters" if c.MATCH == "params" else "macs"]
    config, _ = cnn.matched_cnn(vit, target, c.MATCH)
    model = cnn.ResidualCNN(config)
    cnn_profile = profile_model(model, image)
    widths = "-".join(map(str, config.dims))
    print(f"CNN of widths {widths}, to match a ViT of width {vit.embed_dim} and depth {vit.depth}:")
    for label, key in (("parameters", "parameters"), ("multiply-adds per image", "macs")):
        ours, theirs = cnn_profile[key], vit_profile[key]
        print(f"  {label}: ViT {theirs:,}, CNN {ours:,} ({100 * (ours / theirs - 1):+.2f} %)")
    twin_of = {"model": f"vit_{vit.embed_dim}x{vit.depth}", "matched": c.MATCH}
    twin_of |= {key: vit_profile[key] for key in ("parameters", "macs")}
    # channels_last changes no result; training is 20 to 40 % faster with it (measured on a CPU).
    return model.to(memory_format=torch.channels_last), f"cnn_{widths}", {"twin_of": twin_of}


def vit_of_run(folder: Path) -> ViTConfig:
    """The configuration of the ViT in a run's folder.

    Raises: UserError, if the folder contains no ViT of this project.
    """
    path = folder / "best.safetensors"
    if not path.is_file():
        raise UserError(f"VIT={str(folder)!r} is not a finished run: {path} is missing")
    _, header = checkpoints.load_weights(path)
    if header.get("model") != "VisionTransformer":
        raise UserError(
            f"VIT={str(folder)!r} contains a {header.get('model')}, not a ViT of this project"
        )
    return ViTConfig(**header["config"])


if __name__ == "__main__":
    runtime.run_script(main)
