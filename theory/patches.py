"""From an image to tokens: the numbers in patches.md.

python theory/patches.py                           # prints the steps, and fails if the text differs
"""

import torch
from _text import check

from model import PatchEmbed, VisionTransformer, ViTConfig


def tokens(size: int, patch: int) -> tuple[int, int]:
    """Patches along a side, and tokens with the class token, counted on the model itself."""
    config = ViTConfig(img_size=size, patch_size=patch, embed_dim=8, num_heads=1, depth=1)
    with torch.no_grad():
        found = VisionTransformer(config).embed(torch.zeros(1, 3, size, size)).shape[1]
    return size // patch, found


def numbers() -> dict[str, str]:
    said = {}
    for size, patch in ((224, 16), (384, 16), (224, 32)):
        side, count = tokens(size, patch)
        assert count == side**2 + 1
        said[f"patches at {size} pixels, patch {patch}"] = f"{side} x {side} = {side**2}"
        said[f"tokens at {size} pixels, patch {patch}"] = f"{side**2} + 1 = {count}"
    said["numbers in a patch of 16"] = f"16 x 16 x 3 = {16 * 16 * 3}"
    said["numbers in a patch of 32"] = f"32 x 32 x 3 = {32 * 32 * 3:,}"
    said["numbers in the image"] = f"224 x 224 x 3 = {224 * 224 * 3:,}"
    assert 196 * 768 == 224 * 224 * 3
    said["and in all patches"] = f"196 x 768 = {196 * 768:,}"
    base = PatchEmbed(ViTConfig()).proj
    weights = sum(p.numel() for p in base.parameters())
    said["weights of the map"] = f"768 x 768 + 768 = {weights:,}"
    pairs = [tokens(size, 16)[1] ** 2 for size in (224, 384)]
    said["pairs of tokens"] = f"{pairs[0]:,} pairs of tokens become {pairs[1]:,}"
    said["that is"] = f"{pairs[1] / pairs[0]:.1f} times"

    # Three ways to the same tokens, in float64, where only the last digits may differ.
    torch.manual_seed(0)
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=24, num_heads=3)
    embed, images = PatchEmbed(config).double(), torch.randn(2, 3, 32, 32).double()
    by_model = embed(images)  # a convolution whose stride is its kernel
    cut = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)  # (B, 16, 192)
    linear = embed.proj.weight.flatten(1)  # (24, 192)
    by_unfold = cut @ linear.T + embed.proj.bias
    by_hand = torch.stack([
        images[:, :, y : y + 8, x : x + 8].reshape(2, -1) @ linear.T + embed.proj.bias
        for y in range(0, 32, 8) for x in range(0, 32, 8)
    ], dim=1)  # fmt: skip
    gap = max((by_model - other).abs().max().item() for other in (by_unfold, by_hand))
    assert gap < 1e-12
    said["convolution, unfold and slices"] = "differ by less than 1e-12"
    return said


if __name__ == "__main__":
    check(__file__, numbers())
