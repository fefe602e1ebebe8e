"""How self-attention sees the whole image: the numbers in self_attention.md.

python theory/self_attention.py                    # prints the steps, and fails if the text differs
python theory/self_attention.py --draw             # draws self_attention.png too
"""

import json
import sys

import torch
from _text import ROOT, check, claim
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.data import load_data
from lab.models import load_pretrained
from model import Attention, Block, VisionTransformer, ViTConfig

SOURCES = {  # the example, definitions, and results of others
    "How much does patch 1 attend": "the example",
    "so the path between any two patches has length 1. A stack of 3 x 3 convolutions": "definition",
    "trained on mnist-5k (`weights/vit_64x4_mnist5k.md`)": "the name of the data",
    "5-shot linear accuracy is 61.4 % without and 64.2 % with learned positions":
        "Dosovitskiy et al. 2021, table 8",
}  # fmt: skip
WEIGHTS = ROOT / "weights" / "vit_64x4_mnist5k.safetensors"
BLOCK, HEAD, CELL = 1, 2, 4  # block 2, head 3, counted from 0; pixels of a patch


def example() -> dict[str, str]:
    """The four patches, and the same with grass in place of the second ear."""
    tokens = torch.tensor([[2, 0], [0, 1], [0, 1], [2, 0]]).double()

    def first_row(x: Tensor) -> Tensor:
        return (x @ x.T / 2**0.5).softmax(dim=-1)[0]

    scores, weights = tokens @ tokens[0] / 2**0.5, first_row(tokens)
    assert scores[0] == scores[3]
    assert scores[1] == scores[2] == 0
    changed = tokens.clone()
    changed[3] = tokens[1]
    ear, grass = weights[3].item(), first_row(changed)[3].item()
    assert grass < ear
    output = weights @ tokens
    ears, other = (tuple(int(v) for v in tokens[i]) for i in (0, 1))
    return {
        "tokens": claim(f"$x_1 = x_4 = {ears}$ and $x_2 = x_3 = {other}$",
                        tokens[0].equal(tokens[3]), tokens[1].equal(tokens[2])),
        "equal": claim("Patch 1 attends as much to the opposite corner as to itself",
                       weights[0] == weights[3]),
        "scores": f"$q_1 \\cdot k_j / \\sqrt 2$: {scores[0]:.2f} for both ears, 0 for both",
        "softmax": ", ".join(f"{w:.3f} for patch {i}" for i, w in enumerate(weights, 1)),
        "output": f"mean of the values, ({output[0]:.3f}, {output[1]:.3f})",
        "grass instead": f"the weight falls from {ear:.3f} to {grass:.3f}",
    }  # fmt: skip


def macs(tokens: int, dim: int, heads: int = 4) -> int:
    """Multiply-adds of one attention layer, counted by torch on its matrix products."""
    with torch.device("meta"):  # shapes only: nothing is computed, nothing takes memory
        layer, x = Attention(ViTConfig(embed_dim=dim, num_heads=heads)), torch.zeros(1, tokens, dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, return_weights=True)
    return counter.get_total_flops() // 2


def counted() -> dict[str, str]:
    config = ViTConfig()
    n, dim = (config.img_size // config.patch_size) ** 2 + 1, config.embed_dim
    for tokens, width in ((197, 768), (577, 768), (50, 64), (1000, 32)):
        assert macs(tokens, width) == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert macs(197, 768, heads=1) == macs(197, 768, heads=12)
    maps, products = 4 * n * dim**2, 2 * n**2 * dim
    equal = next(m for m in range(1, 5000) if 2 * m**2 * dim >= 4 * m * dim**2)
    side = 624 // 16
    return {
        "ViT-B": f"ViT-B at {config.img_size} pixels: N = {n}, D = {dim}",
        "the four linear maps": f"$4 N D^2$ = {maps:,}",
        "the two products": f"$2 N^2 D$ = {products:,}, which is "
                            f"{100 * products / macs(n, dim):.1f} % of the layer",
        "twice the tokens": f"From {n} to {2 * n} tokens the layer costs "
                            f"{macs(2 * n, dim) / macs(n, dim):.2f} times as much; with many "
                            f"tokens, doubling them costs {macs(40_000, 8) / macs(20_000, 8):.2f} "
                            "times as much",
        "equal at": f"N = 2D = {equal:,} tokens",
        "an image": f"An image of 624 pixels with patches of 16 comes close: it has "
                    f"{side} x {side} + 1 = {side**2 + 1:,}",
    }  # fmt: skip


def permuted() -> dict[str, str]:
    """What happens to outputs when the tokens are permuted."""
    torch.manual_seed(0)
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=48, num_heads=4, depth=3, num_classes=5)
    x, order = torch.randn(2, 17, 48).double(), torch.randperm(17)
    for layer in (Attention(config).double(), Block(config).double()):
        assert (layer(x)[:, order] - layer(x[:, order])).abs().max() < 1e-12

    model = VisionTransformer(config).double().eval()
    with torch.no_grad():  # larger weights than at the start, so that differences are visible
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 32, 32).double()
    mixed = shuffled(images, 8, torch.randperm(16))

    def change() -> float:
        before = model(images)
        return ((model(mixed) - before).norm() / before.norm()).item()

    with torch.no_grad():
        with_positions = change()
        model.pos_embed.zero_()
        assert change() < 1e-12
    return {
        "attention and block": "agree within 1e-12, for a layer and for a whole block",
        "logits": f"change by {100 * with_positions:.0f} %, and without positions by less than "
        "1e-12",
    }


