r"""Fine-tune a pretrained Swin, or any other timm model, in any mode of finetune.py.

    python finetune_swin.py                            # our CIFAR-10 weights on 360 MNIST images
    python finetune_swin.py --mode head
    python finetune_swin.py --dataset pets \
        --model swinv2_base_window12to16_192to256.ms_in22k_ft_in1k   # on a GPU
    python finetune_swin.py --dataset pets --model convnext_tiny.fb_in22k      # or efficientnet_b0

It does the same as finetune.py and has all its constants except PRETRAINED (here MODEL) and
MODEL_FILE. This file adds what a Swin needs: weights, and an image size that fits its windows.
Records and figures go to results/finetune_swin/<run>/.
"""

import sys

import lab  # noqa: F401  before torch, so that Ctrl-C ends its slow import quietly

# isort: split
from torch import nn

import finetune
from lab.core import UserError, constants, runtime
from lab.models import load_pretrained

# --- Weights ---
MODEL: str = "weights/swin_48x222_cifar10.safetensors"  # timm name, owner/repository, file, run
IMG_SIZE: int | None = None  # input size in pixels; None: the size the weights were trained at

# --- Run ---
RESULTS_DIR: str = "results/finetune_swin"  # one folder per run


def main() -> None:
    values = constants.override(
        sys.modules[__name__], base=finetune, without=("PRETRAINED", "MODEL_FILE")
    )
    if values["IMG_SIZE"]:
        model = load_pretrained(values["MODEL"]).model
        if windows(model):
            check_size(values["IMG_SIZE"], *windows(model))
    finetune.run_modes({**values, "PRETRAINED": values["MODEL"]}, plain_only=False)


def windows(model: nn.Module) -> tuple[int, int, int] | None:
    """Patch size, window size and number of stages of a timm Swin; None for other models."""
    if not type(model).__name__.startswith("SwinTransformer"):
        return None
    window = model.layers[0].blocks[0].window_size
    return model.patch_embed.patch_size[0], window[0], len(model.layers)


def check_size(img_size: int, patch: int, window: int, stages: int) -> None:
    """Checks that the windows tile the grid of patches in every stage.

    Each stage halves the grid. A grid smaller than a window is one window.

    Raises: UserError, with the nearest image sizes that work.
    """

    def tiles(size: int) -> bool:
        grids = [size / (patch * 2**stage) for stage in range(stages)]
        return all(grid == int(grid) and (grid <= window or grid % window == 0) for grid in grids)

    if not tiles(img_size):
        step = patch * 2 ** (stages - 1)
        sizes = [size for size in range(step, 2 * img_size + step * window, step) if tiles(size)]
        near = sorted(sorted(sizes, key=lambda size: abs(size - img_size))[:3])
        raise UserError(
            f"IMG_SIZE={img_size} does not fit: windows of {window} x {window} patches, {patch} "
            f"pixels each, do not tile the image in all {stages} stages. The nearest sizes that "
            f"work: {', '.join(map(str, near))}"
        )


if __name__ == "__main__":
    runtime.run_script(main)
