r"""Fine-tune a pretrained Swin, in full or the head only; or any other architecture of timm's.

    python finetune_swin.py                            # our own small Swin on digits, offline
    python finetune_swin.py --mode head
    python finetune_swin.py --dataset pets \
        --model swinv2_base_window12to16_192to256.ms_in22k_ft_in1k   # hand-in
    python finetune_swin.py --dataset pets --model convnext_tiny.fb_in22k      # or efficientnet_b0

All is as in finetune.py, whose constants are constants here too; this file holds what is Swin's
own: weights, window and image size. Plots and records go to results/finetune_swin/<run>/.
"""

import sys

from torch import nn

import finetune
from lab.core import UserError, constants, run_script
from lab.models.pretrained import load_pretrained

# --- Weights ---
MODEL: str = "weights/swin_48x222_cifar10.safetensors"  # timm name, owner/repository, file, run
IMG_SIZE: int | None = None  # pixels, such that the windows tile every stage; none: of the weights

# --- Run ---
RESULTS_DIR: str = "results/finetune_swin"  # one folder a run


def main() -> None:
    values = constants.override(sys.modules[__name__], base=finetune, without=("PRETRAINED",))
    if values["IMG_SIZE"]:
        model = load_pretrained(values["MODEL"]).model
        if windows(model):
            check_size(values["IMG_SIZE"], *windows(model))
    finetune.run_all_or_one({**values, "PRETRAINED": values["MODEL"]}, plain_only=False)


def windows(model: nn.Module) -> tuple[int, int, int] | None:
    """Patch size, window size and number of stages of a Swin of timm's; None for others."""
    if not type(model).__name__.startswith("SwinTransformer"):
        return None
    window = model.layers[0].blocks[0].window_size
    return model.patch_embed.patch_size[0], window[0], len(model.layers)


def check_size(img_size: int, patch: int, window: int, stages: int) -> None:
    """Refuses an image size whose grid of patches the windows do not tile in every stage.

    Each stage halves the grid. A grid smaller than the window is one window.

    Raises: UserError, with the nearest sizes that work.
    """

    def tiles(size: int) -> bool:
        grids = [size / (patch * 2**stage) for stage in range(stages)]
        return all(grid == int(grid) and (grid <= window or grid % window == 0) for grid in grids)

    if not tiles(img_size):
        step = patch * 2 ** (stages - 1)
        sizes = [size for size in range(step, 2 * img_size + step * window, step) if tiles(size)]
        near = sorted(sorted(sizes, key=lambda size: abs(size - img_size))[:3])
        raise UserError(
            f"IMG_SIZE={img_size}: windows of {window} x {window} patches of {patch} pixels do not "
            f"tile it in all {stages} stages. The nearest sizes that work: "
            + ", ".join(map(str, near))
        )


if __name__ == "__main__":
    run_script(main)