def shuffled(images: Tensor, patch: int, order: Tensor) -> Tensor:
    """Images (B, C, H, H) with their patches in another order."""
    parts = nn.functional.unfold(images, patch, stride=patch)[:, :, order]
    return nn.functional.fold(parts, images.shape[-1], patch, stride=patch)


class Trained:
    """The trained ViT and the normalized test images of mnist-5k."""

    def __init__(self):
        given = load_pretrained(str(WEIGHTS))
        self.model, data = given.model.eval(), load_data("mnist-5k").test
        self.pixels, self.labels = data.images(slice(None)).float() / 255, data.labels
        mean, std = given.preprocess.mean[0], given.preprocess.std[0]
        self.images = (self.pixels - mean) / std

    @torch.no_grad()
    def accuracy(self, images: Tensor) -> float:
        logits = torch.cat([self.model(part) for part in images.split(250)])
        return (logits.argmax(1) == self.labels).float().mean().item()

    @torch.no_grad()
    def all_weights(self, image: int) -> Tensor:
        """What the center patch takes from each token in each head of the block, (h, 50)."""
        x = self.model.embed(self.images[image : image + 1])
        x = self.model.blocks[:BLOCK](x)
        block = self.model.blocks[BLOCK]
        weights = block.attn(block.norm1(x), return_weights=True)[1]  # (1, h, N, N)
        return weights[0, :, 1 + 24]  # the class token, then 7 x 7 patches

    def center_weights(self, image: int) -> Tensor:
        """The same in the head that the figure shows, (50,)."""
        return self.all_weights(image)[HEAD]

    def examples(self) -> tuple[int, int]:
        """The first images of two classes."""
        return tuple(int((self.labels == digit).nonzero()[0]) for digit in (2, 7))


def measured() -> dict[str, str]:
    trained = Trained()
    one, other = (trained.center_weights(image) for image in trained.examples())
    moved = (one - other).abs().sum().item() / 2
    firsts = [int((trained.labels == digit).nonzero()[0]) for digit in range(10)]
    rows = torch.stack([trained.all_weights(image) for image in firsts])  # (10, h, 50)
    gaps = torch.stack([(rows[a] - rows[b]).abs().sum(-1) / 2
                        for a in range(10) for b in range(a)])  # (45, h)  # fmt: skip
    assert abs(gaps.max().item() - moved) < 1e-6  # the figure shows the largest
    order = torch.randperm(49, generator=torch.Generator().manual_seed(0))
    healthy = trained.accuracy(trained.images)
    mixed = trained.accuracy(shuffled(trained.images, CELL, order))
    assert mixed < healthy - 0.1
    place = ROOT / "results" / "official" / "attention_viz" / "3breeds-vit_s14-finetuned"
    heads = json.loads((place / "metrics.json").read_text(encoding="utf-8"))["distance"][1]
    return {
        "other weights": f"In head {HEAD + 1} of block {BLOCK + 1}, {100 * moved:.0f} % of the "
                         "attention weight moves to different patches from one image to the other",
        "selection": "We picked the head and the two digits with the largest difference in this "
                     f"block; the mean over its {gaps.shape[1]} heads and all {len(gaps)} pairs of "
                     f"ten digits is {100 * gaps.mean():.0f} %",
        "a convolution": "For a convolution this number is 0",
        "shuffled": f"to the patches of all {len(trained.labels):,} test images of mnist-5k. "
                    f"The accuracy of the trained ViT falls from {100 * healthy:.1f} % to "
                    f"{100 * mixed:.1f} %",
        "heads of block 2": f"look on average between {min(heads):.0f} and {max(heads):.0f} pixels "
                            "away",
    }  # fmt: skip


def draw() -> None:
    """The figure: two digits, and what the same query patch takes from each patch."""
    import matplotlib.pyplot as plt

    trained = Trained()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    found = [trained.center_weights(image)[1:].reshape(7, 7) for image in trained.examples()]
    top = 100 * max(weights.max().item() for weights in found)
    for i, (image, weights) in enumerate(zip(trained.examples(), found, strict=True)):
        left, right = axes[2 * i : 2 * i + 2]
        left.imshow(trained.pixels[image, 0], cmap="gray_r", extent=(0, 7, 7, 0))
        shown = right.imshow(100 * weights, cmap="Oranges", vmin=0, vmax=top, extent=(0, 7, 7, 0))
        left.set_title(f"image {'AB'[i]}: the query patch (box)", fontsize=10)
        right.set_title(f"image {'AB'[i]}: the same query,\nweights from this content", fontsize=10)
        for ax in (left, right):
            ax.add_patch(plt.Rectangle((3, 3), 1, 1, fill=False, edgecolor="tab:blue", linewidth=2))
            ax.set(xticks=range(8), yticks=range(8), xlabel="patches")
            ax.grid(alpha=0.4)
    figure.colorbar(shown, ax=axes[3], label="attention weight (%)")
    figure.suptitle("Attention weights depend on the content: the same query patch takes from "
                    "different patches")  # fmt: skip
    figure.savefig(ROOT / "theory" / "self_attention.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, example() | counted() | permuted() | measured(), SOURCES)
