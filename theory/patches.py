"""From an image to tokens: the numbers in patches.md.

python theory/patches.py                           # prints the steps, and fails if the text differs
python theory/patches.py --draw                    # draws patches.png too
"""

import sys
from contextlib import suppress

import torch
from _text import ROOT, check, claim
from torch import Tensor

from lab.data import load_data
from lab.models import load_pretrained, profile_model
from model import ConfigError, PatchEmbed, VisionTransformer, ViTConfig

WEIGHTS = ROOT / "weights" / "vit_64x4_mnist5k.safetensors"


def cut(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to patches as rows, (B, N, C * P * P)."""
    return torch.nn.functional.unfold(images, patch, stride=patch).mT


def example() -> dict[str, str]:
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 8, 7, 6], [5, 4, 3, 2]]
    patches = cut(torch.tensor(rows).double().reshape(1, 1, 4, 4), 2)[0]  # (4, 4)
    tokens = patches @ torch.tensor([[1, 1], [1, 0], [1, 0], [1, -1]]).double()

    def listed(values: Tensor) -> str:
        return ", ".join("(" + ", ".join(f"{v:.0f}" for v in row) + ")" for row in values)

    upper, lower = (" ".join(f"{a} {b} | {c} {d}" for a, b, c, d in half)
                    for half in (rows[:2], rows[2:]))  # fmt: skip
    return {
        "pixels": f"{upper} ----+---- {lower}",
        "title": f"A worked example: {len(rows)} x {len(rows)} pixels in patches of 2 x 2",
        "flattened": f"a row of four numbers: {listed(patches)}",
        "tokens": f"the tokens are {listed(tokens)}",
    }


def small(size: int, patch: int, channels: int = 3) -> VisionTransformer:
    return VisionTransformer(ViTConfig(img_size=size, patch_size=patch, in_chans=channels,
                                       embed_dim=8, num_heads=1, depth=1))  # fmt: skip


def tokens(size: int, patch: int, channels: int = 3) -> tuple[int, int, int]:
    """Tokens with the class token, numbers per patch, and patches along a side of the image."""
    model = small(size, patch, channels)
    with torch.no_grad():
        count = model.embed(torch.zeros(1, channels, size, size)).shape[1]
    return count, model.patch_embed.proj.weight[0].numel(), size // patch


def table_said() -> dict[str, str]:
    said, by_formula, nothing_lost = {}, [], []
    for size, patch in ((224, 16), (384, 16), (224, 32), (224, 8)):
        count, numbers, side = tokens(size, patch)
        by_formula.append((count - 1, numbers) == (size * size / patch**2, patch**2 * 3))
        nothing_lost.append((count - 1) * numbers == size * size * 3)
        said[f"{size} pixels, patch {patch}"] = (
            f"| {size} | {patch} | {side} x {side} = {count - 1} | {count} | {numbers:,} |"
        )
    count, numbers, side = tokens(224, 16)
    gray, gray_numbers, _ = tokens(224, 16, channels=1)
    said["formula"] = claim(
        r"$$N = \frac{H W}{P^2} \text{ patches of } P^2 C \text{ numbers each.}$$", all(by_formula)
    )
    said["nothing lost"] = claim(r"$N \cdot P^2 C = H W C$", all(nothing_lost))
    said["channels"] = claim(
        "More channels only make each patch longer", gray == count, numbers > gray_numbers
    )
    said["patches"] = (
        f"$N = 224 \\cdot 224 / 16^2$ = {count - 1} patches, in a grid of {side} x {side}. "
        f"A gray image has {gray - 1} patches, too"
    )
    said["numbers"] = f"16 x 16 x 3 = {numbers} numbers; a gray one has {gray_numbers}"
    said["class token"] = f"in front: {count - 1} + 1 = {count} tokens"
    pairs = [tokens(size, 16)[0] ** 2 for size in (224, 384)]
    said["pairs"] = (
        f"from 224 to 384 pixels, {pairs[0]:,} pairs become {pairs[1]:,}, which is "
        f"{pairs[1] / pairs[0]:.1f} times as many"
    )
    return said


def sizes_said() -> dict[str, str]:
    """What another size of the image or of the patches changes."""
    usual, image, patch = (small(*sizes) for sizes in ((224, 16), (384, 16), (224, 32)))
    shapes = [{name: p.shape for name, p in model.named_parameters()}
              for model in (usual, image, patch)]  # fmt: skip
    other = [{name for name in shapes[0] if shapes[0][name] != changed[name]}
             for changed in shapes[1:]]  # fmt: skip
    with torch.device("meta"):  # counted without arithmetic
        macs = [profile_model(VisionTransformer(ViTConfig(patch_size=p, depth=1)),
                              (3, 224, 224))["macs"] for p in (16, 32)]  # fmt: skip
    counts = [tokens(224, p)[0] for p in (8, 16, 32)]
    return {
        "larger image": claim(
            "With **a larger image**, all weights can be kept except the position embeddings",
            other[0] == {"pos_embed"},
        ),
        "larger patch": claim(
            "**A larger patch** makes the sequence shorter and the model cheaper",
            counts[2] < counts[1], macs[1] < macs[0],
        ),
        "weights": claim("weights for patch 16 do not fit", "patch_embed.proj.weight" in other[1]),
        "smaller patch": claim(
            "**A smaller patch** keeps detail at a higher cost: half the patch size gives four "
            "times as many patches",
            counts[0] - 1 == 4 * (counts[1] - 1), counts[1] - 1 == 4 * (counts[2] - 1),
            macs[0] > macs[1],
        ),
    }  # fmt: skip


def numbers() -> dict[str, str]:
    usual = ViTConfig()
    base = PatchEmbed(usual).proj
    assert base.stride == base.kernel_size
    weights = sum(p.numel() for p in base.parameters())
    flat, (side, _) = base.weight[0].numel(), base.kernel_size
    size = usual.img_size
    with suppress(ConfigError):  # it names the sizes that work
        ViTConfig(img_size=225, patch_size=16)
        raise AssertionError("a size that the patch does not divide was accepted")

    # Three ways to the same tokens, in float64, where only the last digits may differ.
    torch.manual_seed(0)
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=24, num_heads=3)
    embed, images = PatchEmbed(config).double(), torch.randn(2, 3, 32, 32).double()
    by_model = embed(images)  # a convolution whose stride is its kernel size
    linear = embed.proj.weight.flatten(1)  # (24, 192)
    by_unfold = cut(images, 8) @ linear.T + embed.proj.bias
    by_hand = torch.stack([
        images[:, :, y : y + 8, x : x + 8].reshape(2, -1) @ linear.T + embed.proj.bias
        for y in range(0, 32, 8) for x in range(0, 32, 8)
    ], dim=1)  # fmt: skip
    gap = max((by_model - other).abs().max().item() for other in (by_unfold, by_hand))
    assert gap < 1e-12
    return example() | table_said() | sizes_said() | {
        "ViT-B/16": f"For ViT-B/{usual.patch_size} at {size} x {size} pixels with three channels",
        "coincidence": claim(
            f"The projection maps these {flat} numbers to `embed_dim` = {base.out_channels} "
            "numbers. It is a coincidence that the two numbers are equal",
            flat == base.out_channels,
        ),
        "one line": f"`nn.Conv2d({base.in_channels}, {base.out_channels}, kernel_size={side}, "
                    f"stride={base.stride[0]})`",
        "parameters": f"The projection has {weights:,} learned parameters",
        "shape": f"a matrix of {tokens(224, 16)[0]} rows and {base.out_channels} columns",
        "three ways": "(difference below 1e-12)",
    }  # fmt: skip


def draw() -> None:
    """The figure: a digit in patches, the patches as rows, and the tokens of our trained ViT."""
    import matplotlib.pyplot as plt

    given, data = load_pretrained(str(WEIGHTS)), load_data("mnist-5k").test
    pixels = data.images(slice(None))[int((data.labels == 2).nonzero()[0])][None].float()
    x = (pixels / 255 - given.preprocess.mean[0]) / given.preprocess.std[0]
    with torch.no_grad():
        embedded = given.model.embed(x)[0]  # (50, 64)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.9), width_ratios=(1, 0.9, 1.7), layout="constrained"
    )
    left.imshow(pixels[0, 0], cmap="gray_r", extent=(0, 28, 28, 0))
    left.set(xticks=range(0, 29, 4), yticks=range(0, 29, 4), xlabel="pixels", ylabel="pixels")
    left.grid(color="tab:blue", alpha=0.6)
    for i in (0, 1, 2, 48):
        left.text(4 * (i % 7) + 2, 4 * (i // 7) + 2, str(i + 1), ha="center", va="center",
                  color="tab:blue", fontsize=8)  # fmt: skip
    left.set_title("28 x 28 pixels in patches of 4:\n7 x 7 = 49 patches", fontsize=10)
    shown = middle.imshow(
        cut(pixels, 4)[0], cmap="gray_r", aspect="auto", extent=(0.5, 16.5, 49.5, 0.5)
    )
    middle.set(xlabel="numbers of a patch", ylabel="patch")
    middle.set_title("Each patch becomes\na row of 16 numbers", fontsize=10)
    figure.colorbar(shown, ax=middle, label="pixel value")
    limit = embedded.abs().max().item()
    shown = right.imshow(embedded, cmap="RdBu_r", aspect="auto", vmin=-limit, vmax=limit,
                         extent=(0.5, 64.5, 49.5, -0.5))  # fmt: skip
    right.set(xlabel="numbers of a token (embed_dim)", ylabel="token (0: class token)")
    right.set_title("50 tokens: the patches projected to 64 numbers,\nwith class token and "
                    "positions (trained ViT)", fontsize=10)  # fmt: skip
    figure.colorbar(shown, ax=right, label="value")
    figure.savefig(ROOT / "theory" / "patches.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), {})
